"""The manifest is read exactly or refused, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, UserError
from tinymim.configs.taps import Shapes
from tinymim.storage.atomic import canonical_json
from tinymim.storage.store import open_store
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.v1.manifest import is_v1
from tinymim.tests.storage.v1.forged import DATA, RECORDS, refusal, reissue


def test_the_manifest_is_as_stored() -> None:
    manifest = OldCache(DATA / "cache_v1").manifest
    assert manifest == OldCache(DATA / "cache_v1_first").manifest
    assert manifest.spec_id == "1eb10fae5e655edc"
    assert manifest.block == 2 and manifest.shapes == Shapes(3, 64, 197, 1, (14, 14))
    stored = json.loads((DATA / "cache_v1" / "zarr.json").read_bytes())["attributes"]["tinymim"]
    assert manifest.model_dump() == stored and list(manifest.shards) == ["train-000.tar", "train-001.tar"]
    assert canonical_json(dict(manifest.views)) == canonical_json(stored["views"])  # 1.0 stays 1.0


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_format_1_is_recognised(name: str) -> None:
    assert is_v1(open_store(DATA / name))


@pytest.mark.parametrize(
    "text",
    [
        '{"attributes": {"tinymim": {"format_version": 2}}}',
        '{"attributes": {"tinymim": {"format_version": true}}}',
        '{"attributes": {"tinymim": 1}}',
        '{"attributes": {}}',
        "[]",
        '{"attributes": ',
        "[" * 200_000,
        "1" * 5000,
    ],
)
def test_nothing_else_is_taken_for_format_1(tmp_path: Path, text: str) -> None:
    assert not is_v1(open_store(tmp_path / "nowhere"))
    (tmp_path / "zarr.json").write_text(text)
    assert not is_v1(open_store(tmp_path))
    with pytest.raises(UserError):
        OldCache(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 2}, CacheMismatch, "format_version"),
        ({"format_version": None}, CacheMismatch, "format_version"),
        ({"format_version": True}, CacheMismatch, "format_version"),
        ({"extra": {}}, CacheCorrupt, "extra: Extra inputs"),
        ({"codec": {}}, CacheCorrupt, r"codec\.name: Field required"),
        ({"source": [{"name": "a.tar"}]}, CacheCorrupt, "damaged: source"),
        ({"num_views": 0}, CacheCorrupt, "num_views"),
        ({"views": {"size": 224.0}}, CacheCorrupt, r"views\.size"),
        (
            {"source": 2 * [{"name": "a", "size_bytes": 1, "num_samples": 1, "content_hash": "h"}]},
            CacheCorrupt,
            "twice",
        ),
    ],
)
def test_bad_manifests_are_refused(change: dict[str, Any], error: type[UserError], text: str, cache: Path) -> None:
    reissue(cache, lambda manifest: manifest.update(change))
    refusal(cache, text, error)


def test_a_manifest_without_its_digest_is_refused(cache: Path) -> None:
    path = cache / "zarr.json"
    intact = path.read_text()
    for old, new in (('"vit_tiny', '"vit_tina'), ('"node_type": "group"', '"node_type": "array"'), ("digest", "x")):
        path.write_text(intact.replace(old, new))
        refusal(cache, r"zarr\.json is damaged: .*tinymim_digest")
    path.write_text(intact[:-20])
    refusal(cache, r"zarr\.json is damaged")


def test_no_cache_and_other_zarr_groups(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no cache", UserError)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    refusal(tmp_path, "not of a tinymim cache", UserError)
