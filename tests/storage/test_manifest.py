"""I6: the refusal of a cache made by something else names the field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.storage.layout import read_manifest
from tinymim.storage.manifest import SourceShard, check_same, grown
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage.tiny import make_manifest


@pytest.mark.parametrize(
    ("sections", "field", "stored", "wanted"),
    [
        ({"teacher": {"weights_sha256": "cd" * 32}}, "teacher.weights_sha256", "ab" * 32, "cd" * 32),
        ({"teacher": {"arch": {"depth": 3}}}, "teacher.arch.depth", "2", "3"),
        ({"views": {"seed": 7}}, "views.seed", "0", "7"),
        ({"views": {"size": 196}}, "views.size", "224", "196"),
        ({"codec": {"name": "dense"}}, "codec.name", "'sketch'", "'dense'"),
        ({"codec": {"parameters": {"rows": 4}}}, "codec.parameters.tail_k", "2", "(absent)"),
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


def test_all_differences_are_counted_and_eight_listed() -> None:
    views = {"size": 1, "scale": (1, 1), "ratio": (1, 1), "interpolation": "x", "flip": 1, "seed": 1}
    other = make_manifest(views=views, teacher={"block": 9, "heads": 9, "tokens": 9, "grid": [9, 9]})
    with pytest.raises(CacheMismatch, match=r"10 field.* and 2 more"):
        check_same(make_manifest(), other)


def test_changed_shard_is_refused_but_other_shards_and_views_are_growth() -> None:
    stored, wanted = make_manifest(num_shards=2, num_views=2), make_manifest(num_shards=3, num_views=4)
    assert check_same(stored, wanted) == check_same(wanted, stored) == []
    assert grown(stored, wanted) == wanted
    assert grown(wanted, stored) == wanted
    swapped = replace(stored, source=(SourceShard("train-001.tar", 1001, 3, "other"),))
    with pytest.raises(CacheMismatch, match=r"source\.train-001\.tar\.content_hash"):
        check_same(stored, swapped)


def test_environment_and_provenance_do_not_refuse() -> None:
    other = make_manifest(environment={"pillow": "12"}, teacher={"weights_origin": "/x", "license": "mit"})
    assert check_same(make_manifest(), other) == ["environment.pillow: cache has '(absent)', this run has '12'"]
    assert other.spec_id == make_manifest().spec_id == make_manifest(num_shards=5, num_views=9).spec_id


def test_spec_id_is_golden() -> None:
    assert make_manifest().spec_id == "1eb10fae5e655edc"


def test_round_trip_through_disk(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest()).close()
    assert read_manifest(open_store(tmp_path)) == make_manifest()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 2}, CacheMismatch, "format_version"),
        ({"format_version": None}, CacheMismatch, "format_version"),
        ({"extra": {}}, CacheCorrupt, "unknown sections"),
        ({"codec": {}}, CacheCorrupt, r"codec\.name: Field required"),
        ({"source": [{"name": "a.tar"}]}, CacheCorrupt, "damaged"),
        ({"num_views": 0}, CacheCorrupt, "num_views"),
    ],
)
def test_bad_manifest_is_refused(change: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, make_manifest()).close()
    root = json.loads((tmp_path / "zarr.json").read_bytes())
    root["attributes"]["tinymim"].update(change)
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(error, match=text):
        CacheReader(tmp_path)
    with pytest.raises(error, match=text):
        CacheWriter.open(tmp_path, make_manifest())


def test_no_cache_other_zarr_and_cut_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"):
        CacheReader(tmp_path / "nowhere")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UserError, match="not of a tinymim cache"):
        CacheReader(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, ')
    with pytest.raises(CacheCorrupt, match=r"zarr\.json"):
        CacheReader(tmp_path)
