"""`tinymim make-shards SRC DST`: images -> webdataset shards + an index. Image bytes are kept as they are, or, with
`resize_short`, large images are made smaller: other pixels, another source.
"""

import contextlib
import io
import json
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
from tinymim.stages.run.progress import Meter, say
from tinymim.storage.atomic import write_json_atomic

DRAWN = "drawn"  # the SRC word for the embedded image set


@dataclass(frozen=True)
class Image:
    """One image on its way into a shard."""

    key: str
    extension: str
    data: bytes
    label: int  # -1: none
    origin: str  # where it came from, for the list of unreadable images


@dataclass(frozen=True)
class Options:
    """Flags of the command; `count` and `seed` are for SRC = drawn only."""

    images_per_shard: int = 1000
    prefix: str = "shard"
    count: int = 2000
    seed: int = 0
    resize_short: int = 0  # pixels; 0: every image keeps its bytes
    quality: int = 95  # of the JPEGs that resize_short makes


def run(source: str, target: Path, options: Options) -> dict[str, Any]:
    """Write shards and `index.json`; the index comes last, so a folder with an index is complete.

    Returns:
        the index.

    Raises:
        SourceError: no images; or `target` already holds files.
        Interrupted: stopped by a signal; no index is written.
    """
    if target.exists() and any(target.iterdir()):
        raise SourceError("target folder is not empty", got=target, hint="give a new folder; nothing was changed")
    if options.images_per_shard < 1:
        raise SourceError("images per shard must be at least 1", got=options.images_per_shard)
    if options.resize_short < 0:
        raise SourceError("resize-short must be a number of pixels", got=options.resize_short, expected="0: no resize")
    if not 1 <= options.quality <= 100:
        raise SourceError("quality is no JPEG quality", got=options.quality, expected="1 to 100")
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
    say(f"make-shards: {index['num_samples']:,} images in {len(rows)} shards, {len(unreadable)} unreadable")
    if options.resize_short:
        say(
            f"make-shards: {len(resized):,} images resized to a short side of {options.resize_short} px and encoded "
            f"anew: this is another source than {source}, and a cache of one does not fit the other"
        )
    for row in unreadable[:10]:
        say(f"  unreadable: {row['origin']}: {row['reason']}")
    return index


def recorded(source: str, options: Options, resized: int = 0) -> dict[str, Any]:
    """The options that decide what is in the images, for the index."""
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
    """Images that decode, resized where `options` says so; the keys of those and the unreadable ones are listed."""
    for image in images:
        if stop.requested:
            raise Interrupted("no index written; remove the folder and start again")
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
    """A JPEG whose short side is `short` pixels, by Lanczos; chroma 4:2:0, whose decoding is the fastest; no EXIF.

    Args:
        pixels: uint8 [3, height, width], both sides longer than `short`.
        short: pixels.
        quality: 1 to 100.
    """
    height, width = pixels.shape[1:]
    scale = short / min(height, width)
    image = PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    smaller = image.resize((round(width * scale), round(height * scale)), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    smaller.save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _write_shard(path: Path, first: Image, rest: Iterator[Image], most: int) -> int:
    """Write up to `most` images; a finished tar appears by rename."""
    partial = path.with_suffix(".tar.partial")
    count = 0
    with open(partial, "wb") as file:
        # Fixed time and owner: the same images give the same bytes.
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
    """Number of images, class names and the images, in a fixed order."""
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
        for part in run(drawn.sample_list, seeds, starts, sizes):
            yield from (Image(key, "jpg", data, label, key) for key, data, label in part)


def _from_tars(folder: Path) -> Iterator[Image]:
    taken: set[str] = set()
    for shard in open_shards(SourceConfig(shards=folder)).shards:
        members = shard.members()
        for sample, key in enumerate(members.keys):
            data = shard.read(sample)
            # Keys are unique within a tar only; two tars may both start at 000000.
            yield Image(_unique(key, taken), sniff(data), data, int(members.labels[sample]), f"{shard.name}:{key}")


def _from_folder(folder: Path) -> tuple[int, list[str], Iterator[Image]]:
    """Class sub-folders (labels by sorted folder name), or a flat unlabelled folder."""
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
    """The relative path without its extension; dots would end a webdataset key early, keys are UTF-8."""
    stem = "/".join((*parts[:-1], parts[-1].rpartition(".")[0])).replace(".", "_")
    return stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _unique(stem: str, taken: set[str]) -> str:
    """`stem`, or `stem-2`, `stem-3`, ... where it is taken; adds the result to `taken`."""
    key, copy = stem, 1
    while key in taken:
        copy += 1
        key = f"{stem}-{copy}"
    taken.add(key)
    return key


def sniff(data: bytes) -> str:
    """The extension that the bytes deserve, whatever the file was called."""
    if data.startswith(b"\x89PNG"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "jpg"


def print_index(index: dict[str, Any]) -> str:
    """The index as JSON text."""
    return json.dumps(index, indent=1)
