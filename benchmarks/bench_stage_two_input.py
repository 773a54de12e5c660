"""What the cache costs stage two's input: views replayed from a cache beside the same views drawn from images alone.

    python benchmarks/bench_stage_two_input.py [--data FOLDER_OF_TARS] [--rounds 9] > table.md

A cache is made first, in a temporary folder: a random teacher of two narrow blocks with ViT-L's 16 heads and 197 tokens
(196 px, patch 14), so that its records have the size of a ViT-L's; default codec, four views. Then, in one process
without workers, so per core, and in turn, the same batches: (a) views alone: read, decode, crop, resize,
view keys; (b) stage two's whole input: the same with records read, joined and collated and one digest in 16 checked;
(c) the same with every digest checked, as for the first 4096 views of a run. A round is one pass over all images that
reads every unit. Without photographs at --data nothing is measured. Exit code 1 where (b) is slower than 0.9 of (a).
Keep the table under benchmarks/results/.
"""

import argparse
import gc
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import provenance
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.configs.sections import LoaderConfig, OrderConfig, SourceConfig, VerifyConfig, ViewConfig
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.dataset import ImageViews, ViewSource
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import CachedSource, ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import stored_kind

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
NUM_VIEWS, TOKENS, HEADS = 4, 197, 16
STATED = Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()
TEACHER: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 196,
    "patch_size": 14,
    "embed_dim": 128,
    "depth": 2,
    "num_heads": HEADS,
}
# The default law of digests in its two parts: every one of the first 4096 views, and one in 16 after that.
FIRST, STEADY = VerifyConfig(first=10**9), VerifyConfig(first=0)
LEAST = 0.9  # of the views alone
LOADER = LoaderConfig(workers=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="stage two's input beside the view pipeline alone")
    parser.add_argument("--data", type=Path, default=DATA / "imagenet-sample", help="folder of tars")
    parser.add_argument("--pattern", default="*.tar", help="which of them")
    parser.add_argument("--images-per-shard", type=int, help="pack the photographs anew; None: the tars as they are")
    parser.add_argument(
        "--views-per-unit",
        type=int,
        default=NUM_VIEWS,
        choices=[1, 2, 4],
        help="number of views that the cache grows by at a time",
    )
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
        recipe = make_cache(Path(folder), photographs, args.views_per_unit)
        assert recipe.cache is not None
        reader = CacheReader(recipe.cache)
        source = join(open_shards(recipe.source), reader)
        header(args, reader, source)
        ratio = rates(args, recipe, reader, source)
        mixing(source, args.batch)
        memory(args.batch, reader, source)
    return 0 if ratio >= LEAST else 1


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


def make_cache(root: Path, source: SourceConfig, views_per_unit: int) -> CacheTeacherRecipe:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    save_file(
        timm.create_model(TEACHER["name"], num_classes=0, **sizes).state_dict(), root / "teacher.safetensors", STATED
    )
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": source,
        "views": {"size": TEACHER["img_size"]},
        "teacher": TEACHER | {"block": 2, "weights": str(root / "teacher.safetensors")},
        "cache": root / "cache",
        "batch_size": 16,
        "audit_views": 0,
        "max_unreadable": 1.0,
        "loader": {"workers": 0},
        "run": {"folder": root / "run", "device": "cpu", "threads": 1},
    }
    for num_views in range(views_per_unit, NUM_VIEWS + 1, views_per_unit):
        recipe = CacheTeacherRecipe.model_validate(fields | {"num_views": num_views})
        cache_teacher.run(recipe)
    return recipe


def replayed(reader: CacheReader, source: CachedSource, order: SampleOrder, verify: VerifyConfig) -> ReplayedViews:
    manifest = reader.manifest
    arrays = [spec.name for spec in stored_kind(manifest.codec, manifest.block).specs(manifest.shapes)]
    resident = order.resident_units(source.units_per_shard)
    return ReplayedViews(reader, source, arrays, verify, resident)


def order_of(source: CachedSource, batch: int, **config: Any) -> SampleOrder:
    return SampleOrder(source.counts, OrderConfig.model_validate(config), batch, NUM_VIEWS)


def rates(args: argparse.Namespace, recipe: CacheTeacherRecipe, reader: CacheReader, source: CachedSource) -> float:
    """Print the tables; the median over the rounds of (b) / (a) with one view per decode."""
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
            # New ones, so that every round reads all its units.
            made: dict[str, ViewSource] = {
                name: ImageViews(source.shards, RandomViews(recipe.views), recipe.views.seed)
                if verify is None
                else replayed(reader, source, order, verify)
                for name, verify in laws.items()
            }
            seconds = dict.fromkeys(laws, 0.0)
            for place, entry in enumerate(order.plan(order.step + one_pass)):
                # In turn entry by entry: what else the machine does then meets all of them alike.
                names = list(laws)[place % 3 :] + list(laws)[: place % 3]
                for name in names:
                    start = time.process_time()
                    for _ in batches(made[name], [entry], LOADER):
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


def memory(batch_size: int, reader: CacheReader, source: CachedSource) -> None:
    """Print what a process keeps of the cache, beside what the formula says."""
    record = sum(bytes_of_records(reader).values())
    print(f"A record has {record:,.0f} bytes in memory.\n")
    print("| views per decode | shuffle_units | stated | resident, peak | of Python's allocator, peak |")
    print("|---|---|---|---|---|")
    for k, shuffle in ((1, 1), (1, 4), (4, 4)):
        order = order_of(source, batch_size, views_per_decode=k, views_per_epoch="all", shuffle_units=shuffle)
        views = replayed(reader, source, order, STEADY)
        largest = max(source.counts)
        in_use = min(k, max(info.unit.num_views for info in reader.units()))
        stated = order.resident_units(source.units_per_shard) * largest * in_use * record
        gc.collect()
        tracemalloc.start()
        peak = 0
        for entry in order.plan(2 * order.steps_per_epoch // NUM_VIEWS):
            views.batch(entry.reshape(-1, entry.shape[2]))
            held = list(views._resident.values())
            peak = max(peak, sum(array.nbytes for unit in held for array in unit.arrays.values()))
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"| {k} | {shuffle} | {mib(stated)} | {mib(peak)} | {mib(traced)} |")
    print("\n| a loader worker, 1 view per decode | its memory, peak |\n|---|---|")
    order = order_of(source, batch_size)
    alone = ImageViews(source.shards, RandomViews(ViewConfig(size=TEACHER["img_size"])))
    for label, made in (("(a) views alone", alone), ("(b) whole input", replayed(reader, source, order, STEADY))):
        print(f"| {label} | {mib(worker_peak(made, order))} |")


def worker_peak(source: ViewSource, order: SampleOrder) -> int:
    """Bytes that one worker held at most over an epoch (VmHWM); 0 where the system does not say."""
    peak = 0
    for _ in batches(source, order.plan(order.steps_per_epoch), LoaderConfig(workers=1)):
        for child in multiprocessing.active_children():
            status = Path(f"/proc/{child.pid}/status")
            lines = status.read_text().splitlines() if status.exists() else []
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
    return peak


def bytes_of_records(reader: CacheReader) -> dict[str, float]:
    """Bytes per record by array, decompressed."""
    unit = reader.read_unit(reader.units()[0])
    return {name: array.nbytes / len(array) for name, array in unit.arrays.items()}


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def header(args: argparse.Namespace, reader: CacheReader, source: CachedSource) -> None:
    print(f"# Stage two's input, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"- {provenance.processor()}, {provenance.cores()} cores, 1 thread; {versions}")
    shards = f"{len(source.shards)} shards"
    print(f"- {sum(source.counts)} photographs in {shards}, {NUM_VIEWS} views at {TEACHER['img_size']} px")
    codec = reader.manifest.codec["name"]
    print(f"- codec {codec}, default settings, {HEADS} heads x {TOKENS} tokens; units of {args.views_per_unit} views")
    print(f"- batch {args.batch}; no workers\n")


if __name__ == "__main__":
    sys.exit(main())
