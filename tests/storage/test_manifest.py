"""I6: the refusal of a cache made by something else names the field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage.layout import _digest, read_layer, read_manifest
from tinymim.storage.manifest import SourceShard, check_same, check_same_layer, grown
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage.tiny import make_layer, make_manifest


@pytest.mark.parametrize(
    ("sections", "field", "stored", "wanted"),
    [
        ({"views": {"seed": 7}}, "views.seed", "0", "7"),
        ({"views": {"size": 196}}, "views.size", "224", "196"),
        ({"views": {"fill": 1}}, "views.fill", "(absent)", "1"),
    ],
)
def test_difference_is_named(sections: dict[str, Any], field: str, stored: str, wanted: str, tmp_path: Path) -> None:
    other = make_manifest(**sections)
    CacheWriter.open(tmp_path, make_manifest()).close()
    before = (tmp_path / "zarr.json").read_bytes()
    with pytest.raises(CacheMismatch) as caught:
        CacheWriter.open(tmp_path, other)
    assert field in caught.value.what
    assert stored in str(caught.value.got)
    assert wanted in str(caught.value.expected)
    assert (tmp_path / "zarr.json").read_bytes() == before
    assert other.spec_id != make_manifest().spec_id


@pytest.mark.parametrize(
    ("sections", "field", "stored", "wanted"),
    [
        ({"teacher": {"weights_sha256": "cd" * 32}}, "teacher.weights_sha256", "ab" * 32, "cd" * 32),
        ({"teacher": {"arch": {"depth": 3}}}, "teacher.arch.depth", "2", "3"),
        ({"target": {"name": "dense"}}, "target.name", "'sketch'", "'dense'"),
        ({"target": {"taps": ["qkv@1"]}}, "target.taps", "['qkv@2']", "['qkv@1']"),
        ({"target": {"parameters": {"rows": 4}}}, "target.parameters.tail_k", "2", "(absent)"),
    ],
)
def test_difference_of_a_layer_is_named(
    sections: dict[str, Any], field: str, stored: str, wanted: str, tmp_path: Path
) -> None:
    manifest, other = make_manifest(), make_layer(**sections)
    CacheWriter.open(tmp_path, manifest, [make_layer()]).close()
    before = (tmp_path / "layers/rel/zarr.json").read_bytes()
    with pytest.raises(CacheMismatch, match="layer rel of the cache") as caught:
        CacheWriter.open(tmp_path, manifest, [other])
    assert field in caught.value.what
    assert stored in str(caught.value.got)
    assert wanted in str(caught.value.expected)
    assert (tmp_path / "layers/rel/zarr.json").read_bytes() == before
    assert other.spec_id != make_layer().spec_id


def test_all_differences_are_counted_and_eight_listed() -> None:
    views = {"size": 1, "scale": (1, 1), "ratio": (1, 1), "interpolation": "x", "flip": 1, "seed": 1}
    with pytest.raises(CacheMismatch, match=r"10 field.* and 2 more"):
        check_same(make_manifest(), make_manifest(views=views | {name: 1 for name in "abcd"}))


def test_changed_shard_is_refused_but_other_shards_are_growth() -> None:
    stored, wanted = make_manifest(num_shards=2), make_manifest(num_shards=3)
    assert check_same(stored, wanted) == check_same(wanted, stored) == []
    assert grown(stored, wanted) == wanted
    assert grown(wanted, stored) == wanted
    swapped = replace(stored, source=(SourceShard("train-001.tar", 1001, 3, "other"),))
    with pytest.raises(CacheMismatch, match=r"source\.train-001\.tar\.content_hash"):
        check_same(stored, swapped)


def test_environment_and_provenance_do_not_refuse() -> None:
    other = make_manifest(environment={"pillow": "12"})
    assert check_same(make_manifest(), other) == ["environment.pillow: cache has '(absent)', this run has '12'"]
    assert other.spec_id == make_manifest().spec_id == make_manifest(num_shards=5).spec_id
    layer = make_layer(teacher={"weights_origin": "/x", "license": "mit"}, environment={"pillow": "12"})
    assert check_same_layer(make_layer(), layer) == ["environment.pillow: cache has '(absent)', this run has '12'"]
    assert layer.spec_id == make_layer().spec_id == make_layer(make_manifest(5)).spec_id
    assert layer.spec_id != make_layer(make_manifest(views={"seed": 9})).spec_id


def test_spec_ids_are_golden() -> None:
    assert make_manifest().spec_id == "945d1bfbfa18ea6f"
    assert make_layer().spec_id == "865a908ac66fab3c"


def test_round_trip_through_disk(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest(), [make_layer()]).close()
    store = open_store(tmp_path)
    assert read_manifest(store) == make_manifest()
    assert read_layer(store, "rel", make_manifest()) == make_layer() == CacheReader(tmp_path).layer()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 3}, CacheMismatch, "format_version"),
        ({"format_version": 1}, CacheMismatch, r"cache copy SRC DST --format 2"),
        ({"format_version": None}, CacheMismatch, "format_version"),
        ({"extra": {}}, CacheCorrupt, "unknown sections"),
        ({"views": {}}, CacheCorrupt, r"views\.size: Field required"),
        ({"source": [{"name": "a.tar"}]}, CacheCorrupt, "damaged"),
        ({"environment": []}, CacheCorrupt, "damaged"),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_bad_manifest_is_refused(
    change: dict[str, Any], error: type[Exception], text: str, signed: bool, tmp_path: Path
) -> None:
    CacheWriter.open(tmp_path, make_manifest()).close()
    root = json.loads((tmp_path / "zarr.json").read_bytes())
    root["attributes"]["tinymim"].update(change)
    if signed:
        root["attributes"]["tinymim_digest"] = _digest(root["attributes"]["tinymim"])
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    for refuses in (lambda: CacheReader(tmp_path), lambda: CacheWriter.open(tmp_path, make_manifest())):
        with pytest.raises(error, match=text if signed or error is CacheMismatch else "damaged"):
            refuses()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 3}, CacheMismatch, "format_version"),
        ({"target": {}}, CacheCorrupt, r"target\.taps: Field required"),
        ({"name": "other"}, CacheCorrupt, "does not belong to this cache"),
        ({"name": "../x"}, CacheCorrupt, "not the name of a layer"),
        ({"name": "rel\n"}, CacheCorrupt, "not the name of a layer"),
        ({"cache": "0" * 16}, CacheCorrupt, "does not belong to this cache"),
        ({"cache": 3}, CacheCorrupt, "not the name of a layer"),
    ],
)
def test_bad_layer_is_refused(change: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest(), [make_layer()]).close()
    path = tmp_path / "layers/rel/zarr.json"
    group = json.loads(path.read_bytes())
    group["attributes"]["tinymim"].update(change)
    group["attributes"]["tinymim_digest"] = _digest(group["attributes"]["tinymim"])
    path.write_text(json.dumps(group))
    for refuses in (
        lambda: CacheReader(tmp_path),
        lambda: CacheWriter.open(tmp_path, make_manifest(), [make_layer()]),
    ):
        with pytest.raises(error, match=text):
            refuses()


def test_folders_beside_the_layers_that_are_none_are_ignored(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest(), [make_layer()]).close()
    for name in ("rel (conflicted copy)", "._rel", "Rel", "empty"):
        (tmp_path / "layers" / name).mkdir()
        if name != "empty":
            (tmp_path / "layers" / name / "zarr.json").write_text("{}")
    assert list(CacheReader(tmp_path).layers) == ["rel"]


def test_no_cache_other_zarr_and_cut_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"):
        CacheReader(tmp_path / "nowhere")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UserError, match="not of a tinymim cache"):
        CacheReader(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, ')
    with pytest.raises(CacheCorrupt, match=r"zarr\.json"):
        CacheReader(tmp_path)
