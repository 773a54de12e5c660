"""Anything at all as a manifest or a record ends in an error of ours, or in values that fit."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinymim.configs.errors import UserError
from tinymim.storage.atomic import canonical_json, digest_hex
from tinymim.storage.v1.cache import OldCache
from tinymim.storage.v1.manifest import parse_manifest
from tinymim.storage.v1.records import parse_unit
from tinymim.tests.storage.v1.forged import COMMIT, DATA, UNIT

EXAMPLES = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**11, 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "units/../../x", "a\x00b", "\ud800", "." * 300])
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
MANIFEST = OldCache(DATA / "cache_v1").manifest


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """`original` with one to three of its values replaced, removed, or given a new neighbour."""
    root = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        owner: Any = root
        key: Any = ""
        while isinstance(owner[key], dict | list) and owner[key] and draw(st.integers(0, 3)):
            owner = owner[key]
            key = draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "add" and isinstance(owner[key], dict):
            owner[key][draw(st.text(max_size=5))] = draw(anything)
        elif how == "remove" and key != "":
            del owner[key]
        else:
            owner[key] = draw(anything)
    return root[""]


def ours_or_success(function: Callable[[], Any]) -> Any:
    what = "fine"
    try:
        return function()
    except UserError as error:  # CacheCorrupt and CacheMismatch are
        what = error.what
    assert what and "\n" not in what and len(what) < 5000
    return None


@EXAMPLES
@given(mutated(json.loads((DATA / "cache_v1_first" / "zarr.json").read_bytes())))
def test_mutated_manifests(stored: Any) -> None:
    """The first caches had no digest, so that only the checks of the fields can refuse them."""
    manifest = ours_or_success(lambda: parse_manifest(json.dumps(stored).encode(), "a test"))
    if manifest is not None:
        assert all(isinstance(manifest.teacher[name], int) for name in ("heads", "tokens", "block"))
        assert all(0 <= shard.num_samples < 2**40 for shard in manifest.source)
        assert manifest.shapes and len(manifest.spec_id) == 16


@EXAMPLES
@given(mutated({k: v for k, v in json.loads((DATA / "cache_v1" / COMMIT).read_bytes()).items() if k[:6] != "record"}))
def test_mutated_records_whose_digest_is_right(record: Any) -> None:
    try:
        digest = digest_hex(canonical_json(record))
        data = canonical_json({**record, "record_digest": digest} if isinstance(record, dict) else record)
    except ValueError:  # nan and infinity are not JSON
        return
    unit = ours_or_success(lambda: parse_unit(data, COMMIT, "cache", MANIFEST))
    if unit is not None:
        assert unit.folder == UNIT and not [name for name in unit.files if ".." in name or name.startswith("/")]
        assert unit.num_records == unit.num_images * unit.num_views <= 6


@EXAMPLES
@given(st.binary(max_size=40) | anything.map(repr).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_a_manifest_or_a_record(data: bytes) -> None:
    ours_or_success(lambda: parse_manifest(data, "a test"))
    ours_or_success(lambda: parse_unit(data, COMMIT, "cache", MANIFEST))
