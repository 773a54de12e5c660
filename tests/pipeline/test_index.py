"""`index.json`: malformed in every way ends in our error, and what it states is compared with the folder."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import SourceError
from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.index import INDEX_NAME, Index, parse_index, read_index
from tinymim.pipeline.shards import open_shards

HASH = "sha256:" + "0" * 64
ROW = {"name": "a.tar", "size_bytes": 5, "num_samples": 1, "content_hash": HASH}


def index(**changes: Any) -> str:
    return json.dumps({"version": 1, "shards": [ROW], "classes": ["x"]} | changes)


def row(**changes: Any) -> str:
    return index(shards=[ROW | changes])


MALFORMED: dict[str, str | bytes] = {
    "nothing": "",
    "no json": "{",
    "no text": b"\xff\xfe\x00",
    "deep nesting": "[" * 100_000,
    "a long number": '{"version": ' + "1" * 5000 + "}",
    "a list": "[]",
    "null": "null",
    "a string": '"index"',
    "no version": "{}",
    "another version": '{"version": 99}',
    "true for a version": '{"version": true}',
    "a list for a version": '{"version": [1]}',
    "shards are null": index(shards=None),
    "shards are an object": index(shards={"a.tar": ROW}),
    "a shard is null": index(shards=[None]),
    "a shard is a list": index(shards=[["a.tar", 5, 1, HASH]]),
    "a shard without a name": index(shards=[{k: v for k, v in ROW.items() if k != "name"}]),
    "a name with a folder": row(name="../a.tar"),
    "an empty name": row(name=""),
    "a number for a name": row(name=5),
    "a negative count": row(num_samples=-1),
    "a count beyond 64 bits": row(num_samples=2**70),
    "a fraction for a count": row(num_samples=1.5),
    "text for a count": row(num_samples="1"),
    "nan for a count": index(shards=[ROW]).replace('"num_samples": 1', '"num_samples": NaN'),
    "a negative size": row(size_bytes=-5),
    "null for a size": row(size_bytes=None),
    "no hash": row(content_hash=""),
    "a list for a hash": row(content_hash=[HASH]),
    "a shard twice": index(shards=[ROW, ROW]),
    "classes are null": index(classes=None),
    "a class is a number": index(classes=[1]),
    "another sum": index(num_samples=7),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_index_is_refused_and_named(case: str, tmp_path: Path, drawn_shards: Path) -> None:
    shutil.copy(drawn_shards / "shard-000000.tar", tmp_path)
    text = MALFORMED[case]
    (tmp_path / INDEX_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    for reader in (lambda: open_shards(SourceConfig(shards=tmp_path)), lambda: read_index(tmp_path)):
        with pytest.raises(SourceError, match=INDEX_NAME) as caught:
            reader()
        assert len(str(caught.value)) < 700 and caught.value.hint


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])  # 10 s
def test_mutations_end_in_our_error_or_success(count: int) -> None:
    draw, good, accepted = random.Random(0), bytearray(index(num_samples=1).encode()), 0
    for _ in range(count):
        data = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 5])):
            data[draw.randrange(len(data))] = draw.choice(b'{}[],:"-0189etnN\\ \x00\xff')
        try:
            parse_index("index.json", bytes(data))
            accepted += 1
        except SourceError:
            pass
    assert 0 < accepted < count


def test_keys_of_later_versions_are_passed_over_and_none_is_an_empty_index() -> None:
    assert parse_index("x", index(report={"a": [1]}).encode()).rows()["a.tar"].num_samples == 1
    assert parse_index("x", None) == Index() and parse_index("x", b'{"version": 1}') == Index()


def changed(folder: Path, change: dict[str, Any], number: int = 0) -> Path:
    """Change a row of a folder's index."""
    path = folder / INDEX_NAME
    parsed = json.loads(path.read_text())
    parsed["shards"][number] |= change
    del parsed["num_samples"]
    path.write_text(json.dumps(parsed))
    return folder


@pytest.fixture
def copied(drawn_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_shards, tmp_path / "copied"))


@pytest.mark.parametrize("count", [12, 26])
@pytest.mark.parametrize("with_members", [True, False])
def test_another_count_than_the_shard_holds_is_refused(copied: Path, count: int, with_members: bool) -> None:
    changed(copied, {"num_samples": count})
    if not with_members:
        (copied / "index.members").unlink()
    with pytest.raises(SourceError, match=r"shard-000000.tar holds another number of images .*\n  got: 25 images"):
        open_shards(SourceConfig(shards=copied)).shards[0].members()


def test_a_count_of_zero_is_refused_at_once(copied: Path) -> None:
    with pytest.raises(SourceError, match=r"holds another number of images .*\n  got: 25 images"):
        open_shards(SourceConfig(shards=changed(copied, {"num_samples": 0})))


def test_shards_that_an_index_lists_must_be_there(copied: Path) -> None:
    (copied / "shard-000001.tar").unlink()
    with pytest.raises(SourceError, match=r"1 of the 3 shards of index.json are missing\n  got: shard-000001.tar"):
        open_shards(SourceConfig(shards=copied))
    assert open_shards(SourceConfig(shards=copied, pattern="*[02].tar")).counts == [25, 10]


def test_a_shard_that_was_cut_and_filled_with_zeros_is_refused_when_it_is_used(copied: Path) -> None:
    path = copied / "shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for _ in range(2):
        sound, broken, _ = open_shards(SourceConfig(shards=copied)).shards
        assert len(sound.members().keys) == 25, "one shard does not keep the others from being used"
        with pytest.raises(SourceError, match=r"shard shard-000001.tar ends in zeros"):
            broken.members()


def test_a_stale_index_of_equal_size_is_found_by_the_bytes(copied: Path) -> None:
    sound, *_ = open_shards(SourceConfig(shards=copied)).shards
    sound.verify()
    with open(copied / "shard-000000.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2")
    stale, *_ = open_shards(SourceConfig(shards=copied)).shards
    with pytest.raises(SourceError, match=r"shard-000000.tar is not the file that index.json describes") as caught:
        stale.verify()
    assert caught.value.expected == stale.content_hash and INDEX_NAME in str(caught.value.hint)
    (copied / "shard-000000.tar").unlink()
    with pytest.raises(SourceError, match=r"cannot be opened\n  got: No such file.*\n  hint: restore it"):
        stale.verify()
