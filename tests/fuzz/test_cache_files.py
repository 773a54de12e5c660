"""Anything in any file of a cache ends in an error of ours, or in the values that were written.

Bytes at random are caught by digests. Fields at random are signed again, so that only the checks of the fields refuse
them. `verify` must name every change of bytes.
"""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import UserError
from tinymim.stages.cache import info as cache_info
from tinymim.stages.cache import list as cache_list
from tinymim.stages.cache import pack, upgrade, verify
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.commit import holds_keys, signed
from tinymim.storage.layout import VIEWS, _described_group
from tinymim.storage.leases import Leases
from tinymim.storage.local import LocalStore
from tinymim.storage.packed import CARD, _compact
from tinymim.storage.reader import CacheReader
from tinymim.storage.v1.cache import OldCache
from tinymim.tests.fuzz.damage import damaged, outcomes
from tinymim.tests.fuzz.odd import VALUES, altered
from tinymim.tests.storage import tiny

DATA = Path(__file__).parents[1] / "data"
OLD = ("cache_v1", "cache_v1_first", "cache_v1_hidden", "cache_v1_sketch")
Read = Callable[[Path], Any]


def numbers(small: int, large: int) -> pytest.MarkDecorator:
    """A few inputs always, many in the slow suite: 100,000 in all of this file, ten minutes."""
    return pytest.mark.parametrize("count", [small, pytest.param(large, marks=pytest.mark.slow)])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two target layers, three units, a shard in part, and constants."""
    tiny.make_tiny_cache(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def packed(cache: Path, tmp_path: Path) -> Path:
    pack.run(cache, tmp_path / "packed")
    return tmp_path / "packed"


def content(folder: Path) -> dict[str, Any]:
    """Everything that a cache holds; every unit is read whole and in part, and both must be alike."""
    reader = CacheReader(folder)
    found: dict[str, Any] = {}
    for layer in (VIEWS, *reader.layers):
        found[layer] = None if layer == VIEWS else {n: v.tobytes() for n, v in (reader.constants(layer) or {}).items()}
        for unit in reader.units(layer):
            whole = reader.read_views(unit)
            last = unit.unit.first_view + unit.unit.num_views - 1
            some = reader.read_views(unit, [last])
            assert all(some[name][0].tobytes() == values[-1].tobytes() for name, values in whole.items())
            keys = reader.read_keys(unit) if holds_keys(layer, unit.unit) else None
            found[f"{layer} {unit}"] = ({name: values.tobytes() for name, values in whole.items()}, keys)
        reader.coverage(layer)
    return found


def old_content(folder: Path) -> Any:
    """Everything that a cache of format 1 holds."""
    old = OldCache(folder)
    old.coverage(), old.bytes_by_component()
    units = [(str(unit), old.read_unit(unit)) for unit in old.units]
    arrays = [
        (name, keys, {key: value.tobytes() for key, value in sorted(some.items())}) for name, (keys, some) in units
    ]
    return arrays, {name: values.tobytes() for name, values in (old.constants() or {}).items()}


def everything(folder: Path) -> Any:
    """What the commands read of a cache: `info`, `list` and `verify`, after the records themselves."""
    try:
        return content(folder)
    finally:
        cache_list.run(folder.parent)
        ours(lambda: verify.run(folder))
        ours(lambda: json.dumps(cache_info.describe(folder), allow_nan=False))
        ours(lambda: cache_info.format_info(cache_info.describe(folder)))


def ours(call: Callable[[], object]) -> None:
    """Call, and pass over an error of ours."""
    with suppress(UserError):
        call()


def attack(folder: Path, read: Read, change: Callable[[Path, bytes], bytes], paths: list[Path], count: int) -> Any:
    """Change a file at a time and read; then put it back. An equal result or an error of ours is well."""
    intact = {path: path.read_bytes() for path in paths}
    wanted, rng = read(folder), random.Random(0)

    def one(_number: int) -> str:
        path = rng.choice(paths)
        data = change(path, intact[path])
        path.write_bytes(data)
        try:
            return "read" if read(folder) == wanted else "read otherwise"
        finally:
            path.write_bytes(intact[path])

    found = outcomes(one, count)
    print(f"{folder.name}: {count:,} inputs: {dict(found)}")
    return found


def files(folder: Path, *endings: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings or ("",)))


# ---- bytes at random


def verified(folder: Path, read: Read, intact: dict[str, bytes]) -> Any:
    """`read`, after `verify` has named the change if there is one."""
    changed = tiny.tree(folder) != intact
    sound = False
    with suppress(UserError):
        sound = verify.run(folder)["sound"]
    assert sound != changed
    return read(folder)


@numbers(150, 20_000)
def test_bytes_of_a_cache(cache: Path, count: int) -> None:
    rng = random.Random(1)
    read = partial(verified, read=content, intact=tiny.tree(cache))
    found = attack(cache, read, lambda _, data: damaged(data, rng), files(cache), count)
    assert "read otherwise" not in found and found["CacheCorrupt"] > count / 2


@numbers(100, 12_000)
def test_bytes_of_a_packed_cache(packed: Path, count: int) -> None:
    rng = random.Random(2)
    paths = [path for path in files(packed) if path.name != CARD]  # nothing reads the card
    found = attack(packed, content, lambda _, data: damaged(data, rng), paths, count)
    assert "read otherwise" not in found and found["CacheCorrupt"] > count / 3


@numbers(25, 3_000)
@pytest.mark.parametrize("name", OLD)
def test_bytes_of_an_old_cache(name: str, tmp_path: Path, count: int) -> None:
    folder, rng = Path(shutil.copytree(DATA / name, tmp_path / name)), random.Random(3)
    found = attack(folder, old_content, lambda _, data: damaged(data, rng), files(folder), count)
    assert "read otherwise" not in found and found["CacheCorrupt"] > count / 2


# ---- fields at random, under digests that fit


def described(stored: Any, rng: random.Random) -> bytes:
    """The metadata of a group whose description is altered."""
    return _described_group(altered(stored["attributes"]["tinymim"], rng))


def resigned(stored: Any, rng: random.Random) -> bytes:
    """A record that is altered, with its digest."""
    del stored["record_digest"]
    changed = altered(stored, rng)
    return signed(changed) if isinstance(changed, dict) else canonical_json(changed)


def reindexed(stored: Any, rng: random.Random) -> bytes:
    """The index of a packed cache, altered, with its digest."""
    del stored["digest"]
    changed = altered(stored, rng)
    return _compact(changed | {"digest": digest_hex(_compact(changed))})


def redescribed(stored: Any, rng: random.Random) -> bytes:
    """The manifest of an old cache, altered, with its digest."""
    manifest = altered(stored["attributes"]["tinymim"], rng)
    stored["attributes"] = {"tinymim": manifest, "tinymim_digest": digest_hex(canonical_json(manifest))}
    return canonical_json(stored)


def forge(how: Callable[[Any, random.Random], bytes], rng: random.Random, _path: Path, data: bytes) -> bytes:
    while True:
        try:
            return how(json.loads(data), rng)
        except ValueError:  # nan and infinity cannot be signed
            continue


@numbers(60, 8_000)
@pytest.mark.parametrize("what", ["manifest", "layer", "record", "constants"])
def test_fields_of_a_cache(cache: Path, what: str, count: int) -> None:
    paths = {
        "manifest": [cache / "zarr.json"],
        "layer": files(cache / "layers" / "rel", "zarr.json"),
        "record": [path for path in files(cache, ".json") if path.name.startswith("v")],
        "constants": files(cache, "constants.json"),
    }[what]
    how = described if what in ("manifest", "layer") else resigned
    found = attack(cache, everything, partial(forge, how, random.Random(4)), paths, count)
    assert found["CacheCorrupt"] > 0


@numbers(60, 4_000)
def test_fields_of_a_packed_index(packed: Path, count: int) -> None:
    found = attack(packed, content, partial(forge, reindexed, random.Random(5)), [packed / "cache.json"], count)
    assert found["CacheCorrupt"] > count / 3


@numbers(30, 2_500)
@pytest.mark.parametrize("name", OLD)
def test_fields_of_an_old_cache(name: str, tmp_path: Path, count: int) -> None:
    folder, rng = Path(shutil.copytree(DATA / name, tmp_path / name)), random.Random(6)
    records = [path for path in files(folder, ".json") if path.parent.name == "commits" or path.name.startswith("cons")]
    found = attack(folder, upgraded, partial(forge, resigned, rng), records, count // 2)
    found += attack(folder, upgraded, partial(forge, redescribed, rng), [folder / "zarr.json"], count // 2)
    assert found["CacheCorrupt"] > count / 3


def upgraded(folder: Path) -> Any:
    """What an old cache holds and `info` prints. A sound one is also upgraded, since that trusts what was read."""
    found = old_content(folder)
    json.dumps(cache_info.describe(folder))
    target = folder.with_name("new")
    try:
        upgrade.run(folder, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return found


# ---- leases


@numbers(300, 8_000)
def test_leases(tmp_path: Path, count: int) -> None:
    """Anything may stand in a lease: its owner may live, so nobody takes it over, and it can be shown."""
    store, rng = LocalStore(tmp_path), random.Random(7)
    writer = Leases(store)
    assert writer.claim("a")
    path = tmp_path / "leases" / "a.g1.json"
    writer.close()
    own = {"token": "x", "host": "h", "machine": "m", "pid": 3, "started": "1", "beat": 0, "lease_s": 60.0}

    def one(number: int) -> str:
        fields = altered(own, rng) if number % 2 else rng.choice(VALUES)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged(json.dumps(fields).encode(), rng) if number % 3 == 0 else json.dumps(fields).encode())
        leases = Leases(store)
        try:
            assert not leases.claim("a") and set(leases.living()) <= {"a"}
            str(leases.holder("a"))
        finally:
            leases.close()
        return "watched"

    path.parent.mkdir(exist_ok=True)
    assert outcomes(one, count) == {"watched": count}
