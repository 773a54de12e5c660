"""`tinymim cache repair`: the cache gets the bytes that it had, and nothing good is computed again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.load import dump_recipe
from tinymim.stages.units import draft
from tinymim.stages.units.constants import calibrated
from tinymim.storage.layout import METADATA
from tinymim.storage.leases import Leases, shard_lease
from tinymim.storage.store import open_store
from tinymim.tests.stages.cache.caches import HIDDEN_LAYER, SKETCH_LAYER, flip, hidden, recipe, repaired
from tinymim.tests.stages.tiny import run_in, tree, write_teacher

Run = Callable[..., tuple[int, str, str]]
SKETCH = f"layers/{SKETCH_LAYER}"
OTHER = f"layers/{HIDDEN_LAYER}"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Views of each batch that goes through the teacher."""
    found: list[int] = []
    encode = draft.encode

    def counted(*args: Any) -> Any:
        found.append(len(args[2].keys))
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", counted)
    return found


def test_a_repaired_cache_has_the_bytes_that_it_had(home: Path, made: Path, encoded: list[int]) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    flip(cache / METADATA, 200)
    flip(cache / SKETCH / METADATA, 200)
    (cache / "layers" / METADATA).unlink()
    # Both units of one shard: they must not come back as one.
    (cache / SKETCH / "shard-000000/v0-1.zip").unlink()
    flip(cache / SKETCH / "shard-000000/v2-2.zip", 3000)
    flip(cache / SKETCH / "shard-000001/v2-2.json", 80)
    for record in (cache / SKETCH / "shard-000002").glob("*.json"):
        record.unlink()
    shutil.copy(cache / SKETCH / "shard-000002/v2-2.zip", cache / SKETCH / "shard-000002/v3-3.zip")
    report = repaired(home, made)
    assert tree(cache) == whole
    # 8 images of shards 0 and 2 in three views, and one view of shard 1.
    assert sum(encoded) == 24 + 8 + 24
    both = [f"{SKETCH_LAYER} shard-00000{shard}.tar {views}" for shard in range(3) for views in ("v0-1", "v2-2")]
    assert report["computed"] == [unit for unit in both if not unit.endswith("shard-000001.tar v0-1")]
    assert report["rewritten"] == [METADATA, f"{SKETCH}/{METADATA}", f"layers/{METADATA}"]
    assert report["removed"] == [f"{SKETCH}/shard-000002/v{views}.zip" for views in ("0-1", "2-2", "3-3")]
    encoded.clear()
    assert repaired(home, made)["findings"] == 0 and not encoded and tree(cache) == whole


def test_views_come_back_without_the_teacher(home: Path, made: Path, encoded: list[int]) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    flip(cache / "views/shard-000000/v0-1.zip", 2000)
    (cache / "views/shard-000001/v2-2.json").unlink()
    for name in ("v0-1", "v2-2"):
        for ending in ("json", "zip"):
            (cache / f"views/shard-000002/{name}.{ending}").unlink()
    report = repaired(home, made)
    assert tree(cache) == whole and not encoded
    assert report["computed"] == [
        "views shard-000000.tar v0-1",
        "views shard-000001.tar v2-2",
        "views shard-000002.tar v0-1",
        "views shard-000002.tar v2-2",
    ]


def test_both_layers_of_damaged_views_come_back(home: Path, made: Path) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    for path in ("views", SKETCH):
        flip(cache / path / "shard-000001/v0-1.json", 60)
        flip(cache / path / "shard-000002/v2-2.zip")
    assert len(repaired(home, made)["computed"]) == 4 and tree(cache) == whole


def test_damage_of_another_layer_is_left_and_said(home: Path, made: Path, run: Run) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    flip(cache / OTHER / "shard-000001/v0-1.zip", 1500)
    flip(cache / SKETCH / "shard-000001/v0-1.zip", 1500)
    (home / "recipe.yaml").write_text(dump_recipe(recipe(made, cache=cache, run=run_in(home / "run"))))
    code, text, err = run("cache", "repair", home / "recipe.yaml")
    assert code == 2 and f"computed    {SKETCH_LAYER} shard-000001.tar v0-1" in text
    assert f"left        {OTHER}/shard-000001/v0-1.zip" in text and "the recipe of that layer" in err
    report = repaired(home, made, of=hidden)
    assert report["computed"] == [f"{HIDDEN_LAYER} shard-000001.tar v0-1"] and report["left"] == []
    assert tree(cache) == whole
    with pytest.raises(UserError, match="has no layer"):
        repaired(home, made, layer="unheard-of")
    assert tree(cache) == whole


def test_a_recipe_that_the_cache_was_not_made_by_touches_nothing(home: Path, made: Path) -> None:
    flip(home / "cache" / SKETCH / "shard-000000/v2-2.zip")
    write_teacher(home / "other.safetensors", seed=1)
    before = tree(home / "cache")
    for changes in (
        {"codec": {"rows": 5}},
        {"teacher": recipe(made).teacher.model_dump() | {"weights": str(home / "other.safetensors")}},
        {"views": {"size": 32, "scaled_decode": False, "seed": 1}},
    ):
        with pytest.raises(CacheMismatch):
            repaired(home, made, **changes)
    (home / "cache" / METADATA).unlink()
    with pytest.raises(CacheMismatch, match="cannot be rebuilt"):
        repaired(home, made, views={"size": 32, "scaled_decode": False, "seed": 1})
    before.pop(METADATA)
    assert tree(home / "cache") == before
    with pytest.raises(UserError, match="there is no cache"):
        repaired(home, made, cache=home / "nowhere")
    assert not (home / "nowhere").exists()


def test_views_beyond_the_recipes_and_shards_outside_its_source_are_not_lost(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    flip(home / "cache" / SKETCH / "shard-000002/v2-2.zip")
    with pytest.raises(CacheCorrupt, match="shards that the recipe's source lacks"):
        repaired(home, made, source={"shards": made / "shards", "pattern": "*[01].tar"})
    assert (home / "cache" / SKETCH / "shard-000002/v2-2.json").exists()
    repaired(home, made, num_views=2)
    assert tree(home / "cache") == whole


def test_a_shard_that_somebody_is_writing_is_left_alone(home: Path, made: Path) -> None:
    flip(home / "cache" / SKETCH / "shard-000002/v2-2.zip")
    leases = Leases(open_store(home / "cache"))
    assert leases.claim(shard_lease("shard-000002.tar"))
    with pytest.raises(UserError, match="a writer is active"):
        repaired(home, made)
    leases.close()
    assert (home / "cache" / SKETCH / "shard-000002/v2-2.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda layer: flip(layer / "constants.zip", 1500),
        lambda layer: flip(layer / "constants.json", 30),
        lambda layer: (layer / "constants.json").unlink(),
        lambda layer: [(layer / name).unlink() for name in ("constants.zip", "constants.json")],
    ],
)
def test_constants_are_made_again(home: Path, made: Path, damage: Callable[[Path], object]) -> None:
    whole = tree(home / "cache")
    damage(home / "cache" / OTHER)
    flip(home / "cache" / OTHER / "shard-000002/v0-1.zip", 1500)
    assert repaired(home, made, of=hidden)["computed"] == [f"{HIDDEN_LAYER} shard-000002.tar v0-1"]
    assert tree(home / "cache") == whole


def test_a_layer_without_one_whole_record_is_calibrated_anew(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    flip(home / "cache" / OTHER / "constants.json", 30)
    for record in (home / "cache" / OTHER).glob("*/*.json"):
        flip(record, 80)
    assert len(repaired(home, made, of=hidden)["computed"]) == 3 and tree(home / "cache") == whole


def test_constants_that_come_out_otherwise_are_not_written(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(home / "cache" / OTHER / "constants.zip", 1500)
    before = tree(home / "cache")
    monkeypatch.setattr(
        "tinymim.stages.cache.repair.calibrated", lambda *a: {n: v * 2 for n, v in calibrated(*a).items()}
    )
    with pytest.raises(CacheCorrupt, match="cannot be recomputed"):
        repaired(home, made, of=hidden)
    assert tree(home / "cache") == before


def test_repair_prints_what_it_did(home: Path, made: Path, run: Run) -> None:
    flip(home / "cache" / SKETCH / "shard-000002/v2-2.zip")
    own = run_in(home / "run")
    (home / "recipe.yaml").write_text(dump_recipe(recipe(made, cache=home / "cache", run=own)))
    code, out, err = run("cache", "repair", home / "recipe.yaml", "--json")
    assert code == 0 and json.loads(out)["computed"] == [f"{SKETCH_LAYER} shard-000002.tar v2-2"]
    assert "shard-000002/v2-2.zip: its tail" in err
    code, text, _ = run("cache", "repair", home / "recipe.yaml")
    assert code == 0 and "0 finding(s)" in text
