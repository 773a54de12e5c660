"""Reading samples of an object store through the spool, against local pread and a request per sample, in one run.

    python benchmarks/bench_remote.py [--latency 0.02] [--repeats 3] > benchmarks/results/DATE-remote-source.md

The server is a process of its own (tests/s3_server.py) that serves twelve tars of random bytes, 1000 samples of 110 KB
each (ImageNet's mean) from the page cache: its bandwidth is what this machine can copy, its latency is a sleep.
Samples are read in batches of 256, one after the other by one thread, and not decoded. A cold spool is an empty folder.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import provenance

from tinymim.configs.sections.loader import OrderConfig
from tinymim.configs.sections.source import SourceConfig, SpoolConfig
from tinymim.pipeline import remote, spool
from tinymim.pipeline.ahead import spooling
from tinymim.pipeline.index import INDEX_NAME, INDEX_VERSION
from tinymim.pipeline.order import Items, SampleOrder, view_batches
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.spool import SpooledTar
from tinymim.tests import s3_server

SHARDS, SAMPLES, SAMPLE_BYTES, BATCH = 12, 1000, 110_000, 256
SERIAL = 200  # samples of the variant that waits for every one of them
MIB = 2**20


def write_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for sample in range(SAMPLES):
                for name, data in ((f"{sample:06d}.jpg", rng.bytes(SAMPLE_BYTES)), (f"{sample:06d}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    shards = open_shards(SourceConfig(shards=folder)).shards
    names = ("name", "size_bytes", "num_samples", "content_hash")
    rows = [{name: getattr(shard, name) for name in names} for shard in shards]
    (folder / INDEX_NAME).write_text(json.dumps({"version": INDEX_VERSION, "shards": rows}))


@dataclass
class Result:
    """What one pass gave."""

    samples_per_s: float  # of a process
    requests_per_sample: float
    bytes_per_byte: float  # fetched per byte read, over all processes


class Counted:
    """Counts the requests and bytes of this process's spool."""

    def __init__(self) -> None:
        self.requests = self.fetched = 0

    def __call__(self, source: remote.RemoteObject, start: int, end: int) -> memoryview:
        self.requests += 1
        self.fetched += end - start
        return remote.fetch_range(source, start, end)


def read(
    shards: Sequence[Shard], plan: Sequence[Items], look_ahead: bool, work_s: float = 0.0
) -> tuple[float, int, int]:
    """Seconds, requests and bytes fetched of a pass over `plan`, with other work of `work_s` after every batch."""
    counted = Counted()
    vars(spool)["fetch_range"] = counted
    start = time.perf_counter()
    with spooling(shards, plan, look_ahead) as (followed, done):
        for items in followed:
            for shard, sample, *_ in items.tolist():
                assert len(shards[shard].read(sample)) == SAMPLE_BYTES
            time.sleep(work_s)
            done()
    return time.perf_counter() - start, counted.requests, counted.fetched


def pass_over(shards: Sequence[Shard], plan: Sequence[Items], look_ahead: bool, work_s: float = 0.0) -> Result:
    seconds, requests, fetched = read(shards, plan, look_ahead, work_s)
    samples = sum(len(items) for items in plan)
    return Result(samples / seconds, requests / samples, fetched / samples / SAMPLE_BYTES)


def two_processes(shards: Sequence[Shard], plan: Sequence[Items]) -> Result:
    """Two processes with one spool, each with one half of every batch: the rate of the slower one."""
    halves = [[items[half::2] for items in plan] for half in range(2)]
    context = multiprocessing.get_context("forkserver")
    with context.Pool(2) as pool:
        pool.map(abs, range(8), chunksize=1)  # both have started
        runs = pool.starmap(read, [(shards, half, True) for half in halves], chunksize=1)
    samples = sum(len(items) for items in plan)
    requests, fetched = sum(run[1] for run in runs), sum(run[2] for run in runs)
    return Result(samples / 2 / max(run[0] for run in runs), requests / samples, fetched / samples / SAMPLE_BYTES)


def request_per_sample(shards: Sequence[Shard], plan: Sequence[Items]) -> Result:
    """What 2026-11-21's block reader did where the shards of a group did not fit into its memory."""
    wanted = np.concatenate(plan)[:SERIAL].tolist()
    members = [shard.members() for shard in shards]
    start = time.perf_counter()
    for shard, sample, *_ in wanted:
        place, offset = shards[shard].place, int(members[shard].offsets[sample])
        assert isinstance(place, SpooledTar)
        remote.fetch_range(place.source, offset, offset + SAMPLE_BYTES)
    return Result(SERIAL / (time.perf_counter() - start), 1.0, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write_shards(folder / "shards")
        command = [sys.executable, "-m", "tinymim.tests.s3_server", str(folder / "shards"), str(options.latency)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout and server.stdin
            os.environ.update(s3_server.environment(server.stdout.readline().strip()))
            report(folder, options.latency, options.repeats)
            server.stdin.close()


def report(folder: Path, latency_s: float, repeats: int) -> None:
    def far(name: str, num_shards: float) -> tuple[Shard, ...]:
        config = SpoolConfig(folder=folder / name, gib=num_shards * 113e6 / 2**30)
        return open_shards(SourceConfig(shards=f"s3://{s3_server.BUCKET}", spool=config)).shards

    def cold(work: Callable[[], Result]) -> Callable[[], Result]:
        def run() -> Result:
            for path in (folder / "spool").glob("*.tar"):
                path.unlink()
            return work()

        return run

    local = open_shards(SourceConfig(shards=folder / "shards")).shards
    roomy, tight = far("spool", SHARDS), far("spool", 8)
    for shard in (*local, *roomy):
        shard.members()
    ascending = [items for unit in range(SHARDS) for items in view_batches(unit, SAMPLES, (0,), BATCH)]
    shuffled = [entry[0] for entry in SampleOrder([SAMPLES] * SHARDS, OrderConfig(), BATCH, None).plan(46)]
    first, work_s = ascending[:16], 0.2  # 16 batches of the first four shards
    variants: dict[str, Callable[[], Result]] = {
        "in order, local pread": lambda: pass_over(local, first, True),
        "in order, local pread, 0.2 s of other work per batch": lambda: pass_over(local, first, True, work_s),
        "the same, cold spool": cold(lambda: pass_over(roomy, first, False, work_s)),
        "the same, cold spool, read-ahead": cold(lambda: pass_over(roomy, first, True, work_s)),
        "shuffled in fours, local pread": lambda: pass_over(local, shuffled, True),
        "shuffled in fours, a request per sample (2026-11-21)": lambda: request_per_sample(roomy, shuffled),
        "shuffled in fours, cold spool, read-ahead": cold(lambda: pass_over(roomy, shuffled, True)),
        "the same, room for two groups only": cold(lambda: pass_over(tight, shuffled, True)),
        "the same, two processes share the spool, each": cold(lambda: two_processes(roomy, shuffled)),
        "shuffled in fours, warm spool": lambda: pass_over(roomy, shuffled, True),
    }
    results: dict[str, list[Result]] = {name: [] for name in variants}
    for _ in range(repeats):  # variants take turns, so that a slow minute hits all of them
        for name, work in variants.items():
            results[name].append(work())
    print(f"# Reading shards from an object store through the spool, {time.strftime('%Y-%m-%d')}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, shared; Python {platform.python_version()}")
    print(
        f"- {SHARDS} tars of {SAMPLES} samples of {SAMPLE_BYTES:,} bytes; {latency_s * 1000:.0f} ms per request; "
        f"parts of {spool.PART_BYTES // MIB} MiB, {spool.REQUESTS} at once; median of {repeats}\n"
    )
    print("| | samples/s | min to max | MB/s | requests per sample | bytes fetched per byte read |")
    print("|---|---|---|---|---|---|")
    for name, runs in results.items():
        rates = [run.samples_per_s for run in runs]
        rate, last = statistics.median(rates), runs[-1]
        print(
            f"| {name} | {rate:,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | {rate * SAMPLE_BYTES / 1e6:,.0f} "
            f"| {last.requests_per_sample:.3f} | {last.bytes_per_byte:.2f} |"
        )


if __name__ == "__main__":
    main()
