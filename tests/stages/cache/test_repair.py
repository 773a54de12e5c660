"""`tinymim cache repair`: the cache gets the bytes that it had, and nothing good is computed again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.load import dump_recipe
from tinymim.stages.cache import repair
from tinymim.stages.units import draft
from tinymim.stages.units.constants import calibrated
from tinymim.storage.layout import METADATA
from tinymim.storage.leases import Leases
from tinymim.storage.store import open_store
from tinymim.tests.stages.cache.caches import flip, hidden, recipe, repaired
from tinymim.tests.stages.tiny import run_in, tree, write_teacher

Run = Callable[..., tuple[int, str, str]]


# ---------------------------------------------------------------- repair


def test_a_repaired_cache_has_the_bytes_that_it_had(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cache = tree(home / "cache"), home / "cache"
    flip(cache / METADATA, 200)
    (cache / "units" / METADATA).unlink()
    # Both units of one shard: they must not come back as one.
    (cache / "units/shard-000000/v0-1/box/c/0/0").unlink()
    flip(cache / "units/shard-000000/v2-2/digest/c/0")
    flip(cache / "commits/shard-000001.v2-2.json", 80)
    (cache / "units/shard-000001" / METADATA).write_text("{}")
    for record in cache.glob("commits/shard-000002.*"):
        record.unlink()
    shutil.copytree(cache / "units/shard-000002/v2-2", cache / "units/shard-000002/v3-3")
    encoded = []
    encode = draft.encode

    def counted(*args: Any) -> Any:
        encoded.append(len(args[2].keys))
        return encode(*args)

    monkeypatch.setattr("tinymim.stages.units.job.encode", counted)
    report = repaired(home, made)
    assert tree(cache) == whole
    # 8 images of shards 0 and 2 in three views, and one view of shard 1.
    assert sum(encoded) == 24 + 8 + 24
    both = [f"shard-00000{shard}.tar {views}" for shard in range(3) for views in ("v0-1", "v2-2")]
    assert report["computed"] == [unit for unit in both if unit != "shard-000001.tar v0-1"]
    assert report["rewritten"][0] == METADATA and "units/shard-000001/zarr.json" in report["rewritten"]
    assert report["removed"] == [f"units/shard-000002/v{views}/" for views in ("0-1", "2-2", "3-3")]
    encoded.clear()
    assert repaired(home, made)["findings"] == 0 and not encoded and tree(cache) == whole


def test_a_recipe_that_the_cache_was_not_made_by_touches_nothing(home: Path, made: Path) -> None:
    flip(home / "cache/units/shard-000000/v2-2/digest/c/0")
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
        repaired(home, made, codec={"rows": 5})
    before.pop(METADATA)
    assert tree(home / "cache") == before
    with pytest.raises(UserError, match="there is no cache"):
        repaired(home, made, cache=home / "nowhere")
    assert not (home / "nowhere").exists()


def test_views_beyond_the_recipes_and_shards_outside_its_source_are_not_lost(home: Path, made: Path) -> None:
    whole = tree(home / "cache")
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    with pytest.raises(CacheCorrupt, match="shards that the recipe's source lacks"):
        repaired(home, made, source={"shards": made / "shards", "pattern": "*[01].tar"})
    assert (home / "cache/commits/shard-000002.v2-2.json").exists()
    repaired(home, made, num_views=2)
    assert tree(home / "cache") == whole


def test_a_shard_that_somebody_is_writing_is_left_alone(home: Path, made: Path) -> None:
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    leases = Leases(open_store(home / "cache"))
    assert leases.claim("units/shard-000002")
    with pytest.raises(UserError, match="a writer is active"):
        repaired(home, made)
    leases.close()
    assert (home / "cache/commits/shard-000002.v2-2.json").exists()


def rehidden(root: Path, made: Path) -> dict[str, Any]:
    return repair.run(hidden(made, cache=root / "hidden", run=run_in(root / "run")))


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: flip(cache / "constants/qkv_weight/c/0/0"),
        lambda cache: flip(cache / "constants.json", 30),
        lambda cache: (cache / "constants.json").unlink(),
        lambda cache: [shutil.move(cache / name, cache.parent) for name in ("constants", "constants.json")],
    ],
)
def test_constants_are_made_again(home: Path, made: Path, damage: Callable[[Path], object]) -> None:
    whole = tree(home / "hidden")
    damage(home / "hidden")
    flip(home / "hidden/units/shard-000002/v0-1/digest/c/0")
    assert rehidden(home, made)["computed"] == ["shard-000002.tar v0-1"]
    assert tree(home / "hidden") == whole


def test_a_cache_without_one_whole_record_is_calibrated_anew(home: Path, made: Path) -> None:
    whole = tree(home / "hidden")
    flip(home / "hidden/constants.json", 30)
    for record in (home / "hidden/commits").iterdir():
        flip(record, 80)
    assert len(rehidden(home, made)["computed"]) == 3 and tree(home / "hidden") == whole


def test_constants_that_come_out_otherwise_are_not_written(
    home: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(home / "hidden/constants/qkv_weight/c/0/0")
    before = tree(home / "hidden")
    monkeypatch.setattr(
        "tinymim.stages.cache.repair.calibrated", lambda *a: {n: v * 2 for n, v in calibrated(*a).items()}
    )
    with pytest.raises(CacheCorrupt, match="cannot be recomputed"):
        rehidden(home, made)
    assert tree(home / "hidden") == before


def test_repair_prints_what_it_did(home: Path, made: Path, run: Run) -> None:
    flip(home / "cache/units/shard-000002/v2-2/digest/c/0")
    own = run_in(home / "run")
    (home / "recipe.yaml").write_text(dump_recipe(recipe(made, cache=home / "cache", run=own)))
    code, out, err = run("cache", "repair", home / "recipe.yaml", "--json")
    assert code == 0 and json.loads(out)["computed"] == ["shard-000002.tar v2-2"] and "digest/c/0" in err
    code, text, _ = run("cache", "repair", home / "recipe.yaml")
    assert code == 0 and "0 finding(s)" in text
