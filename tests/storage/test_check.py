"""Every damage is found, named, and repaired as far as that needs no teacher."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage import layout
from tinymim.storage.check import PIECE_BYTES, Finding, check_unit, checked_pieces, survey, unit_blocks
from tinymim.storage.commit import signed
from tinymim.storage.constants import constants_digest
from tinymim.storage.layout import METADATA, UnitId
from tinymim.storage.leases import Leases, shard_lease
from tinymim.storage.local import LocalStore
from tinymim.storage.reader import CacheReader
from tinymim.storage.repair import Repaired, rebuild_layer, rebuild_manifest, repair
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL, changed, tree

Damage = Callable[[Path], object]
FIRST, SECOND = "train-000", "train-001"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two target layers, one of them with constants."""
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


def findings(cache: Path) -> list[Finding]:
    store = LocalStore(cache)
    found = survey(store)
    return found.findings + [
        finding
        for info in found.all_units()
        for finding in check_unit(store, info, found.arrays(info.layer), found.sizes.get(info.path))
    ]


def repaired(cache: Path) -> Repaired:
    store = LocalStore(cache)
    found = survey(store)
    constants = {name: constants_digest(store, layer) for name, layer in found.layers.items()}
    return repair(store, found.manifest, found.layers, constants, findings(cache))


def flip(path: Path, place: int = -1) -> None:
    path.write_bytes(changed(path.read_bytes(), place % path.stat().st_size))


def rewrite(path: Path, **fields: object) -> None:
    """Change fields of a record, whose digest then fits again."""
    record = json.loads(path.read_text())
    record.pop("record_digest")
    path.write_bytes(signed(record | fields))


def test_a_whole_cache_is_sound_so_is_one_without_units(cache: Path, tmp_path: Path) -> None:
    assert findings(cache) == []
    with CacheWriter.open(tmp_path / "new", tiny.make_manifest(), [tiny.make_layer()]) as writer:
        assert writer.claim(REL, UnitId("train-000.tar", 0, 1))
        assert findings(tmp_path / "new") == []
    assert findings(tmp_path / "new") == []


# (damage, kind, path of the finding, part of its text, whether repair drops the unit)
DAMAGES: dict[str, tuple[Damage, str, str, str, bool]] = {
    "a byte of a block": (
        lambda c: flip(c / f"layers/rel/{FIRST}/v0-1.zip", 1100),
        "unit",
        f"layers/rel/{FIRST}/v0-1.zip",
        "view",
        True,
    ),
    "the first byte": (
        lambda c: flip(c / f"views/{FIRST}/v0-1.zip", 0),
        "unit",
        f"views/{FIRST}/v0-1.zip",
        "its head",
        True,
    ),
    "the last byte": (
        lambda c: flip(c / f"views/{FIRST}/v2-2.zip"),
        "unit",
        f"views/{FIRST}/v2-2.zip",
        "its tail",
        True,
    ),
    "a file cut short": (
        lambda c: (c / f"layers/cls/{FIRST}/v0-1.zip").write_bytes(b"PK"),
        "unit",
        f"layers/cls/{FIRST}/v0-1.zip",
        "it has 2 bytes",
        True,
    ),
    "a file that is gone": (
        lambda c: (c / f"layers/rel/{SECOND}/v0-1.zip").unlink(),
        "unit",
        f"layers/rel/{SECOND}/v0-1.zip",
        "missing",
        True,
    ),
    "a record": (
        lambda c: flip(c / f"layers/rel/{FIRST}/v2-2.json", 80),
        "commit",
        f"layers/rel/{FIRST}/v2-2.json",
        "is damaged",
        True,
    ),
    "a record of another layer": (
        lambda c: shutil.copy(c / f"layers/rel/{FIRST}/v0-1.json", c / f"layers/cls/{FIRST}/v0-1.json"),
        "commit",
        f"layers/cls/{FIRST}/v0-1.json",
        "does not belong",
        True,
    ),
    "other keys": (
        lambda c: rewrite(c / f"layers/rel/{FIRST}/v2-2.json", key_digest="0" * 32),
        "commit",
        f"layers/rel/{FIRST}/v2-2.json",
        "its images are not those",
        True,
    ),
    "a digest that fits no bytes": (
        lambda c: rewrite(c / f"layers/rel/{FIRST}/v2-2.json", blake2b="0" * 32),
        "unit",
        f"layers/rel/{FIRST}/v2-2.zip",
        "committed digest",
        True,
    ),
    "other constants": (
        lambda c: rewrite(c / f"layers/rel/{FIRST}/v2-2.json", constants="0" * 32),
        "commit",
        f"layers/rel/{FIRST}/v2-2.json",
        "made with constants",
        True,
    ),
    "an uncommitted file": (
        lambda c: shutil.copy(c / f"views/{FIRST}/v0-1.zip", c / f"views/{FIRST}/v7-8.zip"),
        "stray",
        f"views/{FIRST}/v7-8.zip",
        "never committed",
        False,
    ),
    "a shard that is not in the source": (
        lambda c: shutil.copytree(c / f"views/{FIRST}", c / "views/train-009"),
        "stray",
        "views/train-009/v0-1.json",
        "nothing",
        False,
    ),
    "a group": (lambda c: (c / "views/zarr.json").write_text("{}"), "group", "views/zarr.json", "not what", False),
    "a lost group": (lambda c: (c / "layers/zarr.json").unlink(), "group", "layers/zarr.json", "missing", False),
    "a group with another form": (
        lambda c: (c / METADATA).write_text(json.dumps(json.loads((c / METADATA).read_text()))),
        "group",
        METADATA,
        "not what",
        False,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_repaired(cache: Path, name: str) -> None:
    whole = tree(cache)
    damage, kind, path, what, drops = DAMAGES[name]
    damage(cache)
    found = findings(cache)
    assert (found[0].kind, found[0].path) == (kind, path) and what in found[0].what, found
    assert {finding.kind for finding in found} == {kind}
    done = repaired(cache)
    assert bool(done.dropped) == drops and not done.held
    if drops:
        [(layer, unit)] = done.dropped
        assert layout.unit_file(layer, unit).rpartition(".")[0] == path.rpartition(".")[0]
        # What a dropped unit leaves is a smaller cache; targets stay although the views are to be rendered again.
        files = {layout.unit_file(layer, unit), layout.commit_file(layer, unit)}
        assert tree(cache) == {path: data for path, data in whole.items() if path not in files}
        assert {finding.kind for finding in findings(cache)} <= {"views"}
    else:
        assert tree(cache) == whole and findings(cache) == []


def test_views_that_targets_lack_are_found_and_nothing_is_dropped(cache: Path) -> None:
    for name in ("v2-2.json", "v2-2.zip"):
        (cache / f"views/{FIRST}" / name).unlink()
    [finding] = findings(cache)
    assert (
        finding.kind == "views"
        and finding.path == f"layers/rel/{FIRST}/v2-2.json"
        and "view layer lacks 1" in finding.what
    )
    before = tree(cache)
    assert repaired(cache).dropped == [] and tree(cache) == before
    for name in ("v0-1.json", "v0-1.zip"):
        (cache / f"views/{SECOND}" / name).unlink()
    assert len(findings(cache)) == 2


def test_a_shard_without_view_0_in_the_view_layer_has_no_keys(tmp_path: Path) -> None:
    manifest = tiny.make_manifest()
    with CacheWriter.open(tmp_path, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 3, 2)])
    [finding] = findings(tmp_path)
    assert finding.kind == "views" and "holds the keys" in finding.what


def test_foreign_files_are_named_and_harmless_everywhere(cache: Path) -> None:
    foreign = [
        "._zarr.json",
        "notes.txt",
        f"layers/rel/{FIRST}/._v0-1.json",
        f"layers/rel/{FIRST}/v0-1 (conflicted copy).json",
        f"views/{FIRST}/v00-1.json.bak",
        "views/.DS_Store",
        "layers/Upper/zarr.json",
    ]
    for path in foreign:
        (cache / path).parent.mkdir(exist_ok=True)
        (cache / path).write_text("{ mine")
    assert sorted(survey(LocalStore(cache)).foreign) == sorted(foreign) and findings(cache) == []
    reader = CacheReader(cache)
    assert len(reader.units(REL)) == 3 and list(reader.layers) == [CLS, REL]
    before = tree(cache)
    repaired(cache)
    assert tree(cache) == before
    with CacheWriter.open(cache, reader.manifest, [reader.layers[REL]]) as writer:
        tiny.write_units(writer, [UnitId("train-001.tar", 2, 1)])
    assert all((cache / path).exists() for path in foreign)


def test_all_damage_is_found_at_once(cache: Path) -> None:
    flip(cache / f"layers/rel/{FIRST}/v0-1.zip", 1500)
    flip(cache / f"layers/cls/{FIRST}/v0-1.json", 80)
    (cache / f"views/{SECOND}/v0-1.zip").unlink()
    (cache / "layers/zarr.json").write_text("")
    assert sorted(finding.kind for finding in findings(cache)) == ["commit", "group", "unit", "unit"]


def test_units_that_share_views_are_found_and_one_is_dropped(cache: Path, tmp_path: Path) -> None:
    whole = tree(cache)
    other = tmp_path / "other"
    manifest = tiny.make_manifest()
    with CacheWriter.open(other, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 1, 2)])
    for name in ("v1-2.json", "v1-2.zip"):
        shutil.copy(other / f"layers/rel/{FIRST}" / name, cache / f"layers/rel/{FIRST}" / name)
    assert "shares views with unit train-000.tar v0-1" in findings(cache)[0].what
    repaired(cache)
    left = tree(cache)
    assert findings(cache) == [] and left.items() <= whole.items()


@pytest.mark.parametrize(
    ("damage", "path"),
    [
        (lambda c: flip(c / "layers/cls/constants.zip", 100), "layers/cls/constants.zip"),
        (lambda c: (c / "layers/cls/constants.zip").unlink(), "layers/cls/constants.zip"),
        (lambda c: flip(c / "layers/cls/constants.json", 30), "layers/cls/constants.json"),
        (lambda c: (c / "layers/cls/constants.json").unlink(), "layers/cls/constants.json"),
        (lambda c: rewrite(c / "layers/cls/constants.json", size_bytes=1), "layers/cls/constants.json"),
    ],
)
def test_damaged_constants_are_found_and_left_to_their_recipe(cache: Path, damage: Damage, path: str) -> None:
    damage(cache)
    found = findings(cache)
    assert (found[0].kind, found[0].path, found[0].layer) == ("constants", path, CLS)
    assert {finding.kind for finding in found} == {"constants"}


@pytest.mark.parametrize("text", ["{", "", '{"attributes":{}}', None])
def test_a_layer_without_its_description_is_found_and_rebuilt(cache: Path, text: str | None) -> None:
    whole, path = tree(cache), cache / "layers/rel/zarr.json"
    path.unlink() if text is None else path.write_text(text)
    [finding] = findings(cache)
    assert (finding.kind, finding.path, finding.layer) == ("layer", "layers/rel/zarr.json", REL)
    store = LocalStore(cache)
    with pytest.raises(CacheMismatch, match="cannot be rebuilt"):
        rebuild_layer(store, tiny.make_layer(target={"parameters": {"rows": 5}}))
    rebuild_layer(store, tiny.make_layer())
    assert tree(cache) == whole


def test_a_damaged_manifest_is_fatal_to_a_survey_and_rebuilt_from_the_records(cache: Path, tmp_path: Path) -> None:
    whole, store = tree(cache), LocalStore(cache)
    flip(cache / METADATA, 200)
    with pytest.raises(CacheCorrupt, match="is damaged"):
        survey(store)
    for wrong in (tiny.make_manifest(views={"seed": 1}), tiny.make_manifest(num_shards=1)):
        with pytest.raises(CacheMismatch, match="cannot be rebuilt"):
            rebuild_manifest(store, wrong)
    rebuild_manifest(store, tiny.make_manifest())
    assert tree(cache) == whole
    with pytest.raises(UserError, match="there is no cache"):
        rebuild_manifest(LocalStore(tmp_path / "nowhere"), tiny.make_manifest())


def test_a_shard_at_which_a_living_writer_works_is_left_alone(cache: Path) -> None:
    flip(cache / f"layers/rel/{FIRST}/v0-1.zip", 1500)
    shutil.copy(cache / f"views/{FIRST}/v0-1.zip", cache / f"views/{FIRST}/v7-8.zip")
    leases = Leases(LocalStore(cache))
    assert leases.claim(shard_lease("train-000.tar"))
    assert [finding.kind for finding in findings(cache)] == ["unit"]  # what is not committed may be its work
    done = repaired(cache)
    assert not done.dropped and [finding.path for finding in done.held] == [f"layers/rel/{FIRST}/v0-1.zip"]
    leases.close()
    assert len(repaired(cache).dropped) == 1


def test_what_another_repair_put_right_before_is_not_dropped(cache: Path) -> None:
    whole = tree(cache)
    path = cache / f"layers/rel/{FIRST}/v0-1.zip"
    flip(path, 1500)
    found = findings(cache)
    path.write_bytes(whole[f"layers/rel/{FIRST}/v0-1.zip"])
    store = LocalStore(cache)
    seen = survey(store)
    done = repair(store, seen.manifest, seen.layers, {REL: None}, found)
    assert not done.dropped and tree(cache) == whole


def test_a_unit_is_read_in_bounded_pieces(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = CacheReader(cache).units(REL)[0]
    store = LocalStore(cache)
    whole = (cache / info.path).read_bytes()
    reads: list[int] = []
    read = LocalStore.read_ranges

    def counted(self: LocalStore, path: str, ranges: list[tuple[int, int]]) -> Iterator[memoryview]:
        reads.append(sum(end - begin for begin, end in ranges))
        return read(self, path, ranges)

    monkeypatch.setattr(LocalStore, "read_ranges", counted)
    assert b"".join(checked_pieces(store, info)) == whole and reads == [len(whole)] and len(whole) < PIECE_BYTES
    reads.clear()
    monkeypatch.setattr("tinymim.storage.check.PIECE_BYTES", 100)
    assert b"".join(data for _, _, data in unit_blocks(store, info)) == whole
    assert reads == [block.size_bytes for block in info.parts.all]


def test_metadata_that_tinymim_does_not_write_is_found_although_its_digests_fit(cache: Path) -> None:
    from hashlib import blake2b

    from google_crc32c import value as crc32c

    path = cache / f"layers/rel/{FIRST}/v2-2.zip"
    data = path.read_bytes().replace(b'"level":1', b'"level":2', 1)
    path.write_bytes(data)
    record = json.loads(path.with_suffix(".json").read_text())
    head = data[: record["head"]["size_bytes"]]
    rewrite(
        path.with_suffix(".json"),
        head=record["head"] | {"crc32c": crc32c(head)},
        blake2b=blake2b(data, digest_size=16).hexdigest(),
    )
    assert "not what tinymim writes" in findings(cache)[0].what
