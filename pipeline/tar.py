"""The headers of one tar: its images, the places of their bytes, and their class numbers."""

import tarfile
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from tinymim.configs.errors import SourceError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
UNLABELLED = -1


@dataclass(frozen=True)
class Members:
    """The images of one tar in tar order: keys, byte offsets and sizes, and class numbers (-1: none)."""

    keys: tuple[str, ...]
    offsets: npt.NDArray[np.int64]  # [images]
    sizes: npt.NDArray[np.int64]  # [images], bytes
    labels: npt.NDArray[np.int64]  # [images]


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension by webdataset's rule: the key ends before the first dot of the last path part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(file: IO[bytes], name: str, size_bytes: int) -> Members:
    """Read the headers of a tar, front to back.

    Raises:
        SourceError: the tar is damaged, keys repeat, or a label is not a number; names `name`.
    """
    offsets: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                end = member.offset_data + member.size
                key, extension = split_name(_utf8(member.name, name))
                if extension in IMAGE_EXTENSIONS:
                    if key in offsets:
                        raise SourceError(f"duplicate key '{key}' in shard {name}")
                    offsets[key] = (member.offset_data, member.size)
                elif extension == "cls":
                    labels[key] = _label(tar, member, name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise not_a_tar(name, error) from error
    _refuse_truncated(name, size_bytes, offsets, end)
    places = np.array(list(offsets.values()), dtype=np.int64).reshape(-1, 2)
    return Members(
        keys=tuple(offsets),
        offsets=places[:, 0].copy(),
        sizes=places[:, 1].copy(),
        labels=np.array([labels.get(key, UNLABELLED) for key in offsets], dtype=np.int64),
    )


def not_a_tar(name: str, error: Exception) -> SourceError:
    """The error for a shard that cannot be read as a tar."""
    return SourceError(
        f"shard {name} is not a readable tar", got=error, hint="make it again with `tinymim make-shards`"
    )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> int:
    file = tar.extractfile(member)
    text = file.read(32).decode("ascii", "replace").strip() if file else ""
    if not text.isdigit():
        raise SourceError(f"'{member.name}' in shard {shard} is not a class number", got=repr(text), expected="digits")
    return int(text)


def _utf8(name: str, shard: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # tarfile decodes invalid UTF-8 to surrogates
        raise SourceError(
            f"a name in shard {shard} is not UTF-8", got=ascii(name), hint="rename the image and pack it again"
        ) from error
    return name


def _refuse_truncated(name: str, size_bytes: int, offsets: dict[str, tuple[int, int]], end: int) -> None:
    # tarfile ends without an error if the file is cut at a header or inside the last member. Both are found here.
    for key, (offset, size) in offsets.items():
        if offset + size > size_bytes:
            raise SourceError(
                f"shard {name} is truncated at sample '{key}'",
                got=f"{size_bytes} bytes",
                expected=f"at least {offset + size} bytes",
            )
    padded = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if size_bytes < padded + tarfile.BLOCKSIZE:
        raise SourceError(
            f"shard {name} is truncated: it has no end-of-archive block",
            got=f"{size_bytes} bytes",
            expected=f"at least {padded + tarfile.BLOCKSIZE} bytes",
        )
