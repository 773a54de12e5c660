"""The headers of one tar: its images, the places of their bytes, their class numbers, and what else it holds."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Final

import numpy as np

from tinymim.configs.errors import SourceError, first_line, is_refusal
from tinymim.pipeline.members import Keys, Members

# Endings of images. A fixed list, because a shard must hold the same images on every machine.
IMAGE_EXTENSIONS: Final = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"),
    *("jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "mpo"),
)
UNLABELLED: Final = -1
LABEL_LIMIT: Final = 2**31
LABEL_ENDINGS: Final = ("cls", "cls.txt")
_DOTTED_LABELS: Final = (".cls", ".cls.txt")  # of names whose keys hold dots
# Folders and files that systems and tools leave among images.
_SYSTEM_NAMES: Final = frozenset(
    {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", "#snapshot"}
    | {"Thumbs.db", "desktop.ini", ".DS_Store", ".ipynb_checkpoints"}
)
_SYSTEM_PREFIXES: Final = ("._", ".Trash")
SYSTEM_FILE: Final = "hidden or system file"
FURTHER_PICTURE: Final = "further picture of a sample"
_HEADER_BYTES: Final = 2**20  # longest name or list of attributes; tarfile reads them into memory
_PADDING_BYTES: Final = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # longest end of an archive
_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LINK_HOPS: Final = 40  # as in Linux
_ASK_FOR_REPACK: Final = "make it again with `tinymim make-shards`"


@dataclass(frozen=True)
class Image:
    """One image of a tar."""

    name: str
    offset: int
    size: int


@dataclass
class TarScan:
    """Everything in a tar, by one pass over its headers.

    Attributes:
        images: the images by key, in tar order.
        labels: class numbers by key, of `.cls` and `.cls.txt` members.
        others: the members that are neither: (offset, size) by key, up to the first dot, and ending.
        endings: the number of regular members by ending.
        skipped: the number of members that were passed over, by reason.
        left_out: images that cannot be read: name and reason.
    """

    images: dict[str, Image] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    others: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def label(self, key: str) -> int:
        """The class number of an image, -1 for none. A key with dots falls back to its part before the first dot."""
        return self.labels.get(key, self.labels.get(split_name(key)[0], UNLABELLED))

    def beside(self, key: str) -> dict[str, tuple[int, int]]:
        """The other members of an image's sample: (offset, size) by ending."""
        first, rest = split_name(key)  # a key with dots: its companions are `KEY.json`, not `FIRST.json`
        others = self.others.get(first, {})
        prefix = f"{rest}." if rest else ""
        return {kind.removeprefix(prefix): place for kind, place in others.items() if kind.startswith(prefix)}

    def members(self) -> Members:
        places = np.array([(image.offset, image.size) for image in self.images.values()], dtype=np.int64).reshape(-1, 2)
        return Members(
            keys=Keys.of(list(self.images)),
            offsets=places[:, 0].copy(),
            sizes=places[:, 1].copy(),
            labels=np.array([self.label(key) for key in self.images], dtype=np.int64),
        )


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension by webdataset's rule: the key ends before the first dot of the last path part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def ending(name: str) -> str:
    """The part of a name after its last dot, in lower case."""
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if stem and extension else "(none)"


def is_system(name: str) -> bool:
    """Whether a path lies in a folder, or is a file, that a system or a tool has left among images."""
    return any(part in _SYSTEM_NAMES or part.startswith(_SYSTEM_PREFIXES) for part in name.split("/"))


def scan_tar(file: IO[bytes], name: str, size_bytes: int) -> Members:
    """The images of a tar.

    Raises:
        SourceError: as `survey_tar`, or an image cannot be read by its place in the tar.
    """
    scan = survey_tar(file, name, size_bytes)
    if scan.left_out:
        member, reason = scan.left_out[0]
        raise SourceError(
            f"image '{member}' of shard {name} cannot be read",
            got=f"{reason} ({len(scan.left_out)} such images)",
            expected="images that lie in the tar as they are",
            hint="`tinymim make-shards` packs the other images and lists these",
        )
    return scan.members()


def survey_tar(file: IO[bytes], name: str, size_bytes: int, prefer: str = "", last_dot: bool = False) -> TarScan:
    """Read the headers of a tar, front to back.

    Args:
        file: the tar.
        name: its name, for messages.
        size_bytes: its size.
        prefer: ending of the image to take where a sample has several; "": that is an error.
        last_dot: whether `a.1.jpg` and `a.2.jpg` are two images; else several such names are an error.

    Raises:
        SourceError: the tar is damaged, keys repeat, names are ambiguous, or a label is not a number; names `name`.
    """
    scan, links = TarScan(), dict[str, str]()
    places: dict[str, tuple[int, int]] = {}  # of all regular members, for the links to them
    for member in _headers(file, name):
        if member.isdir():
            continue
        path = _utf8(member.name, name)
        if is_system(path):
            scan.skipped[SYSTEM_FILE] += 1
        elif member.islnk() or member.issym():
            links[path] = _target(member)
        elif not member.isreg():
            scan.skipped["no regular file"] += 1
        elif member.issparse():
            scan.endings[ending(path)] += 1
            if ending(path) in IMAGE_EXTENSIONS:
                scan.left_out.append((path, "stored sparse"))
        else:
            if path in places and ending(path) in IMAGE_EXTENSIONS:
                raise SourceError(f"duplicate key '{split_name(path)[0]}' in shard {name}", got=f"two members '{path}'")
            places[path] = (member.offset_data, member.size)
            scan.endings[ending(path)] += 1
        if member.isreg() and not member.issparse():
            end = member.offset_data + member.size
            if end > size_bytes:
                raise _truncated(name, f"at sample '{split_name(path)[0]}'", size_bytes, end)
    _resolve_links(links, places, scan)
    _refuse_bad_end(file, name, size_bytes)
    _sort_members(scan, places, file, name, prefer, last_dot)
    return scan


def not_a_tar(name: str, error: Exception) -> SourceError:
    """The error for a shard that cannot be read as a tar, or that the system refuses to open."""
    if isinstance(error, OSError) and is_refusal(error):
        hint = "restore it, or the permission to read it, and run the same command again"
        return SourceError(f"shard {name} cannot be opened", got=error.strerror, hint=hint)
    return SourceError(f"shard {name} is not a readable tar", got=first_line(error), hint=_ASK_FOR_REPACK)


# ---------------------------------------------------------------- headers


class _Headers:
    """A tar as tarfile reads it for its headers. A header's own length is bounded before it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()


def _headers(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Leaves `file` at the first byte that belongs to none.

    Raises:
        SourceError: the tar is damaged, compressed or empty.
    """
    start = file.read(8)
    if not start:
        hint = "copy it again if it held images, else remove it from the folder"
        raise SourceError(f"shard {name} holds no image", got="0 bytes", expected="a tar", hint=hint)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise SourceError(
                f"shard {name} is compressed",
                got=kind,
                expected="a plain tar",
                hint="decompress it; images gain nothing",
            )
    file.seek(0)
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            place = -1
            for member in tar:
                # A negative size would send tarfile back, for ever.
                if member.size < 0 or member.offset <= place:
                    raise tarfile.ReadError(f"member '{member.name[:100]}' claims {member.size} bytes")
                place = member.offset
                yield member
                tar.members.clear()  # tarfile would keep them all
            file.seek(tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise not_a_tar(name, error) from error


def _utf8(name: str, shard: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # tarfile decodes invalid UTF-8 to surrogates
        raise SourceError(
            f"a name in shard {shard} is not UTF-8", got=ascii(name), hint="rename the image and pack it again"
        ) from error
    return name


def _target(link: tarfile.TarInfo) -> str:
    """The member that a link points to; a symbolic link's target is relative to its own folder."""
    return link.linkname if link.islnk() else os.path.join(os.path.dirname(link.name), link.linkname)


def _resolve_links(links: dict[str, str], places: dict[str, tuple[int, int]], scan: TarScan) -> None:
    """Give links the place of the member they point to. Images whose target cannot be read are left out."""
    known = {os.path.normpath(path): place for path, place in places.items()}
    by_path = {os.path.normpath(path): target for path, target in links.items()}
    sparse = {os.path.normpath(path) for path, _ in scan.left_out}
    for path, target in links.items():
        end = os.path.normpath(target)
        for _ in range(_LINK_HOPS):  # links to links, which may form a ring
            if end not in by_path:
                break
            end = os.path.normpath(by_path[end])
        if end in known:
            places[path] = known[end]
            scan.endings[ending(path)] += 1
        elif ending(path) in IMAGE_EXTENSIONS:
            why = "is stored sparse" if end in sparse else "is not in the tar"
            scan.endings[ending(path)] += 1
            scan.left_out.append((path, f"a link to '{target}', which {why}"))


def _truncated(name: str, where: str, size_bytes: int, needed: int) -> SourceError:
    return SourceError(
        f"shard {name} is truncated {where}", got=f"{size_bytes} bytes", expected=f"at least {needed} bytes"
    )


def _refuse_bad_end(file: IO[bytes], name: str, size_bytes: int) -> None:
    """Refuse a tar that goes on after its members: tarfile ends there without an error, whatever follows.

    Raises:
        SourceError: no end-of-archive block, a damaged header, another archive, or more zeros than an end has.
    """
    end = file.tell()
    first = file.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        raise _truncated(name, "or damaged: it has no end-of-archive block", size_bytes, end + tarfile.BLOCKSIZE)
    if any(first):
        raise SourceError(
            f"shard {name} is damaged: at byte {end} there is neither a member nor the end of the archive",
            got=f"{size_bytes - end} bytes from there on",
            hint=f"copy it again, or {_ASK_FOR_REPACK}",
        )
    while chunk := file.read(2**20):
        if any(chunk):
            raise SourceError(
                f"bytes follow the end of the archive {name}",
                got=f"{size_bytes - end} bytes after its last member, at byte {end}",
                expected=f"zeros, at most {_PADDING_BYTES} bytes",
                hint="tars that were joined by `cat` are unpacked by `tar --ignore-zeros -xf`; pack the folder again",
            )
    if size_bytes - end > _PADDING_BYTES:
        raise SourceError(
            f"shard {name} ends in zeros: its images stop at byte {end} of {size_bytes}",
            got=f"{size_bytes - end} zero bytes after the last member",
            expected=f"at most {_PADDING_BYTES}",
            hint="a copy that broke off looks like this: copy the tar again; unpack a tar of a large --blocking-factor "
            "and pack it without",
        )


# ---------------------------------------------------------------- names


def _sort_members(
    scan: TarScan, places: dict[str, tuple[int, int]], file: IO[bytes], name: str, prefer: str, last_dot: bool
) -> None:
    """Fill `scan.images`, `labels` and `others` from the places of all members."""
    pictures: dict[str, list[Image]] = {}  # by the key before the first dot
    dotted: dict[str, list[Image]] = {}  # likewise, images by their last dot only
    for path, (offset, size) in places.items():
        key, extension = split_name(path)
        if extension in IMAGE_EXTENSIONS:
            pictures.setdefault(key, []).append(Image(path, offset, size))
        elif ending(path) in IMAGE_EXTENSIONS:
            dotted.setdefault(key, []).append(Image(path, offset, size))
        elif extension in LABEL_ENDINGS:
            scan.labels[key] = _label(file, offset, size, path, name)
        elif extension.endswith(_DOTTED_LABELS):
            stem = path[: -max(len(each) for each in _DOTTED_LABELS if extension.endswith(each))]
            scan.labels[stem] = _label(file, offset, size, path, name)
        else:
            scan.others.setdefault(key, {})[extension] = (offset, size)
    for key, images in dotted.items():
        if key in pictures:  # `a.mask.png` beside `a.jpg`
            scan.skipped[FURTHER_PICTURE] += len(images)
            continue
        if len(images) > 1 and not last_dot:
            raise SourceError(
                f"two images of shard {name} have one key by webdataset's rule, which ends a key at the first dot",
                got=f"'{images[0].name}' and '{images[1].name}'",
                expected="one image for each key",
                hint="`tinymim make-shards SRC DST --last-dot` packs them as two images",
            )
        for image in images:
            pictures.setdefault(image.name.rpartition(".")[0], []).append(image)
    chosen = {key: _chosen(key, images, name, prefer, scan) for key, images in pictures.items()}
    in_order = sorted(chosen.items(), key=lambda item: item[1].offset) if dotted else chosen.items()
    scan.images = dict(in_order)


def _chosen(key: str, images: list[Image], shard: str, prefer: str, scan: TarScan) -> Image:
    """The image of a sample."""
    wanted = images if len(images) == 1 else [image for image in images if ending(image.name) == prefer]
    if len(wanted) != 1:
        raise SourceError(
            f"sample '{key}' of shard {shard} has several images",
            got=", ".join(f"'{image.name}'" for image in images[:4]),
            expected="one image" + (f", or one that ends in .{prefer}" if prefer else ""),
            hint=f"`tinymim make-shards SRC DST --prefer {ending(images[0].name)}` takes the one with that ending",
        )
    if len(images) > 1:
        scan.skipped[FURTHER_PICTURE] += len(images) - 1
    return wanted[0]


def _label(file: IO[bytes], offset: int, size: int, path: str, shard: str) -> int:
    file.seek(offset)
    text = file.read(min(size, 64)).decode("ascii", "replace").strip()
    if size > 64 or not text.isdigit() or int(text) >= LABEL_LIMIT:
        raise SourceError(
            f"'{path}' in shard {shard} is not a class number",
            got=repr(text[:32]),
            expected=f"digits, below {LABEL_LIMIT}",
        )
    return int(text)
