"""The ledger of units, and the batches that a loader makes of them."""

from collections.abc import Iterator

import pytest

from tinymim.configs.sections.source import SourceConfig
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.stages.units.ledger import NO_ITEMS, Ledger, UnitBatches, UnitReport, missing_units
from tinymim.storage.layout import UnitId

A, B, C = (UnitId(f"{name}.tar", 0, 2) for name in "abc")


@pytest.fixture
def missing() -> list[UnitId]:
    """What the cache lacks; tests change it."""
    return [A, B, C]


def test_units_are_given_once_and_failures_come_last_and_are_given_up(missing: list[UnitId]) -> None:
    ledger = Ledger(lambda: missing, retries=1)
    assert ledger.take() == A
    assert not ledger.settle(UnitReport(A, "failed", "first"))
    assert [ledger.take(), ledger.take(), ledger.take(), ledger.take()] == [B, C, A, None]
    ledger.settle(UnitReport(B, "committed"))
    ledger.settle(UnitReport(C, "unfinished"))
    assert ledger.take() == C
    assert ledger.settle(UnitReport(A, "failed", "second"))
    ledger.settle(UnitReport(C, "committed"))
    missing[:] = [A]
    assert ledger.failures == {A: "second"} and ledger.committed == 2 and ledger.idle
    assert not ledger.look() and ledger.take() is None and not ledger.left()


def test_what_others_have_is_looked_at_again(missing: list[UnitId]) -> None:
    ledger = Ledger(lambda: missing, retries=0)
    for unit in (A, B, C):
        assert ledger.take() == unit
        ledger.settle(UnitReport(unit, "elsewhere"))
    assert ledger.take() is None and ledger.elsewhere() == {A, B, C} == ledger.left()
    missing[:] = [B]
    assert ledger.look() and ledger.take() == B and not ledger.elsewhere()


def test_a_failure_that_another_job_has_made_good_is_none(missing: list[UnitId]) -> None:
    ledger = Ledger(lambda: missing, retries=0)
    ledger.settle(UnitReport(A, "failed", "for us"))
    missing[:] = []
    assert not ledger.look() and not ledger.failures


def test_views_of_a_shard_that_is_in_progress_are_not_given_to_another(missing: list[UnitId]) -> None:
    ledger = Ledger(lambda: missing, retries=0)
    assert ledger.take() == A
    missing[:] = [UnitId("a.tar", 0, 1), B]
    assert ledger.look() and ledger.take() == B and ledger.take() is None


@pytest.fixture
def source(drawn_shards: object) -> ShardSet:
    """Shards of 25, 25 and 10 images."""
    return open_shards(SourceConfig(shards=str(drawn_shards)))


def unit(number: int) -> UnitId:
    return UnitId(f"shard-00000{number}.tar", 0, 2)


def test_batches_know_their_units_and_the_end_is_the_end(source: ShardSet) -> None:
    given = iter([(unit(0), ("a",)), (unit(2), ("a", "b")), None])
    batches = UnitBatches(source, 10, 8, lambda _: next(given))
    plan = batches.plan()
    sizes, pieces = [], []
    for items in plan:
        sizes.append(len(items))
        pieces.append(batches.next_piece())
    assert sizes == [20, 20, 10, 20]
    assert [(p.unit, p.layers, p.first, p.last) for p in pieces if p] == [
        (unit(0), ("a",), True, False),
        (unit(0), ("a",), False, False),
        (unit(0), ("a",), False, True),
        (unit(2), ("a", "b"), True, True),
    ]


def test_a_unit_that_comes_late_does_not_stop_those_in_progress(source: ShardSet) -> None:
    asked: list[bool] = []

    def late() -> Iterator[tuple[UnitId, tuple[str, ...]] | None]:
        yield from ((unit(2), ("a",)), None, None, (unit(1), ("a",)), None)
        while True:
            yield None

    given = late()

    def take(may_wait: bool) -> tuple[UnitId, tuple[str, ...]] | None:
        asked.append(may_wait)
        return next(given)

    batches = UnitBatches(source, 25, 8, take)
    plan = batches.plan()
    ahead = [next(plan) for _ in range(4)]  # a loader asks before it has answered
    assert [len(items) for items in ahead] == [20, 0, 0, 50] and ahead[1] is NO_ITEMS
    assert asked == [True, False, False, False] and batches.in_progress() == [unit(2), unit(1)]
    assert batches.next_piece() is not None and batches.next_piece() is None and batches.next_piece() is None
    assert batches.in_progress() == [unit(1)] and batches.next_piece() is not None
    assert next(plan, None) is None and asked[-1]


def test_a_unit_is_made_in_parts_of_all_images(source: ShardSet) -> None:
    given = iter([(UnitId("shard-000000.tar", 3, 5), ("a",)), None])
    batches = UnitBatches(source, 20, 2, lambda _: next(given))
    found = []
    for items in batches.plan():
        piece = batches.next_piece()
        assert piece is not None and set(items[:, 2]) == set(piece.views)
        found.append((piece.views, len(items), piece.first, piece.last, piece.begins_unit, piece.ends_unit))
    assert found == [
        (range(3, 5), 40, True, False, True, False),
        (range(3, 5), 10, False, True, False, False),
        (range(5, 7), 40, True, False, False, False),
        (range(5, 7), 10, False, True, False, False),
        (range(7, 8), 20, True, False, False, False),
        (range(7, 8), 5, False, True, False, True),
    ]


@pytest.mark.parametrize(
    ("held", "views", "num_views", "cut_like", "wanted"),
    [
        ([[]], [], 7, [], ["v0-2", "v3-5", "v6-6"]),
        ([["v0-1"]], ["v0-1"], 7, [], ["v2-2", "v3-5", "v6-6"]),  # cut where a new cache would be
        ([["v3-5"]], ["v3-5"], 7, [], ["v0-2", "v6-6"]),
        ([[]], ["v0-1", "v2-3"], 6, [], ["v0-1", "v2-2", "v3-3", "v4-5"]),  # inside one of them, or outside all
        ([["v0-0"]], ["v0-8"], 5, [], ["v1-2", "v3-4"]),
        ([["v0-0"]], ["v0-0"], 3, ["v1-1", "v2-2"], ["v1-1", "v2-2"]),
        ([["v0-9"]], ["v0-9"], 5, [], []),
        ([["v0-2", "v3-5"], ["v0-2"]], ["v0-5"], 6, [], ["v3-5"]),  # killed between two layers
        ([["v0-2"], []], ["v0-2"], 6, [], ["v0-2", "v3-5"]),
        ([["v0-1"], ["v0-2"]], ["v0-2"], 3, [], ["v2-2"]),  # each layer holds all of a run or nothing
        ([["v0-1"], []], ["v0-2"], 3, [], ["v0-1", "v2-2"]),
    ],
)
def test_missing_views_are_cut_into_units_that_fit_the_view_layer(
    source: ShardSet, held: list[list[str]], views: list[str], num_views: int, cut_like: list[str], wanted: list[str]
) -> None:
    def units(ranges: list[str]) -> list[UnitId]:
        ends = [tuple(map(int, each[1:].split("-"))) for each in ranges]
        return [UnitId("shard-000001.tar", first, last - first + 1) for first, last in ends]

    one = ShardSet(source.shards[1:2])
    found = missing_units(one, list(map(units, held)), units(views), num_views, 3, units(cut_like))
    assert [unit.view_range for unit in found] == wanted
