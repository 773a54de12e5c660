"""What reading a cache costs beside reading its bytes: `CacheReader.read_unit` on one core, and where its time goes.

    python benchmarks/bench_reader.py [--caches 10x128 100x128 1000x128 10x1024] [--rounds 7] > table.md

Caches of N units of M records each, of the default sketch at ViT-L's size (16 heads x 64 rows x 8 draws of 197
tokens, two relations) are written first, in a temporary folder: relations of real images where the recipe
`imagenet-sample-cache` finds its teacher and shards, else of random q, k and v; every unit holds the same records under
other keys. Then, on one CPU, rounds of: the same units, drawn anew over the whole cache, read by `read_unit` with and
without digests and raw (`preadv` of every payload file into one buffer; a memory map of it, summed), the ways in turn,
with the files in the page cache and again with all of them dropped from it before each way (posix_fadvise; mincore says
how much stayed). Last, the parts of a read, one by one on the same bytes, and digests that could be taken instead.
Exit code 1 where the rate or the share of a JPEG's decoding misses its target; the share of raw reading depends on the
disk and is only stated. Keep the table under benchmarks/results/.
"""

import argparse
import ctypes
import hashlib
import mmap
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import provenance
import torch
import zarr
from real_records import HEADS, TOKENS, make_records

from tinymim.configs.sections import SourceConfig, ViewConfig
from tinymim.pipeline.decode import decode
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import DIGEST, View, to_arrays
from tinymim.storage import commit, layout
from tinymim.storage.atomic import digest_hex
from tinymim.storage.commit import UnitInfo, key_digest
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter

Arrays = dict[str, npt.NDArray[Any]]

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
JPEGS = 150
WAYS = ("read_units", "read_unit", "read_unit, verify=True", "raw preadv", "raw mmap and sum")
TEACHER = {
    "name": "vit_large_patch16_224",
    "arch": {},
    "weights_sha256": "",
    "weights_origin": "",
    "license": "",
    "block": 18,
    "heads": HEADS,
    "head_dim": 64,
    "tokens": TOKENS,
    "prefix_tokens": 1,
    "grid": (14, 14),
    "precision": "fp32",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
# The targets: share of raw reading from the disk, records per second and core, share of decoding a JPEG.
LEAST_OF_RAW, LEAST_RATE, MOST_OF_DECODE = 0.5, 20_000, 0.05


@dataclass(frozen=True)
class Pass:
    """One way over some units: records, seconds of wall clock and of CPU time."""

    records: int
    wall_s: float
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description="the cache reader beside raw reads")
    parser.add_argument("--caches", nargs="+", default=["10x128", "100x128", "1000x128", "10x1024"], metavar="UxR")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units-per-pass", type=int, default=10)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of shards and teacher")
    args = parser.parse_args()
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "sched_setaffinity"):
        print("this system lets nobody empty the page cache or choose a CPU: nothing is measured", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    sizes = [tuple(map(int, cache.split("x"))) for cache in args.caches]
    with tempfile.TemporaryDirectory() as folder:
        codec_arrays, source = make_records(args.data, max(records for _, records in sizes))
        caches = {}
        for label, (units, records) in zip(args.caches, sizes, strict=True):
            caches[label] = Path(folder, label)
            make_cache(caches[label], units, {name: values[:records] for name, values in codec_arrays.items()})
        with one_cpu():
            header(args, source)
            opening(caches, args.rounds)
            readers = {label: CacheReader(path) for label, path in caches.items()}
            warm = rates(args, readers, cold=False)
            cold = rates(args, readers, cold=True)
            for label in dict.fromkeys([args.caches[0], args.caches[-1]]):
                breakdown(label, readers[label], args)
            digests(readers[args.caches[0]])
            return 0 if targets(args, warm, cold, args.caches[-1]) else 1


def make_cache(path: Path, units: int, codec_arrays: Arrays) -> None:
    """A cache of N units of one view that all hold these records; only the keys differ."""
    records = len(next(iter(codec_arrays.values())))
    generator = np.random.default_rng(0)
    boxes, flips = generator.integers(0, 500, (records, 4)).tolist(), generator.integers(0, 2, records).tolist()
    views = to_arrays([View._make((*box, bool(flip))) for box, flip in zip(boxes, flips, strict=True)])
    arrays = codec_arrays | views | {DIGEST: generator.integers(0, 2**63, records, np.uint64)}
    manifest = Manifest(
        source=tuple(SourceShard(f"train-{number:06d}.tar", 1, records, f"{number}") for number in range(units)),
        teacher=TEACHER,
        views=ViewConfig().identity(),
        num_views=1,
        codec={"name": "sketch", "version": 2, "parameters": {"relation_heads": HEADS}},
        environment={"tinymim": "0", "zarr": zarr.__version__, "canary": ""},
    )
    with CacheWriter.open(path, manifest) as writer:
        for number, shard in enumerate(manifest.source):
            keys = [f"n{number:08d}_{image}" for image in range(records)]
            writer.write_unit(UnitId(shard.name, 0, 1), keys, arrays, {})


@contextmanager
def one_cpu() -> Iterator[None]:
    """Keep this process, and all its threads to come, on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def opening(caches: dict[str, Path], rounds: int) -> None:
    """Print how long a cache takes to open."""
    print("| cache, units x records | open, ms | min to max | ms per unit |\n|---|---|---|---|")
    found: dict[str, list[float]] = {label: [] for label in caches}
    for _ in range(rounds):
        for label, path in caches.items():
            start = time.perf_counter()
            CacheReader(path)
            found[label].append(1e3 * (time.perf_counter() - start))
    for label, ms in found.items():
        units = int(label.partition("x")[0])
        middle = statistics.median(ms)
        print(f"| {label} | {middle:.1f} | {min(ms):.1f} to {max(ms):.1f} | {middle / units:.3f} |")
    print()


def rates(args: argparse.Namespace, readers: dict[str, CacheReader], cold: bool) -> dict[tuple[str, str], list[Pass]]:
    """Print the table of all ways and caches; the passes by cache and way, a round each."""
    found: dict[tuple[str, str], list[Pass]] = {(label, way): [] for label in readers for way in WAYS}
    stayed = 0.0
    chance = random.Random(0)
    for number in range(args.rounds):
        for label, reader in readers.items():
            units = chance.sample(reader.units(), min(args.units_per_pass, len(reader.units())))
            files = [path for info in units for path in files_of(reader, info)]
            for path in files:
                path.read_bytes()
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                if cold:
                    stayed = max(stayed, drop(files))
                found[label, way].append(one_pass(way, reader, units))
    print("Files dropped from the page cache" if cold else "Files in the page cache", end="")
    print(f" (at most {100 * stayed:.1f} % of their pages stayed):\n" if cold else ":\n")
    print("| cache | way | records/s | min to max | records per CPU second | MB/s | of raw preadv | min to max |")
    print("|---|---|---|---|---|---|---|---|")
    for (label, way), passes in found.items():
        by_wall = [one.records / one.wall_s for one in passes]
        by_cpu = statistics.median(one.records / one.cpu_s for one in passes)
        ratios = of_raw(found, label, way)
        record = record_bytes(readers[label])
        print(
            f"| {label} | {way} | {statistics.median(by_wall):,.0f} | {min(by_wall):,.0f} to {max(by_wall):,.0f} "
            f"| {by_cpu:,.0f} | {statistics.median(by_wall) * record / 1e6:,.0f} "
            f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
        )
    print()
    return found


def of_raw(found: dict[tuple[str, str], list[Pass]], label: str, way: str) -> list[float]:
    """Every round's ratio of wall-clock rates to raw preadv."""
    return [raw.wall_s / one.wall_s for one, raw in zip(found[label, way], found[label, "raw preadv"], strict=True)]


def one_pass(way: str, reader: CacheReader, units: Sequence[UnitInfo]) -> Pass:
    """Read the units once."""
    payloads = [payload_files(reader, info) for info in units]
    buffer = memoryview(bytearray(max(file.size_bytes for info in units for file in info.files.values())))
    calls: dict[str, Callable[[int], object]] = {
        "read_unit": lambda place: reader.read_unit(units[place]),
        "read_unit, verify=True": lambda place: reader.read_unit(units[place], verify=True),
        "raw preadv": lambda place: [read_into(path, buffer) for path in payloads[place]],
        "raw mmap and sum": lambda place: [map_and_sum(path) for path in payloads[place]],
    }
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    if way == "read_units":
        for _ in reader.read_units(units):
            pass
    else:
        for place in range(len(units)):
            calls[way](place)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Pass(sum(info.num_records for info in units), wall_s, cpu_s)


def read_into(path: Path, buffer: memoryview) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [buffer], 0)
    finally:
        os.close(fd)


def map_and_sum(path: Path) -> int:
    """Map a file and add up its bytes, as 64-bit words."""
    mapped = np.memmap(path, np.uint8, "r")
    return int(mapped[: len(mapped) // 8 * 8].view(np.uint64).sum()) if len(mapped) >= 8 else int(mapped.sum())


def files_of(reader: CacheReader, info: UnitInfo) -> list[Path]:
    """All files of a unit."""
    return [Path(reader.place, layout.unit_folder(info.unit), name) for name in info.files]


def payload_files(reader: CacheReader, info: UnitInfo) -> list[Path]:
    """Those that hold values."""
    return [path for path in files_of(reader, info) if path.name != layout.METADATA]


def record_bytes(reader: CacheReader) -> float:
    """Payload on disk per record."""
    info = reader.units()[0]
    sizes = [file.size_bytes for name, file in info.files.items() if not name.endswith(layout.METADATA)]
    return sum(sizes) / info.num_records


def drop(files: Sequence[Path]) -> float:
    """Have the system forget the files' pages; the share of them that stayed."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    counts = [pages_resident(path) for path in files]
    return sum(resident for resident, _ in counts) / sum(pages for _, pages in counts)


def pages_resident(path: Path) -> tuple[int, int]:
    """How many pages of a file are in memory, of how many."""
    mapped = np.memmap(path, np.uint8, "r")
    pages = -(-len(mapped) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), flags):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in flags), pages


def breakdown(label: str, reader: CacheReader, args: argparse.Namespace) -> None:
    """Print the parts of `read_unit`, each on its own over the same units, and what `verify` adds."""
    units = reader.units()[: args.units_per_pass]
    us = part_us(reader, units, args.rounds)
    print(f"Where the time of `read_unit` goes, {label}, files in the page cache:\n")
    print("| part | µs of CPU time per record | min to max | % of its round, median |\n|---|---|---|---|")
    for part, values in us.items():
        share = statistics.median(one / whole for one, whole in zip(values, us["read_unit"], strict=True))
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {part} | {statistics.median(values):.2f} | {spread} | {100 * share:.1f} |")
    print()


def part_us(reader: CacheReader, units: Sequence[UnitInfo], rounds: int) -> dict[str, list[float]]:
    """CPU time per record of each part in each round, in µs; a first round is not counted."""
    paths = [path for info in units for path in files_of(reader, info)]
    data = [path.read_bytes() for path in paths]
    arrays = []
    for info in units:
        for name in info.arrays:
            folder = Path(reader.place, layout.unit_folder(info.unit))
            arrays.append((name, {path: (folder / path).read_bytes() for path in commit.files_of(info.files, name)}))
    keys = [layout.encode_keys(reader.read_unit(info).keys) for info in units]
    # One at a time, and its result is dropped: memory kept alive would show as page faults.
    calls: dict[str, tuple[Callable[..., object], Sequence[Any]]] = {
        "read_unit": (reader.read_unit, units),
        "open and read the files": (Path.read_bytes, paths),
        "crc32c of the files": (google_crc32c.value, data),
        "zarr.json and zstd": (lambda array: layout.decode_array(array[0], array[1], None), arrays),
        "keys": (key_parts, keys),
        "with `verify` in addition: blake2b of the files": (digest_hex, data),
    }
    records = sum(info.num_records for info in units)
    found: dict[str, list[float]] = {part: [] for part in calls}
    for number in range(rounds + 1):
        for part, (call, items) in calls.items():
            start = time.process_time()
            for item in items:
                call(item)
            used_s = time.process_time() - start
            if number:
                found[part].append(1e6 * used_s / records)
    return found


def key_parts(key_arrays: Arrays) -> tuple[str, dict[str, int]]:
    """Digest and index of a unit's keys."""
    keys = layout.decode_keys(key_arrays)
    return key_digest(key_arrays), {key: image for image, key in enumerate(keys)}


def digests(reader: CacheReader) -> None:
    """Print how fast digests and checksums of Python's own library and zarr's dependencies are."""
    largest = max(payload_files(reader, reader.units()[0]), key=lambda path: path.stat().st_size)
    data = largest.read_bytes() * 8
    ways: dict[str, Callable[[], object]] = {
        "blake2b, 16 bytes (format version 1)": lambda: hashlib.blake2b(data, digest_size=16).digest(),
        "blake2s, 16 bytes": lambda: hashlib.blake2s(data, digest_size=16).digest(),
        "sha256": lambda: hashlib.sha256(data).digest(),
        "sha1": lambda: hashlib.sha1(data, usedforsecurity=False).digest(),
        "crc32c": lambda: google_crc32c.value(data),
        "crc32 of zlib": partial(zlib.crc32, data),
    }
    print("| digest or checksum | MB/s | min to max | µs per record |\n|---|---|---|---|")
    for way, call in ways.items():
        rates = []
        for _ in range(9):
            start = time.process_time()
            call()
            rates.append(len(data) / (time.process_time() - start) / 1e6)
        rate = statistics.median(rates)
        cells = (way, f"{rate:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", f"{record_bytes(reader) / rate:.2f}")
        print("| " + " | ".join(cells) + " |")
    print()


def targets(
    args: argparse.Namespace,
    warm: dict[tuple[str, str], list[Pass]],
    cold: dict[tuple[str, str], list[Pass]],
    label: str,
) -> bool:
    """Print the targets beside what was measured; whether those that do not depend on the disk are met."""
    rate = statistics.median(one.records / one.cpu_s for one in warm[label, "read_unit"])
    cost_us = 1e6 / rate
    share = statistics.median(of_raw(cold, label, "read_units"))
    rows = [
        (f"records per CPU second, {label}, page cache", f"{rate:,.0f}", f">= {LEAST_RATE:,}", rate >= LEAST_RATE),
        (f"of raw preadv, {label}, from disk", f"{share:.2f}", f">= {LEAST_OF_RAW}", share >= LEAST_OF_RAW),
    ]
    if decode_us := jpeg_us(args.data):
        part = cost_us / decode_us
        what = f"a record ({cost_us:.0f} µs) of decoding a JPEG ({decode_us:,.0f} µs)"
        rows.append((what, f"{part:.2%}", f"< {MOST_OF_DECODE:.0%}", part < MOST_OF_DECODE))
    print("| | measured | target | met |\n|---|---|---|---|")
    for what, measured, target, met in rows:
        print(f"| {what} | {measured} | {target} | {'yes' if met else 'no'} |")
    return all(met for what, *_, met in rows if "disk" not in what)


def jpeg_us(data: Path) -> float:
    """Mean CPU time of decoding a whole photograph; 0 where there are none."""
    if not (data / "imagenet-sample").is_dir():
        return 0.0
    shard = open_shards(SourceConfig(shards=data / "imagenet-sample")).shards[0]
    files = [shard.read(place) for place in range(min(JPEGS, shard.num_samples))]
    decode(files[0])
    start = time.process_time()
    for content in files:
        decode(content)
    return 1e6 * (time.process_time() - start) / len(files)


def header(args: argparse.Namespace, source: str) -> None:
    versions = f"Python {platform.python_version()}, zarr {zarr.__version__}, numpy {np.__version__}"
    print(f"# Reading a cache, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, one CPU of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
    print(f"- {versions}; {source}")
    print(f"- n = {args.rounds} rounds of {args.units_per_pass} units, drawn anew each round; medians\n")


if __name__ == "__main__":
    sys.exit(main())
