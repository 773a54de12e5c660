"""The price of k of V views: bytes read and CPU time per view used, format 2 beside format 1.

    python benchmarks/bench_partial_reads.py [--views 1 4 16 64 300] [--images 1000] [--rounds 15] > table.md

One unit of V views of N images is written per V and format, in a temporary folder. A record has two arrays of 16 heads
x 26 rows x 8 draws with the entropy of real ones: 4.6 KB compressed. Format 2, digests of the pixels included, is read
by `CacheReader.read_views` for one view and for four that lie apart, and by `CacheReader.each_view` for all views.
Format 1 is read by the reader of the upgrade, which reads a unit whole and compares blake2b digests. The files are in
the page cache. CPU time is that of the process, the units in turn in every round, medians. Exit code 1 where format 2
misses its mark: bytes within 1.1 x the stored bytes of the views used, CPU within 1.1 x that of a unit of one view.
Keep the table under benchmarks/results/.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import provenance
from google_crc32c import value as crc32c

from tinymim.configs.sections.views import ViewConfig
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.blocks import Array, key_arrays
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.local import LocalStore
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.v1.manifest import OldManifest
from tinymim.storage.writer import CacheWriter

SHAPE = (16, 26, 8)
ARRAYS = ("qk_index", "vv_index")
SHARD = "train-000000.tar"
ENVIRONMENT = {"tinymim": "0", "canary": ""}
TEACHER: dict[str, Any] = {
    "name": "vit_large_patch16_224",
    "arch": {},
    "weights_sha256": "",
    "weights_origin": None,
    "license": None,
    "precision": "fp32",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}
SHAPES = {"heads": 16, "head_dim": 64, "tokens": 197, "prefix_tokens": 1, "grid": (14, 14)}
TARGET = {
    "taps": ["qkv@18"],
    "name": "sketch",
    "version": 2,
    "parameters": {},
    "arrays": {name: {"dtype": "uint8", "shape": list(SHAPE)} for name in ARRAYS},
}
MOST_BYTES, MOST_CPU = 1.1, 1.1


class Records:
    """The records of one view after the other."""

    def __init__(self, images: int) -> None:
        rng = np.random.default_rng(0)
        # Geometric draws of mean 17 have the entropy of indices of real sketches, 5.5 bits of 7.6.
        self._drawn = {name: np.minimum(rng.geometric(1 / 17, (images, *SHAPE)), 196).astype("u1") for name in ARRAYS}
        self._digests = rng.integers(0, 2**32, images, np.uint32)

    def array(self, name: str, view: int) -> Array:
        """One array [I, ...] of a view."""
        return (self._drawn[name] + np.uint8(view % 50)).astype("u1")

    def digest(self, view: int) -> Array:
        """The digests [I] of a view."""
        return (self._digests * np.uint32(2 * view + 1)).astype("<u4")


def main() -> int:
    parser = argparse.ArgumentParser(description="reading k of V views, format 2 beside format 1")
    parser.add_argument("--views", nargs="+", type=int, default=[1, 4, 16, 64, 300], metavar="V")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    records = Records(args.images)
    with tempfile.TemporaryDirectory() as folder:
        for num_views in args.views:
            write_new(Path(folder, f"new-{num_views}"), records, args.images, num_views)
            write_old(Path(folder, f"old-{num_views}"), records, args.images, num_views)
        header(args)
        new = measure_new(Path(folder), args)
        old = measure_old(Path(folder), args)
    return report(args, new, old)


def measure_new(folder: Path, args: argparse.Namespace) -> dict[tuple[int, str], tuple[float, float, list[float]]]:
    """By V and k: bytes read and bytes stored per view used, and CPU time per view used in each round, in s."""
    readers = {num_views: CacheReader(folder / f"new-{num_views}") for num_views in args.views}
    found: dict[tuple[int, str], tuple[float, float, list[float]]] = {}
    for number in range(args.rounds + 1):
        for num_views, reader in readers.items():
            infos = [reader.units(layer)[0] for layer in (VIEWS, "rel")]
            for k, views in choices(num_views).items():
                if k == "all" and number > max(3, args.rounds // 5):
                    continue
                used = len(views) * args.images
                cpu_s, read = time.process_time(), preads.bytes
                for info in infos:
                    if k == "all":
                        deque(reader.each_view(info), maxlen=0)
                    else:
                        reader.read_views(info, views)
                cpu_s, read = time.process_time() - cpu_s, preads.bytes - read
                stored = sum(info.parts.views[view].size_bytes for info in infos for view in views)
                times = found.setdefault((num_views, k), (read / used, stored / used, []))[2]
                if number:  # the first round warms the page cache
                    times.append(cpu_s / used)
    return found


def measure_old(folder: Path, args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """By V: bytes and CPU time of reading a unit, as a pass over one view of each image does."""
    found = {}
    for num_views in args.views:
        cache = OldCache(folder / f"old-{num_views}")
        times, read = [], 0
        for _ in range(3 if num_views < 100 else 1):
            cpu_s, read = time.process_time(), reads.bytes
            cache.read_unit(cache.units[0])
            times.append(time.process_time() - cpu_s)
            read = reads.bytes - read
        found[num_views] = (read / args.images, statistics.median(times) / args.images)
    return found


def choices(num_views: int) -> dict[str, list[int]]:
    """The views that are used: one in the middle, four that lie apart, all."""
    four = sorted({place * (num_views - 1) // 3 for place in range(4)})
    return {"1": [num_views // 2], "4": four, "all": list(range(num_views))}


def report(
    args: argparse.Namespace,
    new: Mapping[tuple[int, str], tuple[float, float, list[float]]],
    old: Mapping[int, tuple[float, float]],
) -> int:
    single_s = statistics.median(new[args.views[0], "1"][2])
    print(
        "| V in a unit | k used | bytes read per view used | of its stored bytes | CPU per view used, µs | min to max ",
        end="",
    )
    print(f"| of V = {args.views[0]} | format 1: bytes | format 1: CPU, µs |")
    print("|---|---|---|---|---|---|---|---|---|")
    met = True
    for (num_views, k), (read, stored, times) in new.items():
        cpu_s = statistics.median(times)
        met &= read <= MOST_BYTES * stored and cpu_s <= MOST_CPU * single_s
        used = len(choices(num_views)[k])
        spread = f"{1e6 * min(times):.1f} to {1e6 * max(times):.1f}"
        print(
            f"| {num_views} | {k} | {read:,.0f} | {read / stored:.3f} | {1e6 * cpu_s:.1f} | {spread} "
            f"| {cpu_s / single_s:.2f} | {old[num_views][0] / used:,.0f} | {1e6 * old[num_views][1] / used:,.0f} |"
        )
    print(f"\nBytes within {MOST_BYTES} x the stored ones, CPU within {MOST_CPU} x V = 1's: {'yes' if met else 'no'}.")
    return 0 if met else 1


def header(args: argparse.Namespace) -> None:
    print(f"# Reading k of V views, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"- Python {platform.python_version()}, numpy {np.__version__}, numcodecs {numcodecs.__version__}")
    print(f"- {args.images:,} images a unit, n = {args.rounds} rounds, for all views {max(3, args.rounds // 5)}\n")


# ---- writing


def write_new(place: Path, records: Records, images: int, num_views: int) -> None:
    manifest = Manifest((SourceShard(SHARD, 1, images, "0"),), ViewConfig().identity(), ENVIRONMENT)
    layer = Layer("rel", manifest.spec_id, {**TEACHER, "shapes": SHAPES}, TARGET, ENVIRONMENT)
    unit = UnitId(SHARD, 0, num_views)
    with CacheWriter.open(place, manifest, [layer]) as writer:
        keys = keys_of(images)
        with writer.begin(VIEWS, unit, keys) as views, writer.begin("rel", unit, keys) as target:
            for view in range(num_views):
                views.add({"digest": records.digest(view)[None]})
                target.add({name: records.array(name, view)[None] for name in ARRAYS})
            views.commit({})
            target.commit({})


def write_old(place: Path, records: Records, images: int, num_views: int) -> None:
    """A cache as format 1 wrote it: rows are image-major, an array is one zarr shard of 64 records an inner chunk."""
    content = {
        "format_version": 1,
        "source": [{"name": SHARD, "size_bytes": 1, "num_samples": images, "content_hash": "0"}],
        "teacher": {**TEACHER, **SHAPES, "block": 18, "license": "", "weights_origin": ""},
        "views": ViewConfig().identity(),
        "num_views": num_views,
        "codec": {"name": "sketch", "version": 2, "parameters": {}},
        "environment": ENVIRONMENT | {"zarr": ""},
    }
    content = json.loads(json.dumps(content))
    spec_id = OldManifest.model_validate(content).spec_id
    attributes = {"tinymim": content, "tinymim_digest": digest_hex(canonical_json(content))}
    group = {"attributes": {}, "node_type": "group", "zarr_format": 3}
    keys = key_arrays(keys_of(images))
    rows = images * num_views
    base = {"box": np.ones((rows, 4), "<i4"), "flip": np.zeros(rows, "u1")}
    folder = f"units/{SHARD[:-4]}/v0-{num_views - 1}"
    files = {"zarr.json": canonical_json(group)}
    for name, values in {**keys, **base, "digest": image_major(records.digest, images, num_views, "<u8")}.items():
        files |= old_array(name, values, max(len(values), 1))
    for name in ARRAYS:
        files |= old_array(name, image_major(partial(records.array, name), images, num_views, "u1"), 64)
    record = {
        "format_version": 1,
        "spec_id": spec_id,
        "shard": {"name": SHARD, "content_hash": "0"},
        "unit": folder,
        "first_view": 0,
        "num_views": num_views,
        "num_images": images,
        "num_records": rows,
        "key_digest": digest_hex(keys["key_ends"].tobytes() + keys["key_bytes"].tobytes()),
        "statistics": {},
        "files": {
            path: {"size_bytes": len(data), "blake2b": digest_hex(data), "crc32c": crc32c(data)}
            for path, data in files.items()
        },
    }
    signed = canonical_json(record | {"record_digest": digest_hex(canonical_json(record))})
    found = {f"{folder}/{path}": data for path, data in files.items()}
    found |= {f"commits/{SHARD[:-4]}.v0-{num_views - 1}.json": signed}
    found |= {"zarr.json": canonical_json(group | {"attributes": attributes})}
    LocalStore(place).create_all(found)


def old_array(name: str, values: Array, chunk: int) -> dict[str, bytes]:
    """The files of an array in format 1."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    length, chunk = max(len(values), 1), min(chunk, max(len(values), 1))
    array = zarr.create_array(
        store=MemoryStore(files),
        name=name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=(-(-length // chunk) * chunk, *values.shape[1:]),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    found = {path: data.to_bytes() for path, data in files.items() if path.startswith(f"{name}/")}
    metadata = json.loads(found[f"{name}/zarr.json"])
    found[f"{name}/zarr.json"] = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode("ascii")
    return found


def image_major(view: Callable[[int], Array], images: int, num_views: int, dtype: str) -> Array:
    """Rows [I * V, ...]: the views of an image one after the other."""
    first = view(0)
    rows = np.empty((images, num_views, *first.shape[1:]), dtype)
    for number in range(num_views):
        rows[:, number] = view(number)
    return rows.reshape(images * num_views, *first.shape[1:])


def keys_of(images: int) -> list[str]:
    return [f"n{image:08d}" for image in range(images)]


# ---- counting


class Counted:
    """Bytes that a function has returned."""

    def __init__(self) -> None:
        self.bytes = 0

    def wrap(self, function: Callable[..., bytes]) -> Callable[..., bytes]:
        def counting(*arguments: Any) -> bytes:
            data = function(*arguments)
            self.bytes += len(data)
            return data

        return counting


preads, reads = Counted(), Counted()


@contextmanager
def counting() -> Iterator[None]:
    """Count what is read from files."""
    os.pread = preads.wrap(os.pread)
    LocalStore.read = reads.wrap(LocalStore.read)  # type: ignore[method-assign]
    yield


if __name__ == "__main__":
    with counting():
        sys.exit(main())
