"""The view pipeline beside timm's and webdataset's: full-size JPEGs to random crops of 224 px, the same crop law.

    OMP_NUM_THREADS=1 python benchmarks/bench_views.py [--shards FOLDER] [--images 300] [--repeats 7] > page.md

All contenders take turns in one process and one thread, without workers, over the same images; ratios are taken within
a round. timm's dataset gets its bytes by our reader, so that only decoding, cropping and batching differ. Keep the page
under benchmarks/results/. Needs photographs: any folder of shards.
"""

import argparse
import io
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import provenance
import simplejpeg
import timm
import torch
import torchvision
import webdataset
from PIL import Image
from timm.data import create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import decode, jpeg_size, pixel_digest, render
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.views import RandomViews, reduced, reduction_of, view_key

SIZE, BATCH = 224, 50
VIEWS = ViewConfig(size=SIZE)  # scale (0.2, 1), ratio (3/4, 4/3), bicubic, flip 0.5
OURS, OURS_4, LIMIT = "tinymim", "tinymim, 4 views of an image", "the decoder alone (libjpeg-turbo)"
TIMM = "timm create_loader, uint8"


class Timing(NamedTuple):
    """Views per second over the repeats, by CPU time of this process and by the clock."""

    name: str
    per_cpu_s: list[float]
    per_wall_s: list[float]


class Photographs(Dataset[Any]):
    """What timm's ImageDataset does with a file, on the bytes of a shard."""

    def __init__(self, shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> None:
        self.shards, self.places = shards, places
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard, sample = self.places[index]
        image = Image.open(io.BytesIO(self.shards[shard].read(sample))).convert("RGB")
        assert self.transform is not None
        return self.transform(image), 0


def main() -> int:
    parser = argparse.ArgumentParser(description="views per second beside timm and webdataset")
    parser.add_argument("--shards", type=Path, default=Path("../shared/data/imagenet-sample"))
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peers, about EXIF data

    shards = open_shards(SourceConfig(shards=flags.shards)).shards
    places = [(number, sample) for number, shard in enumerate(shards) for sample in range(shard.num_samples)]
    places = places[: flags.images]
    shards = shards[: places[-1][0] + 1]
    timings = measure(contenders(shards, places), flags.repeats)
    print(header(flags, shards, places), table(timings), parts_table(shards, places, flags.repeats), sep="\n")
    return 0


def contenders(shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> dict[str, Callable[[int], int]]:
    """By name: a function of the round's number that makes its views and returns how many."""
    return {
        OURS: lambda turn: consume(batch.pixels for batch in ours(shards, places, [turn])),
        OURS_4: lambda turn: consume(
            batch.pixels for batch in ours(shards, places, list(range(4 * turn, 4 * turn + 4)))
        ),
        TIMM: lambda turn: consume(batch for batch, _ in timm_loader(shards, places, uint8=True)),
        "timm create_loader, normalised fp32": lambda turn: consume(
            batch for batch, _ in timm_loader(shards, places, uint8=False)
        ),
        "webdataset + torchvision v2 on Pillow images": lambda turn: consume(
            wds_loader(shards, len(places), tensors=False)
        ),
        "webdataset + torchvision v2 on tensors": lambda turn: consume(wds_loader(shards, len(places), tensors=True)),
        LIMIT: lambda turn: decode_all(shards, places),
    }


def ours(shards: tuple[Shard, ...], places: list[tuple[int, int]], views: list[int]) -> Iterator[Any]:
    plan = []
    for number in range(len(shards)):
        count = sum(shard == number for shard, _ in places)
        plan += list(view_batches(number, count, views, BATCH))
    return batches(ImageViews(shards, RandomViews(VIEWS)), plan, LoaderConfig(workers=0))


def timm_loader(shards: tuple[Shard, ...], places: list[tuple[int, int]], uint8: bool) -> Iterable[Any]:
    """timm's training loader; with `uint8` what its PrefetchLoader is fed with, which normalises on the device."""
    loader = create_loader(
        Photographs(shards, places),  # type: ignore[arg-type]
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        scale=VIEWS.scale,
        ratio=VIEWS.ratio,
        hflip=VIEWS.flip,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=0,
        use_prefetcher=uint8,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    inner: Iterable[Any] = loader.loader if uint8 else loader
    return inner


def wds_loader(shards: tuple[Shard, ...], images: int, tensors: bool) -> Iterator[Any]:
    crop = v2.RandomResizedCrop(
        SIZE, VIEWS.scale, VIEWS.ratio, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    flip = v2.RandomHorizontalFlip(VIEWS.flip)
    transform = v2.Compose([v2.ToImage(), crop, flip] if tensors else [crop, flip, v2.ToImage()])
    data = (
        webdataset.WebDataset([str(shard.path) for shard in shards], shardshuffle=False, empty_check=False)
        .decode("pilrgb")
        .to_tuple("jpg")
        .map_tuple(transform)
    )
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH)
    made = 0
    for (batch,) in loader:
        yield batch
        made += len(batch)
        if made >= images:
            return


def consume(produced: Iterable[torch.Tensor]) -> int:
    return sum(len(batch) for batch in produced)


def decode_all(shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> int:
    for shard, sample in places:
        simplejpeg.decode_jpeg(shards[shard].read(sample), "RGB")
    return len(places)


def measure(paths: dict[str, Callable[[int], int]], repeats: int) -> list[Timing]:
    """Every path in turn, `repeats` times, after one round that fills caches."""
    timings = [Timing(name, [], []) for name in paths]
    for turn in range(-1, repeats):
        for timing, path in zip(timings, paths.values(), strict=True):
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            made = path(max(turn, 0))
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            if turn >= 0:
                timing.per_cpu_s.append(made / cpu_s)
                timing.per_wall_s.append(made / wall_s)
    return timings


def parts(shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> dict[str, float]:
    """CPU milliseconds per view of every part of our pipeline, each in a loop of its own."""
    law, loops = RandomViews(VIEWS), dict[str, float]()

    def timed(name: str, call: Callable[[int], Any]) -> list[Any]:
        began_s = time.process_time()
        results = [call(index) for index in range(len(places))]
        loops[name] = 1e3 * (time.process_time() - began_s) / len(places)
        return results

    data = timed("read from the tar", lambda i: shards[places[i][0]].read(places[i][1]))
    sizes = timed("header", lambda i: jpeg_size(data[i]))
    keys = [shards[shard].members().keys[sample] for shard, sample in places]
    boxes = timed("view law", lambda i: law(keys[i], 0, *(sizes[i] or decode(data[i]).shape[1:])))
    factors = [reduction_of(box, SIZE) if size else 1 for box, size in zip(boxes, sizes, strict=True)]
    images = timed("decode", lambda i: decode(data[i], factors[i], boxes[i].top + boxes[i].height))
    boxes = [reduced(box, k) if k > 1 else box for box, k in zip(boxes, factors, strict=True)]
    views = timed("crop, resize, flip", lambda i: render(images[i], boxes[i], SIZE, VIEWS.interpolation))
    out = torch.empty((len(places), 3, SIZE, SIZE), dtype=torch.uint8)
    timed("into the batch", lambda i: out[i].copy_(views[i]))
    timed("identity of the view", lambda i: view_key(0, keys[i], 0))
    timed("digest (all of stage one, a sample of stage two)", lambda i: pixel_digest(out[i]))
    return loops


def parts_table(shards: tuple[Shard, ...], places: list[tuple[int, int]], repeats: int) -> str:
    runs = [parts(shards, places) for _ in range(repeats)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    whole = sum(medians.values())
    lines = ["", "| part of ours | CPU ms per view | share |", "|---|---|---|"]
    lines += [f"| {name} | {ms:.3f} | {ms / whole:.1%} |" for name, ms in medians.items()]
    return "\n".join([*lines, f"| sum | {whole:.3f} | |"])


def header(flags: argparse.Namespace, shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> str:
    """Where, what and how, as a list."""
    sizes = [jpeg_size(shards[shard].read(sample)) for shard, sample in places]
    megapixels = np.median([height * width / 1e6 for height, width in filter(None, sizes)])
    return f"""\
# Views per second, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, 1 thread; Python {platform.python_version()}, \
torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, \
simplejpeg {simplejpeg.__version__}, timm {timm.__version__}, webdataset {webdataset.__version__}
- {len(places)} images of {flags.shards.name} (median {megapixels:.2f} megapixels) to {SIZE} px, scale {VIEWS.scale}, \
bicubic with antialias, flip, batches of {BATCH}
- {flags.repeats} rounds, all contenders in turn; median, smallest and largest
"""


def table(timings: list[Timing]) -> str:
    """Rates, and ratios taken round by round."""
    by_name = {timing.name: timing for timing in timings}
    lines = [
        "| | views per CPU second | views per second | ours over it | ours with 4 views over it |",
        "|---" * 5 + "|",
    ]
    for timing in timings:
        ratios = [_ratio(by_name[name].per_cpu_s, timing.per_cpu_s) for name in (OURS, OURS_4)]
        rates = [_spread(timing.per_cpu_s), _spread(timing.per_wall_s)]
        lines.append("| " + " | ".join([timing.name, *rates, *ratios]) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _ratio(ours_: list[float], theirs: list[float]) -> str:
    ratios = [a / b for a, b in zip(ours_, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
