"""An inspection finds everything that is wrong with a cache, and repair without a teacher restores every byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage import layout
from tinymim.storage.check import Finding, check_unit, survey
from tinymim.storage.commit import record_digest
from tinymim.storage.constants import constants_digest
from tinymim.storage.layout import METADATA, UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.manifest import Manifest
from tinymim.storage.repair import rebuild_manifest, repair
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny

FIRST = UnitId("train-000.tar", 0, 2)
PAYLOAD = "units/train-000/v0-1/qk_scale/c/0/0"
COMMIT = "commits/train-000.v0-1.json"
CONSTANTS = {"scale": np.arange(6, dtype=np.float32).reshape(2, 3), "heads": np.array([3])}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def with_constants(tmp_path: Path) -> Path:
    manifest = tiny.make_manifest()
    with CacheWriter.open(tmp_path / "hidden", manifest) as writer:
        writer.write_constants(CONSTANTS)
        tiny.write_units(writer, tiny.units_of(manifest))
    return tmp_path / "hidden"


def inspect(cache: Path) -> list[Finding]:
    store = open_store(cache)
    found = survey(store)
    return found.findings + [finding for info in found.units for finding in check_unit(store, info)]


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


def repaired(cache: Path) -> Manifest:
    """Repair all findings and write dropped units again. Returns the manifest."""
    store = open_store(cache)
    findings = inspect(cache)
    found = survey(store)
    repair(store, found.manifest, constants_digest(store, found.manifest), findings)
    with CacheWriter.open(cache, found.manifest) as writer:
        tiny.write_units(writer, [FIRST, UnitId("train-001.tar", 0, 2), UnitId("train-000.tar", 2, 1)])
    return found.manifest


# ---------------------------------------------------------------- what is sound


def test_whole_caches_are_sound(cache: Path, with_constants: Path) -> None:
    assert inspect(cache) == [] and inspect(with_constants) == [] and inspect(tiny.COMMITTED_CACHE) == []
    found = survey(open_store(cache))
    assert len(found.units) == 3 and found.foreign == [] and found.writers == {}


def test_a_cache_without_units_and_one_of_an_interrupted_writer_with_a_claim_are_sound(tmp_path: Path) -> None:
    manifest = tiny.make_manifest()
    with CacheWriter.open(tmp_path, manifest) as writer:
        assert inspect(tmp_path) == []
        assert writer.claim(FIRST)
        folder = tmp_path / "units" / "train-000" / "v0-1"
        folder.mkdir(parents=True)
        (folder / METADATA).write_bytes(layout.plain_group())
        (tmp_path / "units" / METADATA).write_bytes(layout.plain_group())
        assert inspect(tmp_path) == []
        [holder] = survey(open_store(tmp_path)).writers.values()
        assert "process" in str(holder)


def test_the_lock_of_an_older_writer_is_no_stray(cache: Path) -> None:
    (cache / ".lock").touch()
    assert inspect(cache) == [] and survey(open_store(cache)).foreign == []


# ---------------------------------------------------------------- what is not


def folder_for_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, str, str, str]] = {
    "flipped payload": (lambda c: flip(c / PAYLOAD), "unit", PAYLOAD, "committed checksum"),
    "short payload": (lambda c: (c / PAYLOAD).write_bytes(b"1"), "unit", PAYLOAD, "1 bytes, expected"),
    "long payload": (lambda c: (c / PAYLOAD).write_bytes(bytes(9999)), "unit", PAYLOAD, "9999 bytes"),
    "lost payload": (lambda c: (c / PAYLOAD).unlink(), "unit", PAYLOAD, "missing"),
    "a folder for a file": (lambda c: folder_for_file(c / PAYLOAD), "unit", PAYLOAD, "cannot be read"),
    "lost array metadata": (
        lambda c: (c / "units/train-000/v0-1/box" / METADATA).unlink(),
        "unit",
        "units/train-000/v0-1/box/zarr.json",
        "missing",
    ),
    "flipped record": (lambda c: flip(c / COMMIT, 80), "commit", COMMIT, "damaged"),
    "empty record": (lambda c: (c / COMMIT).write_bytes(b""), "commit", COMMIT, "damaged"),
    "a record of a newer version": (
        lambda c: (c / COMMIT).write_text(json.dumps({"format_version": 2})),
        "commit",
        COMMIT,
        "unknown: 2",
    ),
    "a record under another name": (
        lambda c: shutil.copy(c / COMMIT, c / "commits" / "train-001.v2-2.json"),
        "commit",
        "commits/train-001.v2-2.json",
        "it is about train-000.tar v0-1",
    ),
    "lost units group": (lambda c: (c / "units" / METADATA).unlink(), "group", "units/zarr.json", "missing"),
    "damaged shard group": (
        lambda c: (c / "units" / "train-001" / METADATA).write_text("{}"),
        "group",
        "units/train-001/zarr.json",
        "not what tinymim writes",
    ),
    "damaged unit group": (
        lambda c: flip(c / "units/train-001/v0-1" / METADATA),
        "group",
        "units/train-001/v0-1/zarr.json",
        "checksum",
    ),
    "reformatted manifest": (
        lambda c: (c / METADATA).write_text(json.dumps(json.loads((c / METADATA).read_text()))),
        "group",
        "zarr.json",
        "not what tinymim writes",
    ),
    "a unit that was never committed": (
        lambda c: shutil.copytree(c / "units/train-001/v0-1", c / "units/train-001/v2-2"),
        "stray",
        "units/train-001/v2-2/",
        "never committed",
    ),
    "a shard that the manifest does not know": (
        lambda c: shutil.copytree(c / "units/train-001/v0-1", c / "units/train-007/v0-1"),
        "stray",
        "units/train-007/v0-1/",
        "never committed",
    ),
    "a record that can be of no unit": (
        lambda c: shutil.copy(c / COMMIT, c / "commits" / "train-007.v0-1.json"),
        "stray",
        "commits/train-007.v0-1.json",
        "belongs to nothing",
    ),
    "a file in a unit": (
        lambda c: (c / "units/train-001/v0-1/notes.txt").write_text("mine"),
        "stray",
        "units/train-001/v0-1/notes.txt",
        "belongs to nothing",
    ),
    "constants that no unit has": (
        lambda c: open_store(c).write("constants/zarr.json", layout.plain_group()),
        "stray",
        "constants/zarr.json",
        "belongs to nothing",
    ),
    "a dead writer's lease": (
        lambda c: tiny.lease_of_the_dead(c, "units/train-001"),
        "stray",
        "leases/units/train-001.g1.json",
        "belongs to nothing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_repaired_to_the_same_bytes(cache: Path, name: str) -> None:
    whole = tiny.tree(cache)
    damage, kind, path, what = DAMAGES[name]
    damage(cache)
    [finding] = inspect(cache)
    assert (finding.kind, finding.path) == (kind, path) and what in finding.what
    assert str(finding) == f"{path}: {finding.what}"
    repaired(cache)
    assert inspect(cache) == [] and tiny.tree(cache) == whole


def test_all_of_it_is_found_at_once(cache: Path) -> None:
    whole = tiny.tree(cache)
    flip(cache / PAYLOAD)
    (cache / "units/train-000/v0-1/flip/c/0").unlink()
    flip(cache / "commits/train-001.v0-1.json", 80)
    (cache / "units" / METADATA).unlink()
    (cache / "commits" / "junk").touch()
    shutil.copytree(cache / "units/train-001/v0-1", cache / "units/train-001/v2-2")
    kinds = sorted(finding.kind for finding in inspect(cache))
    assert kinds == ["commit", "group", "stray", "stray", "unit", "unit"]
    repaired(cache)
    assert inspect(cache) == [] and tiny.tree(cache) == whole


def test_the_findings_of_a_unit_name_it(cache: Path) -> None:
    flip(cache / PAYLOAD)
    flip(cache / "commits/train-001.v0-1.json", 80)
    assert {finding.unit for finding in inspect(cache)} == {FIRST, UnitId("train-001.tar", 0, 2)}


def test_a_file_beside_the_caches_own_is_foreign_and_left(cache: Path) -> None:
    (cache / "README.md").write_text("ours")
    assert inspect(cache) == []
    assert survey(open_store(cache)).foreign == ["README.md"]
    repaired(cache)
    assert (cache / "README.md").exists()


def resign(path: Path, **changes: object) -> None:
    """Change fields of a record and update its digest."""
    record = json.loads(path.read_text()) | changes
    del record["record_digest"]
    path.write_text(json.dumps(record | {"record_digest": record_digest(record)}, indent=1, sort_keys=True) + "\n")


def test_keys_that_are_not_the_committed_ones_are_found(cache: Path) -> None:
    resign(cache / COMMIT, key_digest="0" * 32)
    [finding] = inspect(cache)
    assert finding.path.endswith("key_bytes") and "key_digest" in finding.what


def test_a_record_of_too_few_records_is_found_in_every_array(cache: Path) -> None:
    resign(cache / COMMIT, num_images=2, num_records=4)
    found = inspect(cache)
    assert {finding.path.rpartition("/")[2] for finding in found} == {*survey_arrays(cache), "key_bytes"}
    assert all("records, expected 4" in f.what for f in found if not f.path.endswith("key_bytes"))


def survey_arrays(cache: Path) -> list[str]:
    return survey(open_store(cache)).units[0].arrays


def test_units_that_share_views_are_found_and_one_is_dropped(cache: Path, tmp_path: Path) -> None:
    unit, other = UnitId("train-000.tar", 1, 1), tmp_path / "other"
    with CacheWriter.open(other, tiny.make_manifest()) as writer:
        writer.write_unit(unit, *tiny.make_unit(unit), {})
    shutil.copytree(other / "units/train-000/v1-1", cache / "units/train-000/v1-1")
    shutil.copy(other / "commits/train-000.v1-1.json", cache / "commits")
    [finding] = inspect(cache)
    assert finding.unit == unit and "shares views with unit train-000.tar v0-1" in finding.what
    repaired(cache)
    assert inspect(cache) == [] and not (cache / "units/train-000/v1-1").exists()


# ---------------------------------------------------------------- constants


@pytest.mark.parametrize(
    ("damage", "path", "what"),
    [
        (lambda c: flip(c / "constants/scale/c/0/0"), "constants/scale/c/0/0", "checksum"),
        (lambda c: (c / "constants/heads" / METADATA).unlink(), "constants/heads/zarr.json", "missing"),
        (lambda c: flip(c / "constants.json", 30), "constants.json", "damaged"),
        (lambda c: (c / "constants.json").unlink(), "constants.json", "missing"),
    ],
)
def test_damaged_constants_are_found(with_constants: Path, damage: Damage, path: str, what: str) -> None:
    damage(with_constants)
    [finding] = inspect(with_constants)
    assert (finding.kind, finding.path) == ("constants", path) and what in finding.what


def test_other_constants_than_those_of_the_units_are_found(with_constants: Path, tmp_path: Path) -> None:
    with CacheWriter.open(tmp_path / "other", tiny.make_manifest()) as writer:
        writer.write_constants({"scale": np.ones(3)})
    for name in ("constants", "constants.json"):
        if (with_constants / name).is_dir():
            shutil.rmtree(with_constants / name)
            shutil.copytree(tmp_path / "other" / name, with_constants / name)
        else:
            shutil.copy(tmp_path / "other" / name, with_constants / name)
    [finding] = inspect(with_constants)
    assert finding.kind == "constants" and "all units were made with other constants" in finding.what


def test_a_unit_made_with_other_constants_than_the_rest_is_found_and_dropped(with_constants: Path) -> None:
    resign(with_constants / "commits/train-000.v0-2.json", constants="ab" * 16)
    [finding] = inspect(with_constants)
    assert (finding.kind, finding.unit) == ("commit", UnitId("train-000.tar", 0, 3))
    store = open_store(with_constants)
    manifest = survey(store).manifest
    done = repair(store, manifest, constants_digest(store, manifest), [finding])
    assert done.dropped == [finding.unit] and inspect(with_constants) == []


def test_the_group_of_the_constants_is_repaired(with_constants: Path) -> None:
    whole = tiny.tree(with_constants)
    (with_constants / "constants" / METADATA).unlink()
    [finding] = inspect(with_constants)
    assert finding.kind == "group"
    store = open_store(with_constants)
    repair(store, survey(store).manifest, None, [finding])
    assert tiny.tree(with_constants) == whole


# ---------------------------------------------------------------- repair while others work


def test_a_shard_at_which_a_living_writer_works_is_left_alone(cache: Path) -> None:
    flip(cache / PAYLOAD)
    store = open_store(cache)
    findings, manifest = inspect(cache), survey(store).manifest
    before = tiny.tree(cache)
    leases = Leases(store)
    assert leases.claim("units/train-000")
    assert repair(store, manifest, None, findings).held == findings
    leases.close()
    assert tiny.tree(cache) == before
    assert repair(store, manifest, None, findings).dropped == [FIRST]


def test_what_another_repair_put_right_before_is_not_dropped(cache: Path) -> None:
    whole = tiny.tree(cache)
    flip(cache / PAYLOAD)
    flip(cache / "commits/train-001.v0-1.json", 80)
    shutil.copytree(cache / "units/train-001/v0-1", cache / "units/train-001/v2-2")
    store = open_store(cache)
    findings, manifest = inspect(cache), survey(store).manifest
    repaired(cache)
    with CacheWriter.open(cache, manifest) as writer:
        tiny.write_units(writer, [UnitId("train-001.tar", 2, 1)])
    now = tiny.tree(cache)
    assert whole.items() < now.items()
    done = repair(store, manifest, None, findings)
    assert (done.dropped, done.removed) == ([], []) and tiny.tree(cache) == now


# ---------------------------------------------------------------- the manifest


def test_a_damaged_manifest_is_fatal_to_a_survey_and_rebuilt_from_the_records(cache: Path) -> None:
    whole = tiny.tree(cache)
    flip(cache / METADATA, 300)
    store = open_store(cache)
    with pytest.raises(CacheCorrupt):
        survey(store)
    wanted = tiny.make_manifest(num_views=2)  # the records hold three
    assert rebuild_manifest(store, wanted) == tiny.make_manifest()
    assert tiny.tree(cache) == whole


def test_a_lost_manifest_is_not_rebuilt_from_another_recipe_or_from_nothing(cache: Path, tmp_path: Path) -> None:
    (cache / METADATA).unlink()
    before, store = tiny.tree(cache), open_store(cache)
    with pytest.raises(CacheMismatch, match="cannot be rebuilt from this recipe"):
        rebuild_manifest(store, tiny.make_manifest(views={"seed": 5}))
    with pytest.raises(CacheMismatch, match="cannot be rebuilt from this recipe"):
        rebuild_manifest(store, tiny.make_manifest(num_shards=1))
    assert tiny.tree(cache) == before
    with pytest.raises(UserError, match="there is no cache"):
        rebuild_manifest(open_store(tmp_path / "nowhere"), tiny.make_manifest())


# ---------------------------------------------------------------- who is at it


def test_a_claim_of_another_machine_counts_as_living_for_a_day(cache: Path) -> None:
    store = open_store(cache)
    lease = cache / "leases/units/train-001.g1.json"
    lease.parent.mkdir(parents=True, exist_ok=True)
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 7, "machine": "another", "lease_s": 60.0}))
    shutil.copytree(cache / "units/train-001/v0-1", cache / "units/train-001/v2-2")
    found = survey(store)
    assert found.findings == [] and str(found.writers["units/train-001"]) == "process 7 on elsewhere"
    os.utime(lease, (0, 0))
    assert [finding.path for finding in survey(store).findings] == [
        "leases/units/train-001.g1.json",
        "units/train-001/v2-2/",
    ]
