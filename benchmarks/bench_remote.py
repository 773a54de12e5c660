"""Reading samples from an object store with a latency per request, against local pread, in one run.

    python benchmarks/bench_remote.py [--latency 0.02] [--repeats 3] > benchmarks/results/DATE-remote-source.md

The server is a process of its own (tests/s3_server.py) that serves four tars of random bytes, 1000 samples of 110 KB
each (ImageNet's mean) from the page cache: its bandwidth is what this machine can copy, its latency is a sleep.
Readers start cold; samples are read one after the other by one thread and not decoded.
"""

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import provenance

from tinymim.configs.sections import SourceConfig
from tinymim.pipeline import remote
from tinymim.pipeline.remote import BlockReader
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.tests import s3_server

SHARDS, SAMPLES, SAMPLE_BYTES = 4, 1000, 110_000
SERIAL = 200  # samples of the variants that wait for every one of them
MIB = 2**20
Reads = Sequence[tuple[int, int]]  # shard, sample


def write_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for sample in range(SAMPLES):
                for name, data in ((f"{sample:06d}.jpg", rng.bytes(SAMPLE_BYTES)), (f"{sample:06d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Counted:
    """Counts the requests and bytes of a reader."""

    def __init__(self) -> None:
        self.requests = self.fetched = 0
        self._fetch = remote._fetch

    def __call__(self, source: remote.RemoteObject, start: int, end: int) -> memoryview:
        self.requests += 1
        self.fetched += end - start
        return self._fetch(source, start, end)


def measure(shards: Sequence[Shard], reads: Reads, reader: BlockReader | None) -> tuple[float, int, float]:
    """Samples per second, requests, bytes fetched per byte read."""
    counted = Counted()
    original, remote._fetch = remote._fetch, counted
    if reader is not None:
        remote._reader = (os.getpid(), reader)
    start = time.perf_counter()
    total = sum(len(shards[shard].read(sample)) for shard, sample in reads)
    seconds = time.perf_counter() - start
    remote._fetch = original
    if reader is not None:
        reader._pool.shutdown()
    return len(reads) / seconds, counted.requests, counted.fetched / total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "xdg")
        (folder / "shards").mkdir()
        write_shards(folder / "shards")
        command = [sys.executable, "-m", "tinymim.tests.s3_server", str(folder / "shards"), str(options.latency)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout and server.stdin
            os.environ.update(s3_server.environment(server.stdout.readline().strip()))
            report(folder / "shards", options.latency, options.repeats)
            server.stdin.close()


def report(folder: Path, latency_s: float, repeats: int) -> None:
    local = open_shards(SourceConfig(shards=folder)).shards
    far = open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}")).shards
    for shard in (*local, *far):
        shard.members()
    ascending = [(shard, sample) for shard in range(SHARDS) for sample in range(SAMPLES)]
    order = np.random.default_rng(1).permutation(len(ascending))
    shuffled = [ascending[int(row)] for row in order]
    strided = [read for start in range(0, len(ascending), 256) for read in ascending[start : start + 64]]
    small, fits = remote.BUDGET_BYTES, 2 * remote.BUDGET_BYTES
    variants: list[tuple[str, Sequence[Shard], Reads, tuple[int, int] | None]] = [
        ("sequential, local pread", local, ascending, None),
        ("sequential, read-ahead", far, ascending, (4, small)),
        ("sequential, blocks without read-ahead", far, ascending, (0, small)),
        ("sequential, a request per sample", far, ascending[:SERIAL], (0, 0)),
        ("shuffled in four shards, local pread", local, shuffled, None),
        ("shuffled, group fits (512 MiB), read-ahead", far, shuffled, (4, fits)),
        ("shuffled, group fits (512 MiB), without read-ahead", far, shuffled, (0, fits)),
        ("shuffled, group does not fit", far, shuffled[:SERIAL], (4, small)),
        ("every fourth batch of 64 (one worker of four), read-ahead", far, strided, (4, small)),
    ]
    results: dict[str, list[tuple[float, int, float]]] = {name: [] for name, *_ in variants}
    for _ in range(repeats):  # variants take turns, so that a slow minute hits all of them
        for name, shards, reads, settings in variants:
            reader = None if settings is None else BlockReader(remote.BLOCK_BYTES, *settings)
            results[name].append(measure(shards, reads, reader))
    print(f"# Reading shards from an object store, {time.strftime('%Y-%m-%d')}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, shared; Python {platform.python_version()}")
    print(
        f"- {SHARDS} tars of {SAMPLES} samples of {SAMPLE_BYTES:,} bytes; {latency_s * 1000:.0f} ms per request; "
        f"blocks of {remote.BLOCK_BYTES // MIB} MiB, up to {remote.AHEAD_BLOCKS} ahead, {small // MIB} MiB budget; "
        f"median of {repeats}\n"
    )
    print("| | samples/s | min to max | MB/s | requests per sample | bytes fetched per byte read |")
    print("|---|---|---|---|---|---|")
    for name, _, reads, settings in variants:
        rates = [rate for rate, *_ in results[name]]
        rate, (_, requests, ratio) = statistics.median(rates), results[name][-1]
        counts = "| |" if settings is None else f"{requests / len(reads):.3f} | {ratio:.2f} |"
        print(
            f"| {name} | {rate:,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | {rate * SAMPLE_BYTES / 1e6:,.0f} "
            f"| {counts}"
        )


if __name__ == "__main__":
    main()
