"""Caches of sketches of random tensors, for students of `tiny.py`, written without a teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.configs.taps import Shapes
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import view_key
from tinymim.targets.kinds import make_kind
from tinymim.tests.pipeline.cached import Ranges, layer_of, manifest_of, write_cache

LAW = ViewConfig(size=32)
SHAPES = Shapes(heads=2, head_dim=8, tokens=17, prefix_tokens=1, grid=(4, 4))
CODEC = SketchCodec(name="sketch", rows=6, tail_k=3)
KIND = make_kind(CODEC, 2)


def sketches(keys: Sequence[str], views: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Sketches of random q, k, v, arrays [k, I, ...]."""
    parts = []
    for view in views:
        seeds = [view_key(0, key, view) for key in keys]
        qkv = [
            torch.randn(3, SHAPES.heads, SHAPES.tokens, SHAPES.head_dim, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        parts.append(KIND.encode({KIND.taps[0]: tuple(torch.stack(qkv).unbind(1))}, torch.tensor(seeds)))
    return {name: torch.stack([part[name] for part in parts]).numpy() for name in parts[0]}


def grow(root: Path, layers: Mapping[str, Ranges], shards: slice = slice(None), law: ViewConfig = LAW) -> None:
    """Write units of these layers into `root/cache`, which may exist, for some of the shards of `root/shards`."""
    source = open_shards(SourceConfig(shards=root / "shards"))
    plain = layer_of(manifest_of(source, law), "plain")
    target = {
        "taps": [str(tap) for tap in KIND.taps],
        "name": KIND.name,
        "version": KIND.version,
        "parameters": CODEC.model_dump(mode="json"),
        "arrays": {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in KIND.specs(SHAPES)},
    }
    teacher = {**plain.teacher, "shapes": asdict(SHAPES) | {"grid": list(SHAPES.grid)}}
    write_cache(
        root / "cache", source, law, layers, source.shards[shards], records=sketches, teacher=teacher, target=target
    )
