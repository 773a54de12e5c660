"""Inner chunk and compressor of the cache's arrays: rates, bytes on disk, memory, and the price of one record.

    python benchmarks/bench_layout.py [--records 1000] [--rounds 5] [--grid full] [--data ../shared/data] > table.md

Records of the default sketch at ViT-L's size, 16 heads x 64 rows x 8 draws of 197 tokens and two relations, made by the
codec itself: relations of real images where the recipe `imagenet-sample-cache` finds its teacher and shards, else of
random q, k and v. So many records are one unit: two zarr v3 arrays, each in one zarr shard whose inner chunks end in a
crc32c. Measured are all inner chunks at zstd 1 and all compressors at chunks of 64 records, the cross through the
layout of format version 1; `--grid full` takes every pair. Every round takes the layouts in turn, each in a process of
its own: write the unit, read it whole through zarr, read it whole by our own unpacking (index and chunks by numcodecs,
checksums not compared, as the reader does after it has compared digests), and read single records through zarr. Each
task runs three times and the middle one counts; memory is that of the first. Rates are of CPU time, with the files in
the page cache. Keep the table under benchmarks/results/.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt
import provenance
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

# torch and what needs it are imported where records are made: the measured processes stay small and start fast.

Bytes = npt.NDArray[np.uint8]

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HEADS = 16
CHUNKS = ("1", "16", "32", "64", "128", "256", "whole")
COMPRESSORS: dict[str, tuple[Any, Any]] = {  # the zarr codec that writes, the numcodecs one that reads
    "zstd 1": (ZstdCodec(level=1), numcodecs.Zstd()),
    "zstd 3": (ZstdCodec(level=3), numcodecs.Zstd()),
    "zstd 9": (ZstdCodec(level=9), numcodecs.Zstd()),
    "blosc lz4, shuffle": (BloscCodec(typesize=1, cname="lz4", clevel=5, shuffle="shuffle"), numcodecs.Blosc()),
    "blosc zstd 1, shuffle": (BloscCodec(typesize=1, cname="zstd", clevel=1, shuffle="shuffle"), numcodecs.Blosc()),
    "blosc zstd 1, bitshuffle": (
        BloscCodec(typesize=1, cname="zstd", clevel=1, shuffle="bitshuffle"),
        numcodecs.Blosc(),
    ),
    "none": (None, None),
}
REFERENCE = ("64", "zstd 1")
REPEATS = 3
SINGLE_READS = 24
CRC_BYTES = 4


def main() -> int:
    parser = argparse.ArgumentParser(description="layout of the cache's arrays")
    parser.add_argument("--records", type=int, default=1000, help="in the unit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grid", choices=["cross", "full"], default="cross")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of shards and teacher")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "CHUNK", "COMPRESSOR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, chunk, compressor = args.measure
        print(json.dumps(measured(Path(folder), chunk, compressor)))
        return 0
    layouts = [
        (chunk, compressor)
        for compressor in COMPRESSORS
        for chunk in CHUNKS
        if args.grid == "full" or chunk == REFERENCE[0] or compressor == REFERENCE[1]
    ]
    found: dict[tuple[str, str], list[dict[str, float]]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as folder:
        source = write_records(args.data, args.records, Path(folder))
        for number in range(args.rounds):
            start = number * len(layouts) // args.rounds
            for layout in layouts[start:] + layouts[:start]:
                found[layout].append(measured_apart(Path(folder), *layout))
    print(header(args, source))
    print(rates_table(found, args.records), sizes_table(found, args.records), sep="\n\n")
    return 0


def write_records(data: Path, count: int, folder: Path) -> str:
    """Write the gap arrays [R, H, Q, K] of `count` records as .npy files. Returns where their relations come from."""
    import real_records
    import torch

    torch.set_num_threads(1)
    arrays, source = real_records.make_records(data, count)
    for name, array in arrays.items():
        if name.endswith("_gap"):
            np.save(folder / f"{name}.npy", array)
    return str(source)


def measured_apart(folder: Path, chunk: str, compressor: str) -> dict[str, float]:
    """`measured` in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(folder), chunk, compressor]
    result: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def measured(folder: Path, chunk: str, compressor: str) -> dict[str, float]:
    """One layout: CPU seconds, bytes and peak memory of each task, in this process."""
    arrays = {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}
    count = len(next(iter(arrays.values())))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        few = {name: values[:2] for name, values in arrays.items()}
        write(Path(place, "warm"), few, chunk, compressor)
        read_zarr(Path(place, "warm"), few)
        read_direct(Path(place, "warm"), few, compressor)
        units = (Path(place, f"unit-{number}") for number in itertools.count())
        found |= cost("write", lambda: write(next(units), arrays, chunk, compressor))
        unit = Path(place, "unit-0")
        reads: dict[str, Callable[[], dict[str, Bytes]]] = {
            "zarr": lambda: read_zarr(unit, arrays),
            "direct": lambda: read_direct(unit, arrays, compressor),
        }
        for name, read in reads.items():
            found |= cost(name, read)
            got = read()
            assert all(np.array_equal(got[array], values) for array, values in arrays.items())
        opened = [zarr.open_array(str(unit / name), mode="r") for name in arrays]
        rows = np.random.default_rng(0).integers(count, size=SINGLE_READS).tolist()
        found |= cost("single", lambda: [array[row : row + 1] for row in rows for array in opened])
        payload = sum(path.stat().st_size for name in arrays for path in [shard_file(unit / name)])
        places = [chunk_places(shard_file(unit / name).read_bytes(), metadata(unit / name)) for name in arrays]
        packed = sum(int(sizes.sum()) - CRC_BYTES * len(sizes) for _, sizes in places)
        found |= {
            "payload_bytes": payload,
            "checks_bytes": payload - packed,  # index and checksums
            "metadata_bytes": sum(path.stat().st_size for path in unit.rglob("zarr.json")),
            "files": sum(path.is_file() for path in unit.rglob("*")),
            "single_bytes": sum(float(sizes.mean()) + 16 * len(sizes) + CRC_BYTES for _, sizes in places),
        }
    return found


def cost(name: str, task: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of a task, the middle of REPEATS; the memory that the first needed at its peak, in bytes."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # free memory that stays in the process would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, peak, used_s = resident("VmRSS"), 0, []
    for number in range(REPEATS):
        start = time.process_time()
        task()
        used_s.append(time.process_time() - start)
        peak = peak if number else resident("VmHWM")
    return {f"{name}_s": statistics.median(used_s), f"{name}_peak_bytes": peak - before}


def resident(field: str) -> int:
    """A size from /proc/self/status, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def write(unit: Path, arrays: dict[str, Bytes], chunk: str, compressor: str) -> None:
    """Write the arrays as a unit's are, but for chunk and compressor."""
    for name, values in arrays.items():
        length = len(values) if chunk == "whole" else min(int(chunk), len(values))
        codec = COMPRESSORS[compressor][0]
        array = zarr.create_array(
            store=str(unit),
            name=name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(length, *values.shape[1:]),
            shards=(-(-len(values) // length) * length, *values.shape[1:]),
            compressors=(*([codec] if codec else []), Crc32cCodec()),
            fill_value=0,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )
        array[...] = values


def read_zarr(unit: Path, arrays: dict[str, Bytes]) -> dict[str, Bytes]:
    """Whole arrays through zarr's own interface, checksums compared."""
    return {name: np.asarray(zarr.open_array(str(unit / name), mode="r")[...]) for name in arrays}


def read_direct(unit: Path, arrays: dict[str, Bytes], compressor: str) -> dict[str, Bytes]:
    """Whole arrays by the shards' indices; no checksum is compared."""
    codec = COMPRESSORS[compressor][1]
    found = {}
    for name in arrays:
        described, payload = metadata(unit / name), memoryview(shard_file(unit / name).read_bytes())
        starts, sizes = chunk_places(payload, described)
        [sharding] = described["codecs"]
        length = sharding["configuration"]["chunk_shape"][0]
        values = np.empty((len(starts) * length, *described["shape"][1:]), described["data_type"])
        for number, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            part, target = payload[start : start + size - CRC_BYTES], values[number * length : (number + 1) * length]
            if codec is None:
                target.reshape(-1)[:] = np.frombuffer(part, target.dtype)
            else:
                codec.decode(part, target)
        found[name] = values[: described["shape"][0]]
    return found


def metadata(array: Path) -> Any:
    return json.loads((array / "zarr.json").read_bytes())


def shard_file(array: Path) -> Path:
    [path] = (path for path in array.rglob("*") if path.is_file() and path.name != "zarr.json")
    return path


def chunk_places(payload: bytes | memoryview, described: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Offset and size in bytes, checksum included, of every inner chunk: the index at the shard's end."""
    [sharding] = described["codecs"]
    chunks = -(-described["shape"][0] // sharding["configuration"]["chunk_shape"][0])
    index = np.frombuffer(payload, "<u8", 2 * chunks, offset=len(payload) - 16 * chunks - CRC_BYTES).reshape(-1, 2)
    return index[:, 0], index[:, 1]


def rates_table(found: dict[tuple[str, str], list[dict[str, float]]], records: int) -> str:
    """Records per CPU second: median and range of the rounds, and the ratio to the reference within a round."""
    tasks = {"write": "write", "zarr": "read, zarr", "direct": "read, direct"}
    lines = [
        "| inner chunk | compressor | " + " | ".join(f"{label} | ratio" for label in tasks.values()) + " |",
        "|---" * (2 + 2 * len(tasks)) + "|",
    ]
    for (chunk, compressor), rounds in found.items():
        cells = []
        for task in tasks:
            rates = [records / one[f"{task}_s"] for one in rounds]
            pairs = zip(rounds, found[REFERENCE], strict=True)
            ratios = [reference[f"{task}_s"] / one[f"{task}_s"] for one, reference in pairs]
            cells += [
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        lines.append(f"| {chunk} | {compressor} | " + " | ".join(cells) + " |")
    caption = (
        "Records per second of CPU time, median (minimum to maximum of the rounds); ratio to chunks of 64 and zstd 1, "
    )
    return f"{caption}median of the rounds' own:\n\n" + "\n".join(lines)


def sizes_table(found: dict[tuple[str, str], list[dict[str, float]]], records: int) -> str:
    """Bytes on disk, what one record costs, and peak memory."""
    lines = [
        "| inner chunk | compressor | bytes per record | of these index and checksums | metadata, bytes "
        "| one record: KiB read | its ms of CPU time, zarr | peak MiB, write | read, zarr | read, direct |",
        "|---" * 10 + "|",
    ]
    for (chunk, compressor), rounds in found.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        cells = [
            f"{middle['payload_bytes'] / records:,.1f}",
            f"{middle['checks_bytes'] / records:.2f}",
            f"{middle['metadata_bytes']:,.0f}",
            f"{middle['single_bytes'] / 1024:,.1f}",
            f"{1e3 * middle['single_s'] / SINGLE_READS:.1f}",
            *(f"{middle[f'{task}_peak_bytes'] / 2**20:.1f}" for task in ("write", "zarr", "direct")),
        ]
        lines.append(f"| {chunk} | {compressor} | " + " | ".join(cells) + " |")
    files = found[REFERENCE][0]["files"]
    caption = f"""\
Every layout has {files:.0f} files: two an array and the group's. Reading one record takes the index and one inner chunk
of each array. The last chunk is padded to its full length. Peaks are beyond what the process held before; medians:"""
    return f"{caption}\n\n" + "\n".join(lines)


def header(args: argparse.Namespace, source: str) -> str:
    """Where, what and how, as a list."""
    versions = f"Python {platform.python_version()}, zarr {zarr.__version__}, numcodecs {numcodecs.__version__}"
    raw = 2 * HEADS * 64 * 8
    return f"""\
# Layout of the cache's arrays, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, {provenance.cores()} cores, load {os.getloadavg()[0]:.1f}; {versions}
- {source}: a unit of {args.records:,} records, {raw:,} bytes each before compression; n = {args.rounds} rounds
"""


if __name__ == "__main__":
    sys.exit(main())
