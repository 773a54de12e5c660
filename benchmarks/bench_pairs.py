"""The cost of pairs: strong views of single images, and mixed with partners that are in the same batch or in none.

    tinymim make-shards ../shared/data/imagenet-sample runs/one-shard      # so that few partners meet by chance
    OMP_NUM_THREADS=1 python benchmarks/bench_pairs.py [--shards FOLDER] [--images 200] [--rounds 5] > page.md

One process and one thread, without workers; all contenders take turns over images of one shard. Keep the page under
benchmarks/results/. Needs photographs.
"""

import argparse
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import numpy as np
import provenance
import torch
from bench_views import measure

from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.views import RandomViews

BATCH = 50
LAW = {"size": 224, "scale": [0.08, 1.0], "operations": {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}}
SINGLE = RandomViews(ViewConfig.model_validate(LAW))
PAIRS = RandomViews(ViewConfig.model_validate(LAW | {"pairs": {}}))


def main() -> int:
    parser = argparse.ArgumentParser(description="mixed views per second beside single ones")
    parser.add_argument("--shards", type=Path, default=Path("runs/one-shard"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    [shard, *_] = open_shards(SourceConfig(shards=flags.shards)).shards
    count = min(flags.images, shard.num_samples)
    cases = {
        "single images": (SINGLE, 1, False),
        "pairs, partners in the batch": (PAIRS, 1, True),
        f"pairs, random batches of {BATCH}": (PAIRS, 1, False),
        "single images, 8 views a decode": (SINGLE, 8, False),
        f"pairs, random batches of {BATCH}, 8 views a decode": (PAIRS, 8, False),
    }
    timings = measure(
        {name: lambda turn, case=case: views(shard, count, turn, *case) for name, case in cases.items()}, flags.rounds
    )
    print(f"""\
# Mixed views per second, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}, numpy \
{np.__version__}
- {count} of {shard.num_samples} images of {flags.shards.name} to 224 px, scale (0.08, 1.0), rand-m9-mstd0.5-inc1, \
erasing 0.25
- {flags.rounds} rounds, all contenders in turn; median, smallest and largest

| | views per CPU second | single images over it |
|---|---|---|""")
    for at, timing in enumerate(timings):
        first = timings[0 if at < 3 else 3].per_cpu_s
        ratios = [a / b for a, b in zip(first, timing.per_cpu_s, strict=True)]
        cells = [
            f"{statistics.median(each):.{digits}f} ({min(each):.{digits}f} to {max(each):.{digits}f})"
            for each, digits in ((timing.per_cpu_s, 0), (ratios, 2))
        ]
        print(f"| {timing.name} | {cells[0]} | {cells[1]} |")
    return 0


def views(shard: Shard, count: int, turn: int, law: RandomViews, together: int, meet: bool) -> int:
    """Render `together` views of `count` images in batches of BATCH; with `meet`, in the order of the pairs."""
    source = ImageViews((shard,), law, 0)
    order = np.random.default_rng(turn).permutation(shard.num_samples)
    if meet:
        partners = pairs_in(source, turn)
        order = np.array([each for one in order.tolist() for each in (one, partners[one]) if one <= partners[one]])
    for start in range(0, count, BATCH):
        samples = np.repeat(order[start : min(start + BATCH, count)], together)
        numbers = np.tile(np.arange(together) + turn * together, len(samples) // together)
        source.batch(np.stack([np.zeros_like(samples), samples, numbers], axis=1))
    return count * together


def pairs_in(source: ImageViews, view: int) -> list[int]:
    """The partners of all images in a view."""
    from tinymim.pipeline.dataset import pairs_of

    assert source.law.pairs is not None
    partners: list[int] = pairs_of(source.shards[0], source.law.pairs.seed, view)[0].tolist()
    return partners


if __name__ == "__main__":
    sys.exit(main())
