"""`tinymim make-shards SRC DST`: write images to webdataset shards with an index.

Bytes of images are kept, unless `resize_short` shrinks large images, which makes another source.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import webdataset
from torch import Tensor

from tinymim.configs.errors import SourceError
from tinymim.configs.sections import SourceConfig
from tinymim.pipeline import drawn
from tinymim.pipeline.decode import decode
from tinymim.pipeline.shards import INDEX_NAME, INDEX_VERSION, UNLABELLED, hash_file, open_shards
from tinymim.pipeline.tar import IMAGE_EXTENSIONS
from tinymim.pipeline.workers import prepare_worker, worker_context
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.storage.atomic import write_json_atomic

DRAWN = "drawn"  # as SRC: the generated images


@dataclass(frozen=True)
class Image:
    """One image to write to a shard."""

    key: str
    extension: str
    data: bytes
    label: int  # -1: none
    origin: str  # its source, for the list of unreadable images


@dataclass(frozen=True)
class Options:
    """The options of the command; `count` and `seed` apply to SRC = drawn only."""

    images_per_shard: int = 1000
    prefix: str = "shard"
    count: int = 2000
    seed: int = 0
    resize_short: int = 0  # largest short side in pixels; 0 keeps the bytes of all images
    quality: int = 95  # JPEG quality of resized images


def run(source: str, target: Path, options: Options) -> dict[str, Any]:
    """Write shards, and then `index.json`, so that a folder with an index is complete.

    Returns:
        The index.

    Raises:
        SourceError: there are no readable images, `target` holds files, or an option is out of range.
        Interrupted: a signal stopped the command; no index is written.
    """
    if target.exists() and any(target.iterdir()):
        raise SourceError("target folder is not empty", got=target, hint="give a new folder; nothing was changed")
    if options.images_per_shard < 1:
        raise SourceError("images per shard must be at least 1", got=options.images_per_shard)
    if options.resize_short < 0:
        raise SourceError("resize-short must be a number of pixels", got=options.resize_short, expected="0: no resize")
    if not 1 <= options.quality <= 100:
        raise SourceError("quality is out of range", got=options.quality, expected="1 to 100")
    total, classes, images = _find(source, options)
    if total == 0:
        raise SourceError("no images found", got=source, expected=f"files ending in {', '.join(IMAGE_EXTENSIONS)}")
    target.mkdir(parents=True, exist_ok=True)
    unreadable: list[dict[str, str]] = []
    resized: list[str] = []
    rows: list[dict[str, Any]] = []
    with StopFlag() as stop, Meter("make-shards", total, "images") as meter:
        readable = _readable(images, options, unreadable, resized, meter, stop)
        for number, first in enumerate(readable):
            path = target / f"{options.prefix}-{number:06d}.tar"
            count = _write_shard(path, first, readable, options.images_per_shard)
            rows.append(
                {
                    "name": path.name,
                    "size_bytes": path.stat().st_size,
                    "num_samples": count,
                    "content_hash": hash_file(path),
                }
            )
    if not rows:
        raise SourceError(
            "no image can be read", got=f"{len(unreadable)} unreadable, the first: {unreadable[0]}", expected="images"
        )
    index = {
        "version": INDEX_VERSION,
        "shards": rows,
        "classes": classes,
        "num_samples": sum(row["num_samples"] for row in rows),
        "unreadable": unreadable,
        "made_by": {"source": source, **recorded(source, options, len(resized))},
    }
    write_json_atomic(target / INDEX_NAME, index)
    logger.info(f"make-shards: {index['num_samples']:,} images in {len(rows)} shards, {len(unreadable)} unreadable")
    if options.resize_short:
        logger.info(
            f"make-shards: {len(resized):,} images resized to a short side of {options.resize_short} px and encoded "
            f"again; a cache made from {source} does not fit these shards"
        )
    for row in unreadable[:10]:
        logger.info(f"  unreadable: {row['origin']}: {row['reason']}")
    return index


def recorded(source: str, options: Options, resized: int = 0) -> dict[str, Any]:
    """The options that determine the content of the images, for the index."""
    fields = asdict(options)
    resize = {"resize_short": fields.pop("resize_short"), "quality": fields.pop("quality"), "resized": resized}
    return (fields if source == DRAWN else {}) | (resize if options.resize_short else {})


def _readable(
    images: Iterator[Image],
    options: Options,
    unreadable: list[dict[str, str]],
    resized: list[str],
    meter: Meter,
    stop: StopFlag,
) -> Iterator[Image]:
    """The readable images, resized if `options` requires it. Fills the lists `unreadable` and `resized`."""
    for image in images:
        if stop.requested:
            raise Interrupted("no index written; remove the folder and restart")
        meter.advance(1)
        try:
            pixels = decode(image.data)
        except SourceError as error:
            unreadable.append({"origin": image.origin, "reason": str(error.got)})
            continue
        if 0 < options.resize_short < min(pixels.shape[1:]):
            resized.append(image.key)
            image = replace(image, extension="jpg", data=shrink(pixels, options.resize_short, options.quality))
        yield image


def shrink(pixels: Tensor, short: int, quality: int) -> bytes:
    """Shrink an image by Lanczos and encode it as JPEG without EXIF, in chroma 4:2:0, which decodes the fastest.

    Args:
        pixels: uint8 [3, height, width], both sides longer than `short`.
        short: the new short side, in pixels.
        quality: JPEG quality, 1 to 100.
    """
    height, width = pixels.shape[1:]
    scale = short / min(height, width)
    image = PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    smaller = image.resize((round(width * scale), round(height * scale)), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _write_shard(path: Path, first: Image, rest: Iterator[Image], most: int) -> int:
    """Write `first` and up to `most - 1` of `rest`. The tar appears complete, by rename. Returns the number written."""
    partial = path.with_suffix(".tar.partial")
    count = 0
    with open(partial, "wb") as file:
        # Time and owner are fixed, so that the same images give the same bytes.
        with webdataset.TarWriter(file, mtime=0, user="", group="", encoder=False) as tar:
            image: Image | None = first
            while image is not None:
                sample: dict[str, Any] = {"__key__": image.key, image.extension: image.data}
                if image.label != UNLABELLED:
                    sample["cls"] = str(image.label).encode()
                tar.write(sample)
                count += 1
                image = next(rest, None) if count < most else None
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return count


def _find(source: str, options: Options) -> tuple[int, list[str], Iterator[Image]]:
    """The number of images, the names of the classes, and the images in a fixed order."""
    if source == DRAWN:
        return options.count, list(drawn.CLASSES), _from_drawn(options)
    folder = Path(source)
    if not folder.is_dir():
        raise SourceError("source folder does not exist", got=source, hint=f"give a folder, or '{DRAWN}'")
    if any(folder.glob("*.tar")):
        shards = open_shards(SourceConfig(shards=folder))
        return shards.num_samples, list(shards.classes), _from_tars(folder)
    return _from_folder(folder)


def _from_drawn(options: Options, chunk: int = 100) -> Iterator[Image]:
    starts = range(0, options.count, chunk)
    sizes = [min(chunk, options.count - start) for start in starts]
    seeds = [options.seed] * len(starts)
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[list[tuple[str, bytes, int]]]] = map
        if len(starts) > 1:
            pool = ProcessPoolExecutor(os.cpu_count(), mp_context=worker_context(), initializer=prepare_worker)
            run = stack.enter_context(pool).map
        for part in run(drawn.samples, seeds, starts, sizes):
            yield from (Image(key, "jpg", data, label, key) for key, data, label in part)


def _from_tars(folder: Path) -> Iterator[Image]:
    taken: set[str] = set()
    for shard in open_shards(SourceConfig(shards=folder)).shards:
        members = shard.members()
        for sample, key in enumerate(members.keys):
            data = shard.read(sample)
            # Keys are unique only within a tar: two tars may both start at 000000.
            yield Image(_unique(key, taken), sniff(data), data, int(members.labels[sample]), f"{shard.name}:{key}")


def _from_folder(folder: Path) -> tuple[int, list[str], Iterator[Image]]:
    """Read class sub-folders, labelled in order of their names, or a flat folder without labels."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and p.is_file())
    parts = [path.relative_to(folder).parts for path in paths]
    labelled = bool(parts) and all(len(part) > 1 for part in parts)
    classes = sorted({part[0] for part in parts}) if labelled else []
    number = {name: index for index, name in enumerate(classes)}

    def images() -> Iterator[Image]:
        taken: set[str] = set()
        for path, part in zip(paths, parts, strict=True):
            label = number[part[0]] if labelled else UNLABELLED
            data = path.read_bytes()
            yield Image(_unique(_key_of(part), taken), sniff(data), data, label, str(path.relative_to(folder)))

    return len(paths), classes, images()


def _key_of(parts: tuple[str, ...]) -> str:
    """The relative path without its extension, as UTF-8. Dots are replaced, because a webdataset key ends at a dot."""
    stem = "/".join((*parts[:-1], parts[-1].rpartition(".")[0])).replace(".", "_")
    return stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _unique(stem: str, taken: set[str]) -> str:
    """`stem`, or the first free of `stem-2`, `stem-3`, ...; adds the result to `taken`."""
    key, copy = stem, 1
    while key in taken:
        copy += 1
        key = f"{stem}-{copy}"
    taken.add(key)
    return key


def sniff(data: bytes) -> str:
    """The extension for an image by its content, whatever the name of its file."""
    if data.startswith(b"\x89PNG"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "jpg"
