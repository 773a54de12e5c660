"""Every codec, every published tail, and every kind, through both stages: what it stores teaches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.stages import cache_teacher, train_student
from tinymim.storage.reader import CacheReader
from tinymim.tests.stages.tiny import cache_recipe, losses, student_recipe


@pytest.mark.parametrize(
    "codec",
    [
        {"rows": 6, "head_k": 14, "tail": "renormalise"},
        {"rows": 99, "head_k": 3, "tail": "uniform"},
        {"rows": 6, "head_k": 3, "tail": "ghost", "relation_heads": 4},
        {"rows": 6, "relation_heads": 1, "relations": ["vv", "kk"]},
        {"name": "dense", "relations": ["qq"]},
    ],
    ids=str,
)
def test_every_codec_teaches(home: Path, codec: dict[str, Any]) -> None:
    place = home / "other"
    cache_teacher.run(cache_recipe(home, cache=place, codec=codec, audit_views=4))
    train_student.run(student_recipe(home, cache=place))
    found = losses(home)
    assert np.mean(found[-4:]) < 0.9 * np.mean(found[:4])
    reader = CacheReader(place)
    fidelity = reader.units(reader.layer().name)[0].statistics["fidelity"]
    assert set(fidelity) == {"views", "all", *codec.get("relations", ["qk", "vv"])}


@pytest.mark.parametrize(
    "codec",
    [
        {"kind": "ff", "rows": 8},
        {"kind": "gram", "rows": 8, "columns": 8},
        {"kind": "features", "tokens": 8},
        {"kind": "features", "name": "pq", "stages": 3, "calibration_views": 8, "target": "whiten"},
        {"kind": "cls"},
        {"kind": "bank", "anchors": 20, "tau": 0.5},
        {"kind": "attention", "rows": 8},
    ],
    ids=str,
)
def test_every_kind_teaches(home: Path, codec: dict[str, Any]) -> None:
    place = home / "other"
    cache_teacher.run(cache_recipe(home, cache=place, codec=codec, audit_views=4))
    train_student.run(student_recipe(home, cache=place, optim={"batch_size": 8, "steps": 30, "base_lr": 0.3}))
    found = losses(home)
    assert np.isfinite(found).all() and np.mean(found[-6:]) < np.mean(found[:6])
    reader = CacheReader(place)
    fidelity = reader.units(reader.layer().name)[0].statistics["fidelity"]
    assert set(fidelity) == {"views", "all", codec["kind"]}
