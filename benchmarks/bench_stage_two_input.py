"""What the cache costs stage two's input: views replayed from a cache beside the same views drawn from images alone.

    python benchmarks/bench_stage_two_input.py [--data FOLDER_OF_TARS] [--rounds 9] > table.md

Two caches are made first, in a temporary folder: of 4 views, and of 64 in one unit. Their digests are those of the
photographs. Their records are encoded from random q, k, v of a ViT-L's 16 heads and 197 tokens by the default codec, so
that they have the size of a ViT-L's; every shard has the same ones. Then the same batches, in turn:

- in one process without workers, so per core: (a) views alone: read, decode, crop, resize, view keys; (b) stage two's
  whole input: the same with records read, joined and collated and one digest in 16 checked; (c) the same with every
  digest checked, as for the first 4096 views of a run. A round is one pass over all images that reads every slice.
- with 0, 1 and 2 workers: the rate, and what one view costs in CPU time of all processes and in bytes read.

Without photographs at --data nothing is measured. Exit code 1 where (b) is slower than 0.9 of (a), or where two workers
on two idle cores are less than 1.7 times as fast as one. Keep the table under benchmarks/results/.
"""

import argparse
import io
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import provenance
import torch

from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.sections.loader import LoaderConfig, OrderConfig, VerifyConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.configs.taps import Shapes
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.decode import environment
from tinymim.pipeline.joined import CachedSource, join
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import Items, SampleOrder, view_batches
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.storage.blocks import DIGEST, Array
from tinymim.storage.commit import UnitInfo
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.targets.kinds import make_kind

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
NUM_VIEWS, MANY_VIEWS = 4, 64
SHAPES = Shapes(heads=16, head_dim=64, tokens=197, prefix_tokens=1, grid=(14, 14))
LAW = ViewConfig(size=196)
LAYER = "sketch"
# The default law of digests in its two parts: every one of the first 4096 views, and one in 16 after that.
FIRST, STEADY = VerifyConfig(first=10**9), VerifyConfig(first=0)
LEAST = 0.9  # of the views alone
LEAST_SPEEDUP = 1.7  # of two workers over one
LOADER = LoaderConfig(workers=0)
WORKERS = (0, 1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description="stage two's input beside the view pipeline alone")
    parser.add_argument("--data", type=Path, default=DATA / "imagenet-sample", help="folder of tars")
    parser.add_argument("--pattern", default="*.tar", help="which of them")
    parser.add_argument("--images-per-shard", type=int, help="pack the photographs anew; None: the tars as they are")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"no photographs in {args.data} (--data or TINYMIM_DATA name another folder)", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs = SourceConfig(shards=args.data, pattern=args.pattern)
        if args.images_per_shard:
            photographs = repacked(photographs, Path(folder, "shards"), args.images_per_shard)
        source = open_shards(photographs)
        few, many = (make_cache(Path(folder, f"cache{number}"), source, number) for number in (NUM_VIEWS, MANY_VIEWS))
        header(args, few)
        ratio = rates(args, few)
        speedup = by_workers(args, {"4 views": few, "64 views in a unit": many})
        reading({"4 views": few, "64 views in a unit": many}, args)
        mixing(few.source, args.batch)
        memory(args.batch, few)
    return 0 if ratio >= LEAST and (speedup >= LEAST_SPEEDUP or provenance.cores() < max(WORKERS)) else 1


class Cached(NamedTuple):
    """A cache joined with its images."""

    reader: "CountingReader"
    source: CachedSource


class CountingReader(CacheReader):
    """Counts the bytes of the blocks that it reads."""

    bytes_read = 0

    def read_views(
        self, info: UnitInfo, views: Sequence[int] | None = None, arrays: Sequence[str] | None = None
    ) -> dict[str, Array]:
        assert views is not None
        self.bytes_read += sum(info.parts.views[view - info.unit.first_view].size_bytes for view in views)
        return super().read_views(info, views, arrays)


def repacked(photographs: SourceConfig, target: Path, images_per_shard: int) -> SourceConfig:
    """The same images in tars of another size."""
    target.mkdir()
    shards = open_shards(photographs).shards
    images = [(shard, place, key) for shard in shards for place, key in enumerate(shard.members().keys)]
    for start in range(0, len(images), images_per_shard):
        with tarfile.open(target / f"{start:06d}.tar", "w") as tar:
            for shard, place, key in images[start : start + images_per_shard]:
                data = shard.read(place)
                member = tarfile.TarInfo(f"{key}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return SourceConfig(shards=target)


def make_cache(place: Path, source: ShardSet, num_views: int) -> Cached:
    """A cache of these views, each shard's in one unit."""
    shards = [SourceShard(each.name, each.size_bytes, each.num_samples, each.content_hash) for each in source.shards]
    manifest = Manifest(tuple(shards), LAW.identity(), environment())
    config = SketchCodec(name="sketch")
    kind = make_kind(config, 1)
    arrays = {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in kind.specs(SHAPES)}
    teacher = {
        "name": "random",
        "arch": {},
        "shapes": asdict(SHAPES) | {"grid": list(SHAPES.grid)},
        "weights_sha256": "",
        "weights_origin": None,
        "license": None,
        "precision": "fp32",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    target = {
        "taps": [str(tap) for tap in kind.taps],
        "name": kind.name,
        "version": kind.version,
        "parameters": config.model_dump(mode="json"),
        "arrays": arrays,
    }
    layer = Layer(LAYER, manifest.spec_id, teacher, target, environment())
    drawn = ImageViews(source.shards, RandomViews(LAW), LAW.seed)
    records = random_records(max(source.counts))
    with CacheWriter.open(place, manifest, [layer]) as writer:
        for number, shard in enumerate(source.shards):
            unit, keys = UnitId(shard.name, 0, num_views), shard.members().keys
            digests = np.empty((len(keys), num_views), np.uint32)
            for start, items in enumerate(view_batches(number, len(keys), unit.views, 1)):
                digests[start] = drawn.batch(items).stored()[DIGEST]
            with writer.begin(VIEWS, unit, keys) as draft:
                draft.add({DIGEST: digests.T.copy()})
                draft.commit({"unreadable": []})
            with writer.begin(LAYER, unit, keys) as draft:
                for view in unit.views:
                    draft.add({name: each[view % NUM_VIEWS, None, : len(keys)] for name, each in records.items()})
                draft.commit({})
            writer.give_back(unit)
    reader = CountingReader(place)
    return Cached(reader, join(source, reader))


@cache
def random_records(num_images: int) -> dict[str, Array]:
    """Records of NUM_VIEWS views, arrays [V, I, ...]."""
    kind, generator = make_kind(SketchCodec(name="sketch"), 1), torch.Generator().manual_seed(0)
    shape = (8, SHAPES.heads, SHAPES.tokens, SHAPES.head_dim)
    parts: list[dict[str, torch.Tensor]] = []
    for first in range(0, NUM_VIEWS * num_images, 8):
        qkv = tuple(torch.randn(shape, generator=generator) for _ in range(3))
        parts.append(kind.encode({kind.taps[0]: qkv}, torch.arange(first, first + 8)))
    whole = {name: torch.cat([part[name] for part in parts])[: NUM_VIEWS * num_images].numpy() for name in parts[0]}
    return {name: each.reshape(NUM_VIEWS, num_images, *each.shape[1:]) for name, each in whole.items()}


def replayed(cached: Cached, order: SampleOrder, verify: VerifyConfig) -> ReplayedViews:
    reader, source = cached
    arrays = {LAYER: list(reader.layer(LAYER).arrays)}
    return ReplayedViews(reader, reader.manifest, source, arrays, verify, len(order.lanes), order.slices_per_lane)


def order_of(source: CachedSource, batch: int, **config: Any) -> SampleOrder:
    return SampleOrder(source.counts, OrderConfig.model_validate(config), batch, source.num_views)


def rates(args: argparse.Namespace, cached: Cached) -> float:
    """Print the tables; the median over the rounds of (b) / (a) with one view per decode."""
    source = cached.source
    orders = {
        1: order_of(source, args.batch),
        4: order_of(source, args.batch, views_per_decode=4, views_per_epoch="all"),
    }
    laws = {"(a) views alone": None, "(b) whole input": STEADY, "(c) whole input, every digest": FIRST}
    cases = [(k, name) for k in orders for name in laws]
    found: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for number in range(args.rounds + 1):
        for k, order in orders.items():
            one_pass = order.steps_per_epoch * k // (NUM_VIEWS if k > 1 else 1)
            order.step = number * one_pass
            # New ones, so that every round reads all its slices.
            made = {name: None if verify is None else replayed(cached, order, verify) for name, verify in laws.items()}
            seconds = dict.fromkeys(laws, 0.0)
            for place, entry in enumerate(order.plan(order.step + one_pass)):
                # In turn entry by entry: what else the machine does then meets all of them alike.
                names = list(laws)[place % 3 :] + list(laws)[: place % 3]
                for name in names:
                    start = time.process_time()
                    for _ in views_of(source, made[name], [entry], LOADER):
                        pass
                    seconds[name] += time.process_time() - start
            for name in laws if number else ():  # the first round fills the page cache
                found[k, name].append(one_pass * args.batch / seconds[name])
    print("| | views per decode | views/s of CPU time, median | min to max |\n|---|---|---|---|")
    for (k, name), values in found.items():
        print(f"| {name} | {k} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")
    print("\n| ratio of rates, median of the rounds' own | | min to max |\n|---|---|---|")
    alone, steady, checked = laws
    pairs = {
        "(b) / (a), one view per decode": ((1, steady), (1, alone)),
        "(c) / (a), one view per decode": ((1, checked), (1, alone)),
        "(b) / (a), four views per decode": ((4, steady), (4, alone)),
        "(c) / (a), four views per decode": ((4, checked), (4, alone)),
        "four views per decode / one, (b)": ((4, steady), (1, steady)),
    }
    medians = []
    for label, (upper, lower) in pairs.items():
        ratios = [a / b for a, b in zip(found[upper], found[lower], strict=True)]
        medians.append(statistics.median(ratios))
        print(f"| {label} | {medians[-1]:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")
    print(f"\nn = {args.rounds} rounds of one pass over all images, the cases in turn batch by batch.\n")
    return medians[0]


def views_of(
    source: CachedSource, replayed: ReplayedViews | None, plan: Iterable[Items], loader: LoaderConfig
) -> Generator[ViewBatch]:
    """The batches of a plan, from a cache or from the images alone."""
    if replayed is None:
        return batches(ImageViews(source.shards, RandomViews(LAW), LAW.seed), plan, loader)
    return batches(replayed.pixels, plan, loader, rank_part=replayed)


class Cost(NamedTuple):
    """What one view costs."""

    wall_s: float
    cpu_s: float  # of all processes
    own_cpu_s: float  # of it, of the rank's process
    bytes_read: float  # of records and digests


def by_workers(args: argparse.Namespace, caches: dict[str, Cached]) -> float:
    """Print the table by number of workers; the least median over the caches of the speed of two workers over one."""
    found: dict[tuple[str, bool, int], list[Cost]] = {}
    for number in range(args.rounds + 1):
        for label, cached in caches.items():
            order = order_of(cached.source, args.batch)
            order.step = number * order.steps_per_epoch
            for workers in WORKERS:
                for whole in (False, True):
                    views = replayed(cached, order, STEADY) if whole else None
                    cost = pass_cost(cached, views, order, workers)
                    if number:  # the first round fills the page cache
                        found.setdefault((label, whole, workers), []).append(cost)
    print(
        "| cache | input | workers | views/s, median | min to max | CPU ms per view | of it, the rank's | bytes read |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (label, whole, workers), costs in found.items():
        rates = [1 / cost.wall_s for cost in costs]
        cpu = f"{1e3 * statistics.median(cost.cpu_s for cost in costs):.2f}"
        cpu += f" | {1e3 * statistics.median(cost.own_cpu_s for cost in costs):.2f}"
        size = f"{statistics.median(cost.bytes_read for cost in costs):,.0f}"
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        name = "whole input" if whole else "views alone"
        print(f"| {label} | {name} | {workers} | {statistics.median(rates):.0f} | {spread} | {cpu} | {size} |")
    print("\n| cache | input | two workers over one, median of the rounds' own | min to max |\n|---|---|---|---|")
    medians = {}
    for label, whole in dict.fromkeys((label, whole) for label, whole, _ in found):
        pairs = zip(found[label, whole, 1], found[label, whole, 2], strict=True)
        ratios = [one.wall_s / two.wall_s for one, two in pairs]
        medians[label, whole] = statistics.median(ratios)
        name = "whole input" if whole else "views alone"
        print(f"| {label} | {name} | {medians[label, whole]:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")
    print(f"\nn = {args.rounds} rounds of one pass, one view per decode, from the second batch on.\n")
    return min(median for (_, whole), median in medians.items() if whole)


def pass_cost(cached: Cached, views: ReplayedViews | None, order: SampleOrder, workers: int) -> Cost:
    """The cost of a view over one pass, without the start of the workers and the first batch."""
    last = order.step + order.steps_per_epoch
    stream = views_of(cached.source, views, order.plan(last), LoaderConfig(workers=workers))
    cached.reader.bytes_read = 0
    next(stream)
    wall_s, cpu_s, own_s, count = time.perf_counter(), all_cpu_s(), time.process_time(), 0
    for batch in stream:
        count += len(batch.keys)
        if count == (order.steps_per_epoch - 1) * order.batch_size:
            break  # the workers are still there
    wall_s, cpu_s, own_s = time.perf_counter() - wall_s, all_cpu_s() - cpu_s, time.process_time() - own_s
    stream.close()
    return Cost(wall_s / count, cpu_s / count, own_s / count, cached.reader.bytes_read / (count + order.batch_size))


def all_cpu_s() -> float:
    """Seconds of CPU time of this process and its loader workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def reading(caches: dict[str, Cached], args: argparse.Namespace) -> None:
    """Print what a view costs without its pixels: read, checked, unpacked and gathered into batches."""
    print("| cache | CPU µs per view, median | min to max | bytes read per view |\n|---|---|---|---|")
    for label, cached in caches.items():
        order, costs = order_of(cached.source, args.batch), []
        cached.reader.bytes_read = 0
        for number in range(args.rounds):
            order.step = number * order.steps_per_epoch
            views, began = replayed(cached, order, STEADY), time.process_time()
            for _ in views.prepared(order.plan(order.step + order.steps_per_epoch)):
                entry = views._in_flight.popleft()
                views._gathered(entry.items[0], entry.slices, pin_memory=False)
            costs.append((time.process_time() - began) / (order.steps_per_epoch * order.batch_size))
        size = cached.reader.bytes_read / (args.rounds * order.steps_per_epoch * order.batch_size)
        spread = f"{1e6 * min(costs):.1f} to {1e6 * max(costs):.1f}"
        print(f"| {label} | {1e6 * statistics.median(costs):.1f} | {spread} | {size:,.0f} |")
    print(f"\nn = {args.rounds} passes, files in the page cache, tars scanned before.\n")


def mixing(source: CachedSource, batch_size: int) -> None:
    """Print how many distinct images batches and windows of four batches hold, over four views of every image."""
    print("| order | images per batch | distinct | distinct in 4 batches in a row | shards per batch |")
    print("|---|---|---|---|---|")
    cases: dict[str, dict[str, Any]] = {
        "1 view per decode": {"views_per_epoch": "all"},
        "2 views per decode": {"views_per_decode": 2, "views_per_epoch": "all"},
        "4 views per decode": {"views_per_decode": 4, "views_per_epoch": "all"},
    }
    for label, config in cases.items():
        order = order_of(source, batch_size, **config)
        images = [[tuple(row[:2]) for row in items.tolist()] for _, items in order.steps(order.steps_per_epoch)]
        per_batch = statistics.mean(len(set(batch)) for batch in images)
        windows = [list(itertools.chain(*images[start : start + 4])) for start in range(len(images) - 3)]
        in_window = statistics.mean(len(set(window)) for window in windows)
        shards = statistics.mean(len({unit for unit, _ in batch}) for batch in images)
        print(f"| {label} | {batch_size} | {per_batch:.1f} | {in_window:.1f} of {4 * batch_size} | {shards:.1f} |")
    print()


def memory(batch_size: int, cached: Cached) -> None:
    """Print what the rank's process keeps of the cache, beside what the formula says."""
    kinds = cached.reader.layer(LAYER).arrays
    record = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())
    print(f"A record has {record:,} bytes in memory.\n")
    print("| views per decode | shuffle_units | kept: slices x images x bytes | slices in memory, peak |")
    print("|---|---|---|---|")
    for k, shuffle in ((1, 1), (1, 4), (4, 4)):
        order = order_of(cached.source, batch_size, views_per_decode=k, views_per_epoch="all", shuffle_units=shuffle)
        views = replayed(cached, order, STEADY)
        stated = len(order.lanes) * order.slices_per_lane * max(cached.source.counts) * record
        plan = order.plan(2 * order.steps_per_epoch // NUM_VIEWS)
        peak = max(alive_slices(views) for _ in views_of(cached.source, views, plan, LOADER))
        peak *= max(cached.source.counts) * record
        print(f"| {k} | {shuffle} | {mib(stated)} | {mib(peak)} |")
    print("\nWithout workers, 4 entries are requested ahead; at a border of two groups they need the slices of both.\n")
    print("| a loader worker, 1 view per decode | its memory, peak |\n|---|---|")
    order = order_of(cached.source, batch_size)
    for label, made in (("(a) views alone", None), ("(b) whole input", replayed(cached, order, STEADY))):
        print(f"| {label} | {mib(worker_peak(cached.source, made, order))} |")


def alive_slices(views: ReplayedViews) -> int:
    return sum(name.layer == LAYER for name in views._slices._alive)


def worker_peak(source: CachedSource, views: ReplayedViews | None, order: SampleOrder) -> int:
    """Bytes that one worker held at most over an epoch (VmHWM); 0 where the system does not say."""
    peak = 0
    for _ in views_of(source, views, order.plan(order.steps_per_epoch), LoaderConfig(workers=1)):
        for child in multiprocessing.active_children():
            status = Path(f"/proc/{child.pid}/status")
            lines = status.read_text().splitlines() if status.exists() else []
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
    return peak


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def header(args: argparse.Namespace, cached: Cached) -> None:
    source = cached.source
    print(f"# Stage two's input, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"- {provenance.processor()}, {provenance.cores()} cores, 1 thread a process; load {load}; {versions}")
    print(f"- {sum(source.counts)} photographs in {len(source.shards)} shards, views at {LAW.size} px")
    print(f"- codec sketch, default settings, {SHAPES.heads} heads x {SHAPES.tokens} tokens")
    print(f"- batch {args.batch}\n")


if __name__ == "__main__":
    sys.exit(main())
