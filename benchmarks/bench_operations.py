"""A fully augmented view beside timm's: crop, flip, rand-m9-mstd0.5-inc1, erasing 0.25; and every operation alone.

    OMP_NUM_THREADS=1 python benchmarks/bench_operations.py [--shards FOLDER] [--images 200] [--rounds 9] > page.md

All contenders take turns in one process and one thread, without workers, over the same images; ratios are taken within
a round. timm's dataset gets its bytes by our reader. Keep the page under benchmarks/results/. Needs photographs: any
folder of shards.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import provenance
import timm
import torch
from bench_views import Photographs, Timing, consume, measure
from PIL import Image
from timm.data import create_loader, rand_augment_transform
from timm.data.auto_augment import NAME_TO_OP, AugmentOp

from tinymim.configs.sections.augment import AugmentConfig
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.augment import AugmentedViews, policies_of
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.operations.pixels import Pixels
from tinymim.pipeline.operations.registry import OPERATIONS, apply
from tinymim.pipeline.order import view_batches
from tinymim.pipeline.policies import _LEVELS, Constants
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.views import RandomViews, operation_rng

SIZE, BATCH = 224, 50
VIEWS = ViewConfig(size=SIZE, scale=(0.08, 1.0))
AUGMENT = AugmentConfig()  # rand-m9-mstd0.5-inc1, erasing 0.25
CONSTANTS = Constants.of(IMAGENET_MEAN, IMAGENET_STD)
OURS, TIMM_UINT8 = "tinymim", "timm create_loader, uint8, without erasing"
TIMM = "timm create_loader, erased and normalised"
OURS_ONLY, TIMM_ONLY = "tinymim, operations only", "timm, RandAugment only"


def main() -> int:
    parser = argparse.ArgumentParser(description="augmented views per second beside timm")
    parser.add_argument("--shards", type=Path, default=Path("../shared/data/imagenet-sample"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peer, about EXIF data
    allow_posterize_to_nothing()

    shards = open_shards(SourceConfig(shards=flags.shards)).shards
    places = [(number, sample) for number, shard in enumerate(shards) for sample in range(shard.num_samples)]
    places = places[: flags.images]
    shards = shards[: places[-1][0] + 1]
    crops = plain_views(shards, places)
    timings = measure(
        {
            OURS: lambda turn: consume(batch.pixels for batch in ours(shards, places, turn)),
            TIMM: lambda turn: consume(batch for batch, _ in timm_loader(shards, places, uint8=False)),
            TIMM_UINT8: lambda turn: consume(batch for batch, _ in timm_loader(shards, places, uint8=True)),
            OURS_ONLY: lambda turn: our_operations(crops, turn),
            TIMM_ONLY: lambda turn: timms_operations(crops),
        },
        flags.rounds,
    )
    print(header(flags, shards), table(timings), operations_table(crops[0], flags.rounds), sep="\n")
    return 0


def allow_posterize_to_nothing() -> None:
    """Give timm the black image that it had before Pillow 13, which refuses 0 bits; magnitude 10 asks for them."""
    theirs: Any = NAME_TO_OP["PosterizeIncreasing"]

    def posterize(image: Image.Image, bits: int, **rest: Any) -> Image.Image:
        result: Image.Image = theirs(image, bits, **rest) if bits else image.point([0] * 768)
        return result

    NAME_TO_OP.update(PosterizeIncreasing=posterize)


def ours(shards: tuple[Shard, ...], places: list[tuple[int, int]], view: int) -> Iterable[Any]:
    plan = []
    for number in range(len(shards)):
        count = sum(shard == number for shard, _ in places)
        plan += list(view_batches(number, count, [view], BATCH))
    source = ImageViews(shards, RandomViews(VIEWS), seed=0)
    return batches(
        AugmentedViews(source, policies_of(AUGMENT, CONSTANTS), CONSTANTS.fill), plan, LoaderConfig(workers=0)
    )


def timm_loader(shards: tuple[Shard, ...], places: list[tuple[int, int]], uint8: bool) -> Iterable[Any]:
    """timm's training loader; with `uint8` what its PrefetchLoader is fed with, which erases on the device."""
    loader = create_loader(
        Photographs(shards, places),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        scale=VIEWS.scale,
        ratio=VIEWS.ratio,
        hflip=VIEWS.flip,
        auto_augment=AUGMENT.rand_augment,
        re_prob=AUGMENT.erasing,
        re_mode="pixel",
        interpolation="bicubic",
        num_workers=0,
        use_prefetcher=uint8,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    inner: Iterable[Any] = loader.loader if uint8 else loader
    return inner


def plain_views(shards: tuple[Shard, ...], places: list[tuple[int, int]]) -> list[Pixels]:
    """The crops of all images, without operations."""
    source = ImageViews(shards, RandomViews(VIEWS))
    items = np.array([(shard, sample, 0) for shard, sample in places], dtype=np.int64)
    return list(source.batch(items).pixels.numpy())


def our_operations(crops: list[Pixels], turn: int) -> int:
    policies = policies_of(AUGMENT, CONSTANTS)
    for number, pixels in enumerate(crops):
        draws = operation_rng(0, str(number), turn)
        apply(pixels, [step for policy in policies for step in policy.draw(draws, SIZE, SIZE)])
    return len(crops)


def timms_operations(crops: list[Pixels]) -> int:
    options = {"img_mean": CONSTANTS.fill, "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform(str(AUGMENT.rand_augment), options)
    for pixels in crops:
        transform(Image.fromarray(pixels.transpose(1, 2, 0)))
    return len(crops)


def operations_table(pixels: Pixels, rounds: int) -> str:
    """CPU milliseconds of each of RandAugment's operations at magnitude 9, without sign and law."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    options = {"img_mean": CONSTANTS.fill, "interpolation": Image.Resampling.BICUBIC}
    lines = ["", "| operation | tinymim, ms | Pillow, ms | Pillow / tinymim |", "|---" * 4 + "|"]
    for op in rand_augment_transform("rand-m9-inc1", dict(options)).ops:
        name, argument = _LEVELS[op.name]
        value = None if argument is None else argument(0.9, iter(lambda: 0.0, 1.0))
        value = value * SIZE if value is not None and name.startswith("translate") else value
        filled = (CONSTANTS.fill,) if name.startswith(("rotate", "shear", "translate")) else ()
        arguments = () if value is None else (value, *filled)
        peer = AugmentOp(op.name, prob=1.0, magnitude=9, hparams=dict(options))
        calls = [partial(OPERATIONS[name], pixels, *arguments), partial(peer, image)]
        times_ms: list[list[float]] = [[], []]
        for _ in range(rounds):
            for call, found in zip(calls, times_ms, strict=True):
                began_s = time.process_time()
                for _ in range(20):
                    call()
                found.append(1e3 * (time.process_time() - began_s) / 20)
        a, b = (statistics.median(found) for found in times_ms)
        lines.append(f"| {op.name} | {a:.2f} | {b:.2f} | {b / a:.2f} |")
    return "\n".join(lines)


def header(flags: argparse.Namespace, shards: tuple[Shard, ...]) -> str:
    """Where, what and how, as a list."""
    return f"""\
# Augmented views per second, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}, numpy \
{np.__version__}, Pillow {PIL.__version__}, timm {timm.__version__}
- {flags.images} images of {flags.shards.name} to {SIZE} px, scale {VIEWS.scale}, bicubic, flip, \
{AUGMENT.rand_augment}, erasing {AUGMENT.erasing} (pixel), batches of {BATCH}
- {flags.rounds} rounds, all contenders in turn; median, smallest and largest
"""


def table(timings: list[Timing]) -> str:
    """Rates by CPU time, and ratios taken round by round; each peer beside the contender of ours that does as much."""
    by_name = {timing.name: timing.per_cpu_s for timing in timings}
    lines = ["| | views per CPU second | ours over it |", "|---|---|---|"]
    for name, rates in by_name.items():
        mine = by_name[OURS_ONLY if name in (OURS_ONLY, TIMM_ONLY) else OURS]
        ratios = [a / b for a, b in zip(mine, rates, strict=True)]
        cells = [
            f"{statistics.median(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"
            for each, digits in ((rates, 0), (ratios, 2))
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
