"""What `cache info` says is what is on disk."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.stages.cache.info import component_of, describe, format_info
from tinymim.storage.layout import UnitId
from tinymim.storage.leases import Leases
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Three units of two shards; the last view of the second is absent."""
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


def complete(path: Path, statistics: list[dict[str, object]]) -> Path:
    """A cache of one unit per shard, each with its statistics."""
    manifest = tiny.make_manifest(num_shards=len(statistics), num_views=2)
    with CacheWriter.open(path, manifest) as writer:
        for unit, values in zip(tiny.units_of(manifest), statistics, strict=True):
            writer.write_unit(unit, *tiny.make_unit(unit), values)
    return path


def bytes_on_disk(path: Path) -> int:
    return sum(len(data) for data in tiny.tree(path).values())


def test_coverage_and_identity_of_a_partial_cache(partial: Path) -> None:
    info = describe(partial)
    manifest = tiny.make_manifest()
    assert info["spec_id"] == manifest.spec_id
    assert info["teacher"] == manifest.teacher and info["codec"] == manifest.codec
    assert info["coverage"] == {
        "complete": False,
        "num_shards": 2,
        "complete_shards": 1,
        "num_views": 18,
        "covered_views": 15,
        "num_records": 15,
        "unreadable_views": 0,
    }
    text = format_info(info)
    for words in ("PARTIAL", "1 of 2", "15 of 18", manifest.spec_id, "abababababab", "apache-2.0", "rows 4", "block 2"):
        assert words in text
    assert "tinymim 0.1.0" in text and "to complete it" in text


def test_every_byte_of_the_cache_is_counted_once(partial: Path) -> None:
    info = describe(partial)
    assert info["total_bytes"] == sum(info["bytes_by_component"].values()) == bytes_on_disk(partial)
    assert info["bytes_per_view"] == info["total_bytes"] / 15
    assert info["bytes_to_complete"] == round(3 * info["bytes_per_view"])
    assert info["bytes_per_further_view_of_all_images"] == round(6 * info["bytes_per_view"])
    payload = partial / "units" / "train-000" / "v0-1" / "qk_index" / "c" / "0" / "0" / "0" / "0"
    assert 0 < payload.stat().st_size <= info["bytes_by_component"]["indices"]


@pytest.mark.parametrize(
    ("array", "component"),
    [
        ("qk_head_gap", "indices"),
        ("vv_tail_gap", "indices"),
        ("qk_head_code", "values"),
        ("qk_entropy", "values"),
        ("qk_probs", "values"),
        ("box", "boxes"),
        ("flip", "boxes"),
        ("digest", "digests"),
        ("key_bytes", "keys"),
        ("key_ends", "keys"),
        ("overhead", "overhead"),
    ],
)
def test_components(array: str, component: str) -> None:
    assert component_of(array) == component


def test_the_arithmetic_of_a_complete_cache_is_said_aloud(tmp_path: Path) -> None:
    info = describe(complete(tmp_path / "cache", [{}, {}]))
    text = format_info(info)
    each, total = info["bytes_per_view"] / 1024, info["total_bytes"] / 1024
    assert f"6 images x 2 views x {each:.1f} KiB = {total:.1f} KiB" in text
    assert "PARTIAL" not in text and "to complete it" not in text and "fidelity" not in text
    assert "N more views of every image" in text


def test_fidelity_is_the_mean_over_heads_and_units_by_records(tmp_path: Path) -> None:
    def unit(views: int, kept: list[float], kl: float) -> dict[str, object]:
        relation = {"kept_mass": kept, "kl": kl, "name": "qk", "biased": True}
        return {"fidelity": {"views": views, "qk": relation}, "unreadable": [["key", "why"]]}

    cache = complete(tmp_path / "cache", [unit(4, [0.5, 0.7], 1.0), unit(8, [0.1, 0.1], 4.0)])
    fidelity = describe(cache)["fidelity"]
    assert fidelity == {
        "audited_views": 12,
        "qk.kept_mass": pytest.approx(0.35),
        "qk.kl": pytest.approx(2.5),
    }
    text = format_info(describe(cache))
    assert re.search(r"^  mean +qk$", text, re.MULTILINE) and re.search(r"^  kept_mass +0\.35$", text, re.MULTILINE)


def test_units_weigh_by_their_records(partial: Path) -> None:
    # Units of 2, 1 and 2 views with kept_mass 0.5, 0.25 and 0.5.
    assert describe(partial)["fidelity"] == {"kept_mass": pytest.approx(0.45)}


def test_images_left_out_are_reported(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_shards=1, num_views=2)
    with CacheWriter.open(tmp_path / "cache", manifest) as writer:
        unit = UnitId("train-000.tar", 0, 2)
        writer.write_unit(unit, *tiny.make_unit(unit, num_images=2), {})
    info = describe(tmp_path / "cache")
    assert info["coverage"]["complete"] and info["coverage"]["unreadable_views"] == 2
    assert "4 records x" in format_info(info) and "2 views of unreadable images" in format_info(info)


def test_a_cache_without_units(tmp_path: Path) -> None:
    with CacheWriter.open(tmp_path / "cache", tiny.make_manifest()):
        pass
    info = describe(tmp_path / "cache")
    assert info["bytes_per_view"] == 0 and info["fidelity"] == {}
    assert "no records yet" in format_info(info)


def test_it_is_json_and_the_committed_old_cache_is_described() -> None:
    info = describe(tiny.COMMITTED_CACHE)
    assert json.loads(json.dumps(info)) == info
    assert info["format_version"] == 1


def test_what_is_no_cache_or_damaged_is_refused(partial: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"):
        describe(tmp_path / "nowhere")
    record = next((partial / "commits").glob("*.json"))
    record.write_text(record.read_text().replace('"num_images": 3', '"num_images": 4'))
    with pytest.raises(CacheCorrupt, match=record.name):
        describe(partial)


def test_info_says_who_when_and_what_more_views_would_take(home: Path, run: Run) -> None:
    os.utime(next((home / "cache" / "commits").glob("*v0-1.json")), (0, 0))
    info = describe(home / "cache", more_views=100)
    assert info["history"]["first_commit"] == "1970-01-01T00:00:00+00:00" < info["history"]["last_commit"]
    assert sum(info["history"]["units_by_owner"].values()) == 6
    each = info["bytes_per_further_view_of_all_images"]
    assert info["more_views"]["views"] == 100 and abs(info["more_views"]["bytes"] - 100 * each) <= 100
    text = format_info(info)
    assert "committed 1970-01-01" in text and "; 100 are " in text and "(6 units)" in text
    code, out, _ = run("cache", "info", (home / "cache").as_uri(), "--more-views", "7", "--json")
    assert code == 0 and json.loads(out)["more_views"]["views"] == 7
    assert run("cache", "info", home / "cache", "--more-views", "0")[0] == 2


def test_info_names_writers_at_work(home: Path) -> None:
    leases = Leases(open_store(home / "cache"))
    assert describe(home / "cache")["writers"] == [] and leases.claim("units/x")
    [writer] = describe(home / "cache")["writers"]
    leases.close()
    assert writer["lease"] == "units/x" and f"process {os.getpid()}" in writer["holder"]
    assert "holds units/x" in format_info(describe(home / "cache") | {"writers": [writer]})
