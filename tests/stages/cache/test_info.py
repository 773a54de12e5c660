"""What `cache info` prints is what is on disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tinymim.configs.errors import CacheCorrupt, UserError
from tinymim.stages.cache.info import describe, format_info
from tinymim.storage.layout import VIEWS, UnitId
from tinymim.storage.leases import Leases, shard_lease
from tinymim.storage.store import open_store
from tinymim.storage.writer import CacheWriter
from tinymim.tests.storage import tiny
from tinymim.tests.storage.tiny import CLS, REL

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Layer `rel` of three units of two shards, `cls` of one."""
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


def complete(path: Path, statistics: list[dict[str, object]]) -> Path:
    """A cache of one unit per shard, each with its statistics."""
    manifest = tiny.make_manifest(num_shards=len(statistics))
    with CacheWriter.open(path, manifest, [tiny.make_layer(manifest)]) as writer:
        for unit, values in zip(tiny.units_of(manifest, 2), statistics, strict=True):
            for name in (VIEWS, REL):
                with writer.begin(name, unit, tiny.make_keys(unit.shard)) as draft:
                    draft.add(tiny.make_arrays(name, unit))
                    draft.commit(values if name == REL else {"unreadable": []})
    return path


def test_coverage_and_identity_of_a_partial_cache(partial: Path) -> None:
    info = describe(partial)
    layers = {layer["name"]: layer for layer in info["layers"]}
    assert info["spec_id"] == tiny.make_manifest().spec_id and list(layers) == [VIEWS, CLS, REL]
    assert layers[REL]["spec_id"] == tiny.make_layer().spec_id and layers[REL]["teacher"] == tiny.make_layer().teacher
    assert (
        layers[REL]["coverage"]
        == layers[VIEWS]["coverage"]
        == {
            "complete": False,
            "begun_shards": 2,
            "complete_shards": 1,
            "views": 2,
            "most_views": 3,
            "num_images": 6,
            "num_records": 15,
            "unreadable_images": 0,
        }
    )
    assert layers[CLS]["coverage"]["num_records"] == 6 and layers[CLS]["coverage"]["begun_shards"] == 1
    text = format_info(info)
    for words in ("PARTIAL", "1 of 2", "2 to 3", info["spec_id"], "abababababab", "apache-2.0", "rows 4", "qkv@2"):
        assert words in text
    assert "tinymim 0.2.0" in text


def test_every_byte_of_the_cache_is_counted_once(partial: Path) -> None:
    info = describe(partial)
    on_disk = sum(len(data) for data in tiny.tree(partial).values())
    assert info["bytes"] == sum(layer["bytes"] for layer in info["layers"]) == on_disk
    for layer in info["layers"]:
        assert layer["bytes"] == sum(layer["bytes_by_component"].values())
        held = layer["bytes_by_component"].get("constants", 0)
        assert layer["bytes_per_view"] == (layer["bytes"] - held) / layer["coverage"]["num_records"]
    further = sum(layer["bytes_per_view"] for layer in info["layers"])
    assert info["bytes_per_further_view_of_all_images"] == round(6 * further)
    assert describe(partial, 100)["more_views"] == {"views": 100, "bytes": round(600 * further)}


def test_fidelity_is_the_mean_over_heads_and_over_units_weighted_by_records(tmp_path: Path) -> None:
    cache = complete(
        tmp_path / "cache",
        [
            {"fidelity": {"views": 16, "qk": {"kl": [0.1, 0.3]}, "cosine": 1.0}},
            {"fidelity": {"views": 8, "qk": {"kl": [0.4, 0.4]}, "cosine": 0.0}},
        ],
    )
    fidelity = describe(cache)["layers"][1]["fidelity"]
    assert fidelity == pytest.approx({"audited_views": 24, "qk.kl": 0.3, "cosine": 0.5})
    text = format_info(describe(cache))
    assert "on 24 views" in text and "yes" in text and "PARTIAL" not in text


def test_numbers_whose_sum_is_infinite_are_left_out(tmp_path: Path) -> None:
    huge: list[dict[str, object]] = [
        {"fidelity": {"views": 8, "qk": {"kl": [1e308, 1e308], "angle": 0.5}, "cosine": 1e308}}
    ] * 2
    described = describe(complete(tmp_path / "cache", huge))
    assert described["layers"][1]["fidelity"] == {"audited_views": 16, "qk.angle": 0.5}
    json.dumps(described, allow_nan=False)


def test_times_owners_and_writers(partial: Path, run: Run) -> None:
    for number, path in enumerate(sorted((partial / "layers" / REL).glob("*/*.json"))):
        os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    leases = Leases(open_store(partial))
    assert leases.claim(shard_lease("train-001.tar"))
    code, text, _ = run("cache", "info", partial)
    assert code == 0 and f"process {os.getpid()}" in text and "(3 units)" in text
    history = json.loads(run("cache", "info", partial, "--json")[1])["layers"][2]["history"]
    assert history["first_commit"] == "2023-11-14T22:13:20+00:00" and sum(history["units_by_owner"].values()) == 3
    leases.close()


def test_unreadable_images_are_counted(tmp_path: Path) -> None:
    manifest = tiny.make_manifest(num_samples=5)
    with CacheWriter.open(tmp_path, manifest, [tiny.make_layer(manifest)]) as writer:
        tiny.write_units(writer, [UnitId("train-000.tar", 0, 2)], num_images=3)
    info = describe(tmp_path)
    assert info["layers"][0]["coverage"]["unreadable_images"] == 2
    assert "2 images of these shards cannot be read" in format_info(info)


def test_a_cache_without_units_and_what_is_refused(tmp_path: Path, partial: Path, run: Run) -> None:
    with CacheWriter.open(tmp_path / "new", tiny.make_manifest()):
        pass
    assert run("cache", "info", tmp_path / "new")[0] == 0
    with pytest.raises(UserError, match="holds 2 caches"):
        describe(tmp_path)
    assert run("cache", "info", partial, "--more-views", "0")[0] == 2
    record = next((partial / "layers" / REL).glob("*/*.json"))
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(CacheCorrupt):
        describe(partial)
