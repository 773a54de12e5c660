"""Tiny deterministic caches of two layers for the storage tests."""

import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.storage import atomic, leases
from tinymim.storage.atomic import canonical_json
from tinymim.storage.blocks import Array
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter

COMMITTED_CACHE = Path(__file__).parents[1] / "data" / "cache_v2"
MADE_WITH_NUMCODECS = "0.16.6"  # another zstd may compress otherwise
VIEWS_PER_UNIT = 3
REL, CLS = "rel", "cls"
ARRAYS = {
    REL: {"qk_index": {"dtype": "uint8", "shape": [3, 4, 2]}, "qk_scale": {"dtype": "float16", "shape": [3]}},
    CLS: {"code": {"dtype": "int32", "shape": [5]}, "sure": {"dtype": "bool", "shape": []}},
}


def make_manifest(num_shards: int = 2, num_samples: int = 3, **sections: Any) -> Manifest:
    """A small manifest; `sections` update the sections of that name."""
    views = {
        "size": 224,
        "scale": (0.2, 1.0),
        "ratio": (0.75, 1.25),
        "interpolation": "bicubic",
        "flip": 0.5,
        "seed": 0,
    }
    environment = {"tinymim": "0.2.0", "zarr": "3.1.6", "canary": "00ff"}
    return Manifest(
        source=tuple(SourceShard(f"train-{i:03d}.tar", 1000 + i, num_samples, f"hash{i}") for i in range(num_shards)),
        views=views | sections.get("views", {}),
        environment=environment | sections.get("environment", {}),
    )


def make_layer(manifest: Manifest | None = None, name: str = REL, **sections: Any) -> Layer:
    """A target layer of a manifest; `sections` update the sections of that name."""
    manifest = manifest or make_manifest()
    teacher = {
        "name": "vit_tiny_patch16_224",
        "arch": {"depth": 2},
        "weights_sha256": "ab" * 32,
        "weights_origin": "hub",
        "license": "apache-2.0",
        "shapes": {"heads": 3, "head_dim": 64, "tokens": 197, "prefix_tokens": 1, "grid": (14, 14)},
        "precision": "fp32",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    target = {
        "taps": ["qkv@2"],
        "name": "sketch",
        "version": 2,
        "parameters": {"rows": 4, "tail_k": 2},
        "arrays": ARRAYS.get(name, ARRAYS[REL]),
    }
    return Layer(
        name=name,
        cache=manifest.spec_id,
        teacher=teacher | sections.get("teacher", {}),
        target=target | sections.get("target", {}),
        environment=dict(manifest.environment) | sections.get("environment", {}),
    )


def make_keys(shard: str, num_images: int = 3) -> list[str]:
    """The keys of a shard."""
    return [f"{shard[:-4]}/é{image}" for image in range(num_images)]


def make_arrays(layer: str, unit: UnitId, num_images: int = 3) -> dict[str, Array]:
    """Arrays [V, I, ...] that depend only on layer, shard, image and view, by integer arithmetic."""
    image = np.arange(num_images, dtype=np.uint64)[None, :]
    view = np.array(unit.views, dtype=np.uint64)[:, None]
    seed = np.uint64(sum(f"{layer} {unit.shard}".encode())) + image * np.uint64(7919) + view * np.uint64(104729)
    with np.errstate(over="ignore"):
        mixed = seed * np.uint64(0x9E3779B97F4A7C15)
        noise = (mixed[..., None] * (np.arange(1, 25, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))) >> 40
    if layer == VIEWS:
        return {"digest": (mixed >> np.uint64(32)).astype("<u4")}
    if layer == CLS:
        return {"code": (noise[..., :5] % 1000).astype("<i4"), "sure": np.zeros(mixed.shape, "?")}  # only fill values
    return {
        "qk_index": (noise % 197).astype("u1").reshape(*mixed.shape, 3, 4, 2),
        "qk_scale": (noise[..., :3] / 2.0**24).astype("<f2"),
    }


def make_constants(value: float = 1.0) -> dict[str, Array]:
    """Constants of the layer `cls`."""
    return {
        "bits": np.array([3, 0, 8], np.uint8),
        "weight": value * np.arange(50, dtype=np.float32).reshape(10, 5),
    }


def write_units(
    writer: CacheWriter, units: Sequence[UnitId], num_images: int = 3, views_per_part: int = 2, give_back: bool = True
) -> None:
    """Write those of `units` that a layer of the writer does not hold yet, a few views at a time, the views first."""
    for unit in units:
        lacking = [name for name in (VIEWS, *writer.layers) if unit not in writer.of_shard(name, unit.shard)]
        if not lacking:
            continue
        keys = make_keys(unit.shard, num_images)
        with ExitStack() as stack:
            drafts = {name: stack.enter_context(writer.begin(name, unit, keys)) for name in lacking}
            for name, draft in drafts.items():
                arrays = make_arrays(name, unit, num_images)
                for start in range(0, unit.num_views, views_per_part):
                    draft.add({key: values[start : start + views_per_part] for key, values in arrays.items()})
            for draft in drafts.values():
                draft.commit({"kept_mass": 0.25 * unit.num_views, "unreadable": 0})
        if give_back:
            writer.give_back(unit)


def units_of(manifest: Manifest, num_views: int = VIEWS_PER_UNIT) -> list[UnitId]:
    """One unit of all views for every shard."""
    return [UnitId(shard.name, 0, num_views) for shard in manifest.source]


def make_tiny_cache(path: Path | str) -> Manifest:
    """The cache of `tests/data/cache_v2`: a layer of three units, one shard partial; a layer of one, with constants."""
    manifest = make_manifest()
    first, second = (shard.name for shard in manifest.source)
    with CacheWriter.open(path, manifest, [make_layer(manifest)]) as writer:
        write_units(writer, [UnitId(first, 0, 2), UnitId(second, 0, 2), UnitId(first, 2, 1)])
    with CacheWriter.open(path, manifest, [make_layer(manifest, CLS)]) as writer:
        with writer.exclusively_constants(CLS):
            writer.write_constants(CLS, make_constants())
        write_units(writer, [UnitId(first, 0, 2)])
    return manifest


def make_whole_cache(path: Path | str, manifest: Manifest, num_images: int = 3) -> dict[str, bytes]:
    """Write every unit of a cache with the layer `rel` in one go; the files where `path` is a folder."""
    with CacheWriter.open(path, manifest, [make_layer(manifest)]) as writer:
        write_units(writer, units_of(manifest), num_images)
    return tree(path) if isinstance(path, Path) else {}


def tree(path: Path) -> dict[str, bytes]:
    """Every file below `path`, by relative path."""
    files = (item for item in path.rglob("*") if item.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def bury_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat writers that an exception ended in this process as dead processes."""
    for module in (atomic, leases):
        monkeypatch.setattr(module, "process_is_dead", lambda pid, started=None: True)


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


def changed(data: bytes, at: int, mask: int = 0xFF) -> bytes:
    """`data` with one byte flipped."""
    return b"".join(itertools.chain([data[:at], bytes([data[at] ^ mask]), data[at + 1 :]]))
