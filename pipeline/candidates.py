"""Images that `make-shards` may take: files of a folder, or members of tars."""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tinymim.pipeline.index import INDEX_NAME, not_as_indexed, parse_index
from tinymim.pipeline.members import MEMBERS_NAME
from tinymim.pipeline.shards import hash_file
from tinymim.pipeline.survey import UNREADABLE, Survey
from tinymim.pipeline.tar import IMAGE_EXTENSIONS, SYSTEM_FILE, UNLABELLED, ending, is_system, survey_tar

# Pictures that no decoder here reads, or that are no photographs.
_OTHER_PICTURES: Final = frozenset(
    {"heic", "heif", "jxl", "raw", "cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf", "svg", "psd", "xcf"}
    | {"ico", "icns", "tga", "pcx", "eps", "ps", "exr", "hdr", "dds", "qoi"}
)
_ARCHIVES: Final = frozenset({"tar", "zip", "rar", "7z", "gz", "tgz", "bz2", "tbz", "xz", "txz", "zst"})
COMPRESSED_TAR: Final = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tbz", ".txz")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One image before it is read.

    Attributes:
        parts: its path in the folder, or its key in the tar, at the slashes.
        root: the folder, or the tar.
        place: offset and size in the tar; None for a file.
        label: the class number that a tar gives it; -1: none.
        beside: offset and size of the other members of its sample, by ending.
    """

    parts: tuple[str, ...]
    root: Path
    place: tuple[int, int] | None = None
    label: int = UNLABELLED
    beside: Mapping[str, tuple[int, int]] | None = None

    @property
    def file(self) -> Path:
        """The image, or the tar that holds it."""
        return self.root if self.place else self.root.joinpath(*self.parts)

    @property
    def origin(self) -> str:
        """Its place, for lists."""
        path = "/".join(self.parts)
        return f"{self.file.name}:{path}" if self.place else path

    @property
    def key(self) -> str:
        """Its key in a shard: the path without the ending, in UTF-8. A webdataset key must not hold a dot."""
        *folders, name = self.parts
        if self.place:
            return "/".join((*folders, name.replace(".", "_")))
        stem = "/".join((*folders, name.rpartition(".")[0])).replace(".", "_")
        return stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def read(self) -> bytes:
        """The bytes of the image. Raises OSError."""
        return self.file.read_bytes() if self.place is None else _read_part(self.file, *self.place)

    def has_beside(self, extension: str) -> bool:
        """Whether the image has a companion, `key.json` beside `key.jpg`."""
        return extension in (self.beside or {}) if self.place else self._companion(extension).is_file()

    def read_beside(self, extension: str, most_bytes: int) -> bytes | None:
        """A companion of the image; None where there is none. Raises OSError."""
        if not self.has_beside(extension):
            return None
        if self.place is None:
            return _read_part(self._companion(extension), 0, most_bytes)
        offset, size = (self.beside or {})[extension]
        return _read_part(self.file, offset, min(size, most_bytes))

    def _companion(self, extension: str) -> Path:
        return self.file.with_name(f"{self.file.stem}.{extension}")


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class Walk:
    """What lies in a folder.

    Attributes:
        images: the files with an image's ending, sorted by path.
        tars: the tars at the top, sorted.
        pictures: folders at the top that hold pictures of any format, readable or not.
    """

    images: list[Candidate]
    tars: list[Path]
    pictures: frozenset[str]


def walk(folder: Path, survey: Survey) -> Walk:
    """Find the images of a folder. Links are followed, and what is not taken is counted in `survey`."""
    images: list[Candidate] = []
    tars: list[Path] = []
    pictures: set[str] = set()
    for parts, status in _files(folder, survey):
        name, kind = "/".join(parts), ending(parts[-1])
        if not stat.S_ISREG(status.st_mode):
            survey.skip("no regular file", name)
            continue
        if len(parts) == 1 and name in (INDEX_NAME, MEMBERS_NAME):
            continue
        survey.seen[kind] += 1
        if kind in IMAGE_EXTENSIONS or kind in _OTHER_PICTURES:
            pictures.update(parts[:-1][:1])
        if kind in IMAGE_EXTENSIONS:
            images.append(Candidate(parts, folder))
        elif kind == "tar" and len(parts) == 1:
            tars.append(folder / name)
        elif kind in _OTHER_PICTURES:
            survey.skip(f"picture in a format that is not read (.{kind}); convert it to JPEG or PNG", name)
        elif kind in _ARCHIVES:
            survey.skip(f"archive that is not opened (.{kind}); unpack it", name)
        else:
            survey.skip("no image by its ending", name)
    return Walk(sorted(images, key=lambda image: image.parts), sorted(tars), frozenset(pictures))


def _files(folder: Path, survey: Survey) -> Iterator[tuple[tuple[str, ...], os.stat_result]]:
    """Everything below a folder that is no folder itself, with its status. Loops of links are cut."""
    first = folder.stat()
    waiting: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [
        ((), frozenset({(first.st_dev, first.st_ino)})),
    ]
    while waiting:
        above, ancestors = waiting.pop()
        try:
            entries = sorted(os.scandir(folder.joinpath(*above)), key=lambda entry: entry.name)
        except OSError:
            if not above:
                raise
            survey.skip("folder that cannot be read", "/".join(above))
            continue
        for entry in entries:
            parts = (*above, entry.name)
            name = "/".join(parts)
            if entry.name.startswith(".") or is_system(entry.name):
                survey.skip("hidden or system folder" if entry.is_dir() else SYSTEM_FILE, name)
                continue
            try:
                status = entry.stat()
            except OSError:  # also too many links in a row
                survey.skip("link to nothing" if entry.is_symlink() else "file that cannot be read", name)
                continue
            identity = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode):
                yield parts, status
            elif identity in ancestors:
                survey.skip("link to a folder above itself", name)
            else:
                waiting.append((parts, ancestors | {identity}))


# ---------------------------------------------------------------- tars


def images_of_tars(folder: Path, tars: list[Path], survey: Survey, prefer: str, last_dot: bool) -> list[Candidate]:
    """The images of tars, in the order of tars and members. What is not taken is counted in `survey`.

    Args:
        folder: the folder of the tars; its index, if there is one, is compared with them.
        tars: their paths.
        survey: the counts.
        prefer: as in `survey_tar`.
        last_dot: as in `survey_tar`.

    Raises:
        SourceError: as `survey_tar`, or a tar is not the one that the index describes.
    """
    path = folder / INDEX_NAME
    rows = parse_index(str(path), path.read_bytes() if path.is_file() else None).rows()
    if lost := sorted(rows.keys() - {tar.name for tar in tars}):
        raise not_as_indexed(f"{len(lost)} of the {len(rows)} shards of {INDEX_NAME} are missing", lost[0], None)
    survey.seen.clear()  # what counts is inside
    found: list[Candidate] = []
    for tar in tars:
        size_bytes = tar.stat().st_size
        with open(tar, "rb") as file:
            scan = survey_tar(file, tar.name, size_bytes, prefer, last_dot)
        if (row := rows.get(tar.name)) is not None:
            what = f"shard {tar.name} is not the file that {INDEX_NAME} describes"
            if row.num_samples != len(scan.images):
                raise not_as_indexed(what, f"{len(scan.images)} images", f"{row.num_samples} images")
            if (got := hash_file(tar)) != row.content_hash:
                raise not_as_indexed(what, got, row.content_hash)
        survey.seen += scan.endings
        for reason, count in scan.skipped.items():
            survey.skip(reason, tar.name, count)
        for name, reason in scan.left_out:
            survey.skip(f"{UNREADABLE}: {reason}", f"{tar.name}:{name}")
        if not scan.images:
            survey.skip("tar without an image", tar.name)
        for kind, count in scan.endings.items():
            if kind in _OTHER_PICTURES:
                survey.skip(
                    f"picture in a format that is not read (.{kind}); convert it to JPEG or PNG", tar.name, count
                )
            elif kind in _ARCHIVES:
                survey.skip(f"archive that is not opened (.{kind}); unpack it", tar.name, count)
        found += [
            Candidate(tuple(key.split("/")), tar, (each.offset, each.size), scan.label(key), scan.beside(key))
            for key, each in scan.images.items()
        ]
    return found
