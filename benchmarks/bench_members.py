"""Memory and time of a loader worker that needs the members of very many shards.

    python benchmarks/bench_members.py [--shards 10000] [--images 1000] > table.md

A synthetic source: tars of nothing but a size, an index, and the members file that make-shards writes. A fresh process
receives the shards as a loader worker does, goes through all of them twice in random order, and uses 20 images of each
visit. "Strings" keeps what a worker held before: the members of at most 4,096 shards with keys as Python strings; what
its scans would cost is computed from one real tar. USS: memory that ends with the process (smaps: private pages).
"""

import argparse
import io
import json
import os
import pickle
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import provenance

from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.index import INDEX_NAME, INDEX_VERSION
from tinymim.pipeline.members import MEMBERS_NAME, Keys, Members, MembersWriter
from tinymim.pipeline.shards import Shard, open_shards
from tinymim.pipeline.tar import scan_tar

KEPT_BEFORE = 4096
USED_PER_VISIT = 20
TARGET_MIB = 30.0


def uss_mib() -> float:
    """Pages of this process that no other process has."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def synthetic(shard: int, images: int) -> Members:
    """Members like ImageNet's."""
    keys = Keys.of([f"n{shard:08d}/n{shard:08d}_{image:05d}" for image in range(images)])
    places = np.arange(images, dtype=np.int64)
    return Members(keys, places * 112_640 + 1024, places + 110_000, places % 1000)


def make_source(folder: Path, shards: int, images: int) -> None:
    rows = []
    with MembersWriter(folder) as writer:
        for number in range(shards):
            row = {"name": f"train-{number:06d}.tar", "size_bytes": 110_000_000, "num_samples": images}
            row["content_hash"] = f"sha256:{number:064x}"
            with open(folder / str(row["name"]), "wb") as file:
                file.truncate(110_000_000)
            mtime_ns = (folder / str(row["name"])).stat().st_mtime_ns
            writer.add(str(row["name"]), 110_000_000, str(row["content_hash"]), mtime_ns, synthetic(number, images))
            rows.append(row)
    index = {"version": INDEX_VERSION, "shards": rows, "classes": []}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def scan_s(images: int) -> float:
    """Seconds to read the headers of one tar of images and labels that is in the page cache."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for image in range(images):
            for kind, size in (("jpg", 2000), ("cls", 3)):
                info = tarfile.TarInfo(f"n00000000/n00000000_{image:05d}.{kind}")
                info.size = size
                tar.addfile(info, io.BytesIO(b"1" * size))
    took = []
    for _ in range(5):
        buffer.seek(0)
        began = time.perf_counter()
        scan_tar(buffer, "x.tar", buffer.getbuffer().nbytes)
        took.append(time.perf_counter() - began)
    return min(took)


def visits(shards: int) -> Iterator[tuple[int, int]]:
    """(shard, image) of two passes over all shards."""
    draw = np.random.Generator(np.random.Philox(0))
    for _ in range(2):
        for shard in draw.permutation(shards).tolist():
            yield from ((shard, image) for image in draw.integers(0, 1000, USED_PER_VISIT).tolist())


def work(shards: tuple[Shard, ...], way: str, images: int) -> dict[str, Any]:
    """What a worker does with members, and what it costs."""
    scans = 0

    @lru_cache(maxsize=KEPT_BEFORE)
    def strings(shard: int) -> tuple[tuple[str, ...], Any, Any, Any]:
        nonlocal scans
        scans += 1
        found = synthetic(shard, images)
        return tuple(found.keys), found.offsets, found.sizes, found.labels

    used = 0
    began = time.perf_counter()
    for shard, image in visits(len(shards)):
        if way == "strings":
            keys, offsets, sizes, _ = strings(shard)
            used += len(keys[image]) + int(offsets[image]) + int(sizes[image])
        else:
            found = shards[shard].members()
            used += len(found.keys[image]) + int(found.offsets[image]) + int(found.sizes[image])
    took_s = time.perf_counter() - began
    return {"uss_mib": uss_mib(), "took_s": took_s, "scans": scans, "used": used}


def worker(way: str, images: int) -> None:
    """Run in a fresh process: shards from stdin, costs to stdout."""
    before = uss_mib()
    shards = pickle.load(sys.stdin.buffer)
    received = uss_mib()
    print(json.dumps(work(shards, way, images) | {"before_mib": before, "received_mib": received}))


def main() -> int:
    """Measure, print the table, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.images)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_source(folder, options.shards, options.images)
        began = time.perf_counter()
        source = open_shards(SourceConfig(shards=folder))
        open_s = time.perf_counter() - began
        file_mib = (folder / MEMBERS_NAME).stat().st_size / 2**20
        found = {}
        for way in ("strings", "members file"):
            line = [sys.executable, __file__, "--worker", way, "--images", str(options.images)]
            done = subprocess.run(line, input=pickle.dumps(source.shards), capture_output=True, check=True)
            found[way] = json.loads(done.stdout)
    one_scan_s = scan_s(options.images)
    assert found["strings"]["used"] == found["members file"]["used"]

    count = options.shards * options.images
    print(f"# Members of {options.shards:,} shards x {options.images:,} images in a loader worker, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, load {os.getloadavg()[0]:.1f} at the end")
    each_bytes = file_mib * 2**20 / count
    print(f"- Python {platform.python_version()}; members file {file_mib:,.0f} MiB, {each_bytes:.0f} B an image")
    print(f"- `open_shards` in the first process: {open_s:.2f} s; headers of one tar: {1e3 * one_scan_s:.1f} ms\n")
    print(
        "| a worker's members | USS: imports | + shards received | + two passes | scans | of headers, s | lookups, us |"
    )
    print("|---|---|---|---|---|---|---|")
    for way, costs in found.items():
        each_us = 1e6 * costs["took_s"] / (2 * options.shards * USED_PER_VISIT)
        print(
            f"| {way} | {costs['before_mib']:.0f} MiB | +{costs['received_mib'] - costs['before_mib']:.1f} MiB "
            f"| +{costs['uss_mib'] - costs['received_mib']:.1f} MiB | {costs['scans']:,} "
            f"| {costs['scans'] * one_scan_s:,.0f} | {'' if way == 'strings' else f'{each_us:.1f}'} |"
        )
    added = found["members file"]["uss_mib"] - found["members file"]["before_mib"]
    print("\n| | measured | target | met |\n|---|---|---|---|")
    print(f"| MiB added to a worker | {added:.1f} | <= {TARGET_MIB:.0f} | {'yes' if added <= TARGET_MIB else 'no'} |")
    return int(added > TARGET_MIB)


if __name__ == "__main__":
    sys.exit(main())
