"""What a stored index costs: bits on disk of heads and draws packed in several ways, the bounds, and the way back.

    python benchmarks/bench_packing.py [--images 128] [--data ../shared/data] > table.md

Indices of the sketch's records in chunks of 64 records, the unit that the cache compresses. Relations of real images
where the recipe `imagenet-sample-cache` finds its teacher and shards, in 16 heads as of a ViT-L, else of random q, k
and v. Keep the table under benchmarks/results/.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from math import ceil, comb, log2
from pathlib import Path

import numpy as np
import numpy.typing as npt
import provenance
import torch
from numcodecs import Zstd
from real_records import HEADS, TAP, TOKENS, Block, real_blocks

from tinymim.configs.codecs.kinds import codec_config
from tinymim.targets.kinds import make_kind
from tinymim.targets.record import from_gaps

Bytes = npt.NDArray[np.uint8]

CHUNK = 64  # records that the cache compresses together
LEVELS = (1, 3, 9)


def main() -> int:
    parser = argparse.ArgumentParser(description="bits per stored index")
    parser.add_argument("--images", type=int, default=2 * CHUNK)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of shards and teacher")
    parser.add_argument("--head-k", type=int, default=8, help="of the second codec")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    blocks = real_blocks(flags.data, flags.images) if flags.data.is_dir() else random_blocks(flags.images)
    source = "ViT-S/14 (DINOv2) on ImageNet photographs" if flags.data.is_dir() else "random q, k, v"
    print(header(source, flags.images))
    for head_k in (0, flags.head_k):
        gaps = encode(blocks, head_k)
        print(f"Codec with head_k {head_k}, bits per index:\n", packed_table(gaps), "", sep="\n")
        if head_k == 0:
            print("The way back, microseconds per view:\n", decode_table(gaps), "", sep="\n")
    return 0


def random_blocks(images: int) -> list[Block]:
    """Normal q, k and v of a ViT-L."""
    generator = torch.Generator().manual_seed(0)
    return [
        ({TAP: tuple(torch.randn(3, 1, HEADS, TOKENS, 64, generator=generator))}, torch.tensor([key]))
        for key in range(images)
    ]


def encode(blocks: list[Block], head_k: int) -> dict[str, Bytes]:
    """The gap arrays of all records by name, uint8 [B, H, Q, K]."""
    kind = make_kind(codec_config(head_k=head_k, relation_heads=HEADS), TAP.place)
    records = [kind.encode(tapped, keys) for tapped, keys in blocks]
    names = [name for name in records[0] if name.endswith("_gap")]
    return {name: np.concatenate([record[name].numpy() for record in records]) for name in names}


def packed_table(gaps: dict[str, Bytes]) -> str:
    """One line a way of packing, one column a stored array."""
    ways: dict[str, Callable[[Bytes], float]] = {}
    for level in LEVELS:
        ways[f"raw uint8, zstd {level}"] = partial(raw_bits, level=level)
    for level in LEVELS:
        ways[f"gaps, zstd {level}" + " (stored)" * (level == 1)] = partial(zstd_bits, level=level)
    for level in LEVELS:
        ways[f"gaps position by position, zstd {level}"] = partial(zstd_bits, level=level, axes=(3, 0, 1, 2))
    ways["fixed width"] = lambda gap: ceil(log2(TOKENS))
    ways["gaps, fixed width of the largest"] = lambda gap: int(gap.max()).bit_length()
    ways["bound: entropy of the gaps"] = entropy
    ways["bound: entropy of the gaps of each position"] = lambda gap: statistics.mean(
        entropy(gap[..., place]) for place in range(gap.shape[-1])
    )
    ways["bound: enumerative, all multisets (heads: sets) alike"] = lambda gap: 0.0
    lines = ["| | " + " | ".join(gaps) + " |", "|---" * (len(gaps) + 1) + "|"]
    for way, bits in ways.items():
        cells = [enumerative(name, gap) if "enumerative" in way else bits(gap) for name, gap in gaps.items()]
        lines.append(f"| {way} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def raw_bits(gap: Bytes, level: int) -> float:
    """Bits per index of the indices themselves."""
    return zstd_bits(np.cumsum(gap, -1, np.uint8), level)


def zstd_bits(array: Bytes, level: int, axes: tuple[int, ...] = (0, 1, 2, 3)) -> float:
    """Bits per element of chunks of records, each with its axes in this order."""
    return 8 * sum(len(chunk) for chunk in packed(array, level, axes)) / int(array.size)


def packed(array: Bytes, level: int, axes: tuple[int, ...] = (0, 1, 2, 3)) -> list[bytes]:
    """The compressed chunks."""
    chunks = (array[start : start + CHUNK].transpose(axes) for start in range(0, len(array), CHUNK))
    return [bytes(Zstd(level=level).encode(np.ascontiguousarray(chunk))) for chunk in chunks]


def entropy(array: Bytes) -> float:
    """Order-0 entropy of the bytes, in bits."""
    share = np.bincount(array.ravel()) / array.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def enumerative(name: str, gap: Bytes) -> float:
    """Bits per index if every multiset of K draws (every set of K head entries) were as likely as any other."""
    count = int(gap.shape[-1])
    multisets: int = comb(TOKENS, count) if "head" in name else comb(TOKENS + count - 1, count)
    return log2(multisets) / count


def decode_table(gaps: dict[str, Bytes]) -> str:
    """Chunk by chunk from the compressed bytes to int64 indices, and reading those bytes from a cached file."""
    views = next(iter(gaps.values())).shape[0]
    raw = {name: np.cumsum(gap, -1, np.uint8) for name, gap in gaps.items()}
    shape = (-1, *next(iter(gaps.values())).shape[1:])
    chunks = {
        kind: [chunk for array in arrays.values() for chunk in packed(array, 1)]
        for kind, arrays in (("raw", raw), ("gaps", gaps))
    }

    def unpack(chunk: bytes) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(Zstd().decode(chunk), np.uint8).reshape(shape).copy())

    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for kind, some in chunks.items():
            paths[kind] = [Path(folder, f"{kind}-{number}") for number in range(len(some))]
            for path, chunk in zip(paths[kind], some, strict=True):
                path.write_bytes(chunk)
        ways: dict[str, Callable[[], object]] = {
            "raw: reading, file in memory": lambda: [path.read_bytes() for path in paths["raw"]],
            "raw: zstd 1": lambda: [unpack(chunk).long() for chunk in chunks["raw"]],
            "gaps: reading, file in memory": lambda: [path.read_bytes() for path in paths["gaps"]],
            "gaps: zstd 1": lambda: [unpack(chunk).long() for chunk in chunks["gaps"]],
            "gaps: zstd 1 and cumulative sum": lambda: [from_gaps(unpack(chunk)) for chunk in chunks["gaps"]],
        }
        lines = ["| | µs per view | min to max | KiB per view |", "|---|---|---|---|"]
        for way, call in ways.items():
            call()
            us = [1e6 * _call_s(call) / views for _ in range(9)]
            kib = sum(map(len, chunks[way.partition(":")[0]])) / views / 1024
            cells = (way, f"{statistics.median(us):.1f}", f"{min(us):.1f} to {max(us):.1f}", f"{kib:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _call_s(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def header(source: str, images: int) -> str:
    """Where, what and how, as a list."""
    return f"""\
# Bytes of stored indices, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {provenance.processor()}, {provenance.cores()} cores, 1 thread; Python {platform.python_version()}
- {source}: {images} images, one view each, {HEADS} heads x 64 rows x 8 draws of {TOKENS} \
tokens, chunks of {CHUNK} records
"""


if __name__ == "__main__":
    sys.exit(main())
