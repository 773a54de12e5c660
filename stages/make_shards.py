"""`tinymim make-shards SRC DST`: write images to webdataset shards with an index, and report what went in.

Bytes of images are kept, unless `resize_short` shrinks large images, which makes another source.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import webdataset
from torch import Tensor

from tinymim.configs.errors import SourceError, UserError, first_line, naming
from tinymim.pipeline import drawn, labels
from tinymim.pipeline.candidates import COMPRESSED_TAR, Candidate, images_of_tars, walk
from tinymim.pipeline.decode import decode, facts_of
from tinymim.pipeline.index import INDEX_NAME, INDEX_VERSION, read_index
from tinymim.pipeline.members import MembersWriter
from tinymim.pipeline.shards import hash_file
from tinymim.pipeline.survey import Survey
from tinymim.pipeline.tar import IMAGE_EXTENSIONS, UNLABELLED, scan_tar
from tinymim.pipeline.workers import prepare_worker, worker_context
from tinymim.stages.pages.shards import format_report, headline, report_page
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.progress import Meter, logger
from tinymim.storage.atomic import write_bytes_atomic, write_json_atomic

DRAWN = "drawn"  # as SRC: the generated images
Found = tuple[str, bytes | OSError, int, str]  # key, bytes or the error of reading them, class number, origin


@dataclass(frozen=True)
class Image:
    """One image to write to a shard."""

    key: str
    extension: str
    data: bytes
    label: int  # -1: none


@dataclass(frozen=True)
class Options:
    """The options of `make_shards`.

    Attributes:
        images_per_shard: images per tar.
        prefix: first part of the tars' names.
        count: number of images to draw; for drawn images only.
        seed: seed of the drawn images.
        resize_short: largest short side in pixels; 0 keeps the bytes of all images.
        quality: JPEG quality of resized images, 1 to 100.
        labels: where labels come from: `auto`, `folders`, `tars`, `json:FIELD`, `txt` or `none`.
        prefer: ending of the image to take where a sample of a tar has several.
        last_dot: end keys in tars at the last dot.
        report: HTML page to write.
    """

    images_per_shard: int = 1000
    prefix: str = "shard"
    count: int = 2000
    seed: int = 0
    resize_short: int = 0
    quality: int = 95
    labels: str = "auto"
    prefer: str = ""
    last_dot: bool = False
    report: Path | None = None

    def check(self) -> None:
        """Raises SourceError where an option is out of range."""
        for name, value in (("images per shard", self.images_per_shard), ("count", self.count)):
            if value < 1:
                raise SourceError(f"{name} must be at least 1", got=value)
        if self.resize_short < 0:
            raise SourceError("resize-short must be a number of pixels", got=self.resize_short, expected="0: no resize")
        if not 1 <= self.quality <= 100:
            raise SourceError("quality is out of range", got=self.quality, expected="1 to 100")
        if self.prefer and self.prefer not in IMAGE_EXTENSIONS:
            raise SourceError("prefer is no ending of an image", got=self.prefer, expected=", ".join(IMAGE_EXTENSIONS))
        if not self.prefix or "/" in self.prefix or "\0" in self.prefix:
            raise SourceError(
                "prefix is no start of a file name", got=repr(self.prefix), expected="a word, as in shard"
            )
        labels.check_form(self.labels)


def run(source: str | Path, target: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Pack images into webdataset shards. `index.json` is written last, so that a folder with an index is complete.

    Args:
        source: a folder of images, a folder of tars, or the word `drawn`.
        target: a new or empty folder.
        options: see `ShardOptions`; None: its defaults.

    Returns:
        The index, as JSON values: num_samples, shards, unreadable, classes.

    Raises:
        SourceError: there are no readable images, what labels mean is a choice, `target` holds files, or an option is
            out of range.
        Interrupted: a signal stopped the command; no index is written.
    """
    source, target, options = str(source), Path(target), options or Options()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SourceError("target folder is not empty", got=target, hint="give a new folder; nothing was changed")
    options.check()
    if options.report is not None and options.report.parent != target and not options.report.absolute().parent.is_dir():
        raise SourceError("the folder of the report does not exist", got=options.report)

    # ---- find the images and their labels; nothing is written before
    survey = Survey()
    found: Iterator[Found]
    if source == DRAWN:
        total, classes, found = options.count, list(drawn.CLASSES), _from_drawn(options)
        survey.labels = "drawn classes"
    else:
        chosen = _find(source, options, survey)
        total, classes, found = len(chosen.images), list(chosen.classes), _from_candidates(chosen)

    # ---- write the shards
    target.mkdir(parents=True, exist_ok=True)
    rows = _write_shards(found, total, target, options, survey)

    # ---- report
    index = {
        "version": INDEX_VERSION,
        "shards": rows,
        "classes": classes,
        "num_samples": sum(row["num_samples"] for row in rows),
        "unreadable": survey.unreadable,
        "made_by": {"source": source, **recorded(source, options, survey.resized)},
        "report": survey.report(classes),
    }
    write_json_atomic(target / INDEX_NAME, index)
    logger.info(headline(index))
    if source != DRAWN:  # nothing of generated images is left out
        logger.info(format_report(index, target))
    if options.resize_short:
        logger.info(
            f"make-shards: {survey.resized:,} images resized to a short side of {options.resize_short} px and encoded "
            f"again; a cache made from {source} does not fit these shards"
        )
    if options.report is not None:
        write_bytes_atomic(options.report, report_page(index, target).encode())
        logger.info(f"make-shards: the report as a page: {options.report}")
    return index


def recorded(source: str, options: Options, resized: int = 0) -> dict[str, Any]:
    """The options that determine the content of the images, for the index."""
    names = ("images_per_shard", "prefix", "count", "seed") if source == DRAWN else ()
    fields: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.resize_short:
        fields |= {"resize_short": options.resize_short, "quality": options.quality, "resized": resized}
    given = {name: getattr(options, name) for name in ("labels", "prefer", "last_dot")}
    return fields | {name: value for name, value in given.items() if value != getattr(Options, name)}


def _write_shards(
    found: Iterator[Found], total: int, target: Path, options: Options, survey: Survey
) -> list[dict[str, Any]]:
    """Write all shards and their members file. Returns the rows of the index; raises SourceError for no image."""
    rows: list[dict[str, Any]] = []
    with StopFlag() as stop, Meter("make-shards", total, "images") as meter, MembersWriter(target) as members:
        readable = _readable(found, options, survey, meter, stop)
        for number, first in enumerate(readable):
            path = target / f"{options.prefix}-{number:06d}.tar"
            count = _write_shard(path, first, readable, options.images_per_shard)
            status, content_hash = path.stat(), hash_file(path)
            size_bytes = status.st_size
            with open(path, "rb") as file:
                held = scan_tar(file, path.name, size_bytes)
            members.add(path.name, size_bytes, content_hash, status.st_mtime_ns, held)
            identity = {"size_bytes": size_bytes, "num_samples": count, "content_hash": content_hash}
            rows.append({"name": path.name, **identity})
        if not rows:
            raise SourceError(
                "no image can be read",
                got=f"{len(survey.unreadable)} unreadable, the first: {survey.unreadable[0]}",
                expected="images",
            )
    return rows


def _readable(
    found: Iterator[Found], options: Options, survey: Survey, meter: Meter, stop: StopFlag
) -> Iterator[Image]:
    """The readable images, resized if `options` requires it. Counts all of them in `survey`."""
    for key, data, label, origin in found:
        if stop.requested:
            raise Interrupted("no index written; remove the folder and restart")
        meter.advance(1)
        if isinstance(data, OSError):
            survey.fail(origin, first_line(data))
            continue
        try:
            pixels, facts = decode(data), facts_of(data)
        except SourceError as error:
            survey.fail(origin, str(error.got))
            continue
        survey.take(facts, len(data), label)
        image = Image(key, facts.extension, data, label)
        if 0 < options.resize_short < min(pixels.shape[1:]):
            survey.resized += 1
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
    with naming(path), open(partial, "wb") as file:
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


def _find(source: str, options: Options, survey: Survey) -> labels.Labelled:
    """The images of a folder or of its tars, with their labels. Raises SourceError as `run`."""
    folder = Path(source)
    if not folder.is_dir():
        hint = "give the folder of the tars" if folder.suffix == ".tar" else f"give a folder, or '{DRAWN}'"
        raise SourceError("source folder does not exist", got=source, hint=hint)
    walked = walk(folder, survey)
    if walked.tars and walked.images:
        raise SourceError(
            f"{source} holds both tars and images",
            got=f"{walked.tars[0].name} and {walked.images[0].origin}",
            expected="a folder of tars, or a folder of images",
            hint="move the tars, or the images, to a folder of their own",
        )
    if walked.tars:
        images = images_of_tars(folder, walked.tars, survey, options.prefer, options.last_dot)
        classes = read_index(folder).get("classes", [])
    else:
        images, classes = walked.images, []
    if not images:
        raise _nothing_found(source, survey)
    if walked.tars:
        return labels.of_tars(images, classes, options.labels, survey)
    return labels.of_folder(folder, images, walked.pictures, options.labels, survey)


def _nothing_found(source: str, survey: Survey) -> SourceError:
    seen = ", ".join(f"{count} .{kind}" for kind, count in survey.seen.most_common(8)) or "an empty folder"
    archives = [first for _, first in survey.skipped.values() if first.endswith((".tar", *COMPRESSED_TAR))]
    hint = None
    if archives and archives[0].endswith(COMPRESSED_TAR):
        hint = "decompress the tars first; images gain nothing"
    elif archives and "/" in archives[0]:
        hint = f"give the folder of the tars: `tinymim make-shards {(Path(source) / archives[0]).parent} DST`"
    elif survey.seen["tar"]:
        hint = f"{archives[0]} holds tars: unpack it, and give the folder of the tars in it"
    return SourceError(
        f"no images found in {source}",
        got=seen,
        expected=f"files ending in {', '.join(IMAGE_EXTENSIONS)}, or tars of them",
        hint=hint,
    )


def _from_drawn(options: Options, chunk: int = 100) -> Iterator[Found]:
    starts = range(0, options.count, chunk)
    sizes = [min(chunk, options.count - start) for start in starts]
    seeds = [options.seed] * len(starts)
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[list[tuple[str, bytes, int]]]] = map
        if len(starts) > 1:
            pool = ProcessPoolExecutor(os.cpu_count(), mp_context=worker_context(), initializer=prepare_worker)
            run = stack.enter_context(pool).map
        try:
            for part in run(drawn.samples, seeds, starts, sizes):
                yield from ((key, data, label, key) for key, data, label in part)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that draws images was killed",
                hint="where memory is short, the system kills processes (`dmesg` shows it); remove what was written "
                "and run the same command again",
            ) from error


def _from_candidates(chosen: labels.Labelled) -> Iterator[Found]:
    taken: set[str] = set()
    image: Candidate
    for image, label in zip(chosen.images, chosen.labels, strict=True):
        # Keys repeat where two files differ in their ending only, and in two tars that both start at 000000.
        key = _unique(image.key, taken)
        try:
            yield key, image.read(), label, image.origin
        except OSError as error:
            yield key, error, label, image.origin


def _unique(stem: str, taken: set[str]) -> str:
    """`stem`, or the first free of `stem-2`, `stem-3`, ...; adds the result to `taken`."""
    key, copy = stem, 1
    while key in taken:
        copy += 1
        key = f"{stem}-{copy}"
    taken.add(key)
    return key
