"""The code on docs/cache-format.md runs, and reads what tinymim wrote."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, SourceShard
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter

PAGE = Path(__file__).parents[1] / "docs" / "cache-format.md"
TARGET = {
    "taps": ["tokens@2"],
    "name": "some",
    "version": 1,
    "parameters": {},
    "arrays": {"code": {"dtype": "uint8", "shape": [5]}, "scale": {"dtype": "float16", "shape": []}},
}
TEACHER = {
    "name": "vit_tiny_patch16_224",
    "arch": {},
    "shapes": {"heads": 3, "head_dim": 64, "tokens": 197, "prefix_tokens": 1, "grid": [14, 14]},
    "weights_sha256": "ab" * 32,
    "weights_origin": None,
    "license": None,
    "precision": "fp32",
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}
VIEW_LAW = {"size": 224, "scale": [0.2, 1.0], "ratio": [0.75, 1.25], "interpolation": "bicubic", "flip": 0.5, "seed": 0}
ENVIRONMENT = {"tinymim": "0.1.0", "canary": "00ff"}


def test_page_reads_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records: dict[str, np.ndarray[Any, Any]] = {
        "code": np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5),
        "scale": np.arange(12, dtype=np.float16).reshape(3, 4),
    }
    manifest = Manifest((SourceShard("train-000.tar", 10, 4, "hash"),), VIEW_LAW, ENVIRONMENT)
    layer = Layer("mine", manifest.spec_id, TEACHER, TARGET, ENVIRONMENT)
    unit = UnitId("train-000.tar", 0, 3)
    keys = [f"key{number}" for number in range(4)]
    with CacheWriter.open(tmp_path / "caches" / "mine", manifest, [layer]) as writer:
        with writer.begin(VIEWS, unit, keys) as draft:
            draft.add({"digest": np.zeros((3, 4), np.uint32)})
            draft.commit({})
        with writer.begin("mine", unit, keys) as draft:
            draft.add(records)
            draft.commit({})

    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)

    assert len(blocks) == 2
    assert capsys.readouterr().out.strip() == "{'code': (3, 4, 5), 'scale': (3, 4)}"
    found = names["records"]
    for name, values in records.items():
        np.testing.assert_array_equal(found[name][...], values)  # type: ignore[index]
    reader = CacheReader(tmp_path / "caches" / "mine")
    [info] = reader.units("mine")
    assert names["block"] == (tmp_path / "caches" / "mine" / info.path).read_bytes()[slice(*info.parts.places()[1:3])]
