"""A small cache of any source, written without a teacher: its records are functions of key and view."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinymim.configs.sections.views import ViewConfig
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.decode import environment
from tinymim.pipeline.shards import Shard, ShardSet
from tinymim.pipeline.views import RandomViews, view_key
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.writer import CacheWriter

ARRAYS = ("code", "scale")
Ranges = Sequence[tuple[int, int]]  # first view and number of views of each unit


def manifest_of(source: ShardSet, law: ViewConfig) -> Manifest:
    shards = [SourceShard(each.name, each.size_bytes, each.num_samples, each.content_hash) for each in source.shards]
    return Manifest(tuple(shards), law.identity(), environment() | RandomViews(law).canaries)


Records = Callable[[Sequence[str], Sequence[int]], dict[str, npt.NDArray[Any]]]


def layer_of(manifest: Manifest, name: str, **sections: Any) -> Layer:
    """A layer of `records_of`, but for the `sections` given."""
    teacher = {
        "name": "vit",
        "arch": {},
        "shapes": {"heads": 1, "head_dim": 8, "tokens": 5, "prefix_tokens": 1, "grid": [2, 2]},
        "weights_sha256": "ab" * 32,
        "weights_origin": None,
        "license": None,
        "precision": "fp32",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    arrays = {"code": {"dtype": "uint8", "shape": [8, 1]}, "scale": {"dtype": "float16", "shape": [2]}}
    target = {"taps": ["qkv@1"], "name": name, "version": 1, "parameters": {}, "arrays": arrays}
    fields: dict[str, Any] = {"teacher": teacher, "target": target} | sections
    return Layer(name, manifest.spec_id, environment=environment(), **fields)


def records_of(keys: Sequence[str], views: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """The records of all `keys` in all `views`, arrays [k, I, ...]."""
    identities = np.array([[view_key(0, key, view) for key in keys] for view in views], dtype=np.int64)
    codes = identities.view(np.uint8).reshape(len(views), len(keys), 8, 1)
    return {"code": codes, "scale": codes[:, :, :2, 0].astype(np.float16)}


def write_cache(
    place: Path,
    source: ShardSet,
    law: ViewConfig,
    layers: Mapping[str, Ranges],
    shards: Sequence[Shard] | None = None,
    lost: Sequence[str] = (),
    records: Records = records_of,
    **sections: Any,
) -> None:
    """Write the units of these shards, or add to them, for the view layer and other layers by name.

    Args:
        place: the cache, which may exist.
        source: all shards of the manifest.
        law: the view law.
        layers: the units of each layer.
        shards: the shards whose units are written; None: all.
        lost: keys without a record, although no decoder refused them.
        records: the records of keys and views, arrays [k, I, ...].
        sections: other sections of the layers than those of `records_of`.
    """
    manifest = manifest_of(source, law)
    drawn = ImageViews(source.shards, RandomViews(law), law.seed)
    described = [layer_of(manifest, name, **sections) for name in layers if name != VIEWS]
    with CacheWriter.open(place, manifest, described) as writer:
        for number, shard in enumerate(source.shards):
            if shard not in (shards or source.shards):
                continue
            everything = shard.members().keys
            places = [place for place, key in enumerate(everything) if key not in lost]
            keys = [everything[place] for place in places]
            for layer, ranges in layers.items():
                for unit in (UnitId(shard.name, *each) for each in ranges):
                    with writer.begin(layer, unit, keys) as draft:
                        for view in unit.views:
                            if layer == VIEWS:
                                items = np.array([[number, each, view] for each in places], np.int64).reshape(-1, 3)
                                draft.add({name: each[None] for name, each in drawn.batch(items).stored().items()})
                            else:
                                draft.add(records(keys, [view]))
                        draft.commit({"unreadable": []} if layer == VIEWS else {})
                    writer.give_back(unit)
