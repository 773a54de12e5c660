"""Commit records that are damaged, forged, or of another cache are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import CacheMismatch
from tinymim.tests.storage.v1.forged import COMMIT, refusal, reissue, resign


def test_damaged_or_foreign_commit_records_are_refused(cache: Path) -> None:
    path = cache / COMMIT
    intact = path.read_text()
    for damaged in (
        "",
        "[]",
        intact[:-20],
        intact.replace('"num_images": 3', '"num_images": 2'),
        intact.replace('"kept_mass": 0.5', '"kept_mass": 0.6'),
        intact.replace("\n", "\n "),  # the same JSON in other bytes
    ):
        path.write_text(damaged)
        refusal(cache, r"train-000\.v0-1\.json is damaged")
    path.write_text(intact.replace('"format_version": 1', '"format_version": 2'))
    refusal(cache, "format_version", CacheMismatch)
    shutil.copy(cache / "commits/train-000.v2-2.json", path)
    refusal(cache, r"it is about train-000\.tar v2-2")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_images": 4, "num_records": 8}, "4 images and 8 records for 2 views of 3 images"),
        ({"num_records": 7}, "3 images and 7 records"),
        ({"spec_id": "0" * 16}, "does not belong"),
        ({"shard": {"name": "train-000.tar", "content_hash": "other"}}, "does not belong"),
        ({"shard": {"name": "train-009.tar", "content_hash": "hash0"}}, "does not belong"),
        ({"unit": "units/train-001/v0-1"}, "it is about"),
        ({"first_view": 2**31}, "first_view"),
        ({"key_digest": "x"}, "key_digest"),
        ({"files": {"../../x": {"size_bytes": 1, "blake2b": "0" * 32}}}, "files"),
        ({"files": {"box/c/0": {"size_bytes": -1, "blake2b": "0" * 32}}}, "size_bytes"),
        ({"more": 1}, "more: Extra inputs"),
    ],
)
def test_forged_commit_records_are_refused(cache: Path, change: dict[str, Any], text: str) -> None:
    resign(cache / COMMIT, lambda record: record.update(change))
    refusal(cache, rf"{COMMIT} is damaged: .*{text}")


def test_records_of_another_cache_are_refused(cache: Path) -> None:
    reissue(cache, lambda manifest: manifest["views"].update(seed=9))
    refusal(cache, "does not belong")


@pytest.mark.parametrize("name", ["stray.json", "train-000.json", "train-000.v9-8.json", "deep/train-000.v0-1.json"])
def test_other_json_among_the_commit_records_is_refused(cache: Path, name: str) -> None:
    (cache / "commits/deep").mkdir()
    shutil.copy(cache / COMMIT, cache / "commits" / name)
    refusal(cache, f"{name} is damaged")
