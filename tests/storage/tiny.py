"""Tiny deterministic caches for the storage tests, and a writer process to kill."""

import itertools
import json
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tinymim.storage import atomic, leases
from tinymim.storage.atomic import canonical_json
from tinymim.storage.layout import UnitId
from tinymim.storage.manifest import Manifest, SourceShard
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter

COMMITTED_CACHE = Path(__file__).parents[1] / "data" / "cache_v1"
MADE_WITH_ZARR = "3.1.6"


def make_manifest(num_shards: int = 2, num_views: int = 3, num_samples: int = 3, **sections: Any) -> Manifest:
    """A small manifest; `sections` update the sections of that name."""
    teacher = {
        "name": "vit_tiny_patch16_224",
        "arch": {"depth": 2},
        "weights_sha256": "ab" * 32,
        "weights_origin": "hub",
        "license": "apache-2.0",
        "block": 2,
        "heads": 3,
        "head_dim": 64,
        "tokens": 197,
        "prefix_tokens": 1,
        "grid": (14, 14),
        "precision": "fp32",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    views = {
        "size": 224,
        "scale": (0.2, 1.0),
        "ratio": (0.75, 1.25),
        "interpolation": "bicubic",
        "flip": 0.5,
        "seed": 0,
    }
    codec = {"name": "sketch", "version": 1, "parameters": {"rows": 4, "tail_k": 2}}
    environment = {"tinymim": "0.1.0", "zarr": MADE_WITH_ZARR, "canary": "00ff"}
    return Manifest(
        source=tuple(SourceShard(f"train-{i:03d}.tar", 1000 + i, num_samples, f"hash{i}") for i in range(num_shards)),
        teacher=teacher | sections.get("teacher", {}),
        views=views | sections.get("views", {}),
        num_views=num_views,
        codec=codec | sections.get("codec", {}),
        environment=environment | sections.get("environment", {}),
    )


def make_unit(unit: UnitId, num_images: int = 3) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """Keys and arrays that depend only on shard, image and view, by integer arithmetic."""
    keys = [f"{unit.shard[:-4]}/é{image}" for image in range(num_images)]
    image = np.repeat(np.arange(num_images, dtype=np.uint64), unit.num_views)
    view = np.tile(np.array(unit.views, dtype=np.uint64), num_images)
    seed = np.uint64(sum(unit.shard.encode())) + image * np.uint64(7919) + view * np.uint64(104729)
    with np.errstate(over="ignore"):
        mixed = seed * np.uint64(0x9E3779B97F4A7C15)
        noise = (mixed[:, None] * (np.arange(1, 25, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))) >> 40
    arrays: dict[str, npt.NDArray[Any]] = {
        "box": (noise[:, :4] % 100).astype(np.int32),
        "flip": np.zeros(len(mixed), np.uint8),  # only the fill value: must still be on disk
        "digest": mixed,
        "qk_index": (noise % 197).astype(np.uint8).reshape(-1, 3, 4, 2),
        "qk_scale": (noise[:, :3] / 2.0**24).astype(np.float16),
    }
    return keys, arrays


def write_units(writer: CacheWriter, units: list[UnitId], num_images: int = 3) -> None:
    """Write those of `units` that are not committed yet."""
    for unit in units:
        if unit not in writer.committed():
            keys, arrays = make_unit(unit, num_images)
            writer.write_unit(unit, keys, arrays, {"kept_mass": 0.25 * unit.num_views, "unreadable": 0})


def units_of(manifest: Manifest) -> list[UnitId]:
    """One unit of all views for every shard."""
    return [UnitId(shard.name, 0, manifest.num_views) for shard in manifest.source]


def make_tiny_cache(path: Path | str) -> Manifest:
    """The cache of `tests/data/cache_v1`: three units, the second shard partial."""
    manifest = make_manifest()
    first, second = (shard.name for shard in manifest.source)
    with CacheWriter.open(path, manifest) as writer:
        write_units(writer, [UnitId(first, 0, 2), UnitId(second, 0, 2), UnitId(first, 2, 1)])
    return manifest


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path`, by relative path."""
    files = (item for item in path.rglob("*") if item.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def bury_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat writers that an exception ended in this process as dead processes."""
    numbers = itertools.count()
    monkeypatch.setattr(leases, "_started", lambda pid: str(next(numbers)))
    monkeypatch.setattr(atomic, "process_exists", lambda pid: False)


def lease_of_the_dead(cache: Path, name: str) -> Path:
    """The lease of a dead process of this machine."""
    store = open_store(cache)
    dead = leases.Leases(store)
    assert dead.claim(name)
    dead._stop.set()
    [path] = dead._generations(name).values()
    owner = json.loads(store.read(path, leases.LIMIT_BYTES))
    store.write(path, canonical_json(owner | {"started": "0"}))
    return cache / path


def write_and_be_killed(path: Path, manifest: Manifest, opened: Connection) -> None:
    """Run a writer process: report when the cache is open, write missing units, wait for the end."""
    with CacheWriter.open(path, manifest) as writer:
        opened.send("open")
        write_units(writer, units_of(manifest))
        opened.poll(None)
