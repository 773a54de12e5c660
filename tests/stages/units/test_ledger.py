"""The ledger of units, and the batches that a loader makes of them."""

from collections.abc import Iterator

import pytest

from tinymim.configs.sections import SourceConfig
from tinymim.pipeline.shards import ShardSet, open_shards
from tinymim.stages.units.ledger import NO_ITEMS, Ledger, UnitBatches, UnitReport
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
    given = iter([unit(0), unit(2), None])
    batches = UnitBatches(source, 10, lambda _: next(given))
    plan = batches.plan()
    sizes, pieces = [], []
    for items in plan:
        sizes.append(len(items))
        pieces.append(batches.next_piece())
    assert sizes == [20, 20, 10, 20]
    assert [(p.unit, p.first, p.last) for p in pieces if p] == [
        (unit(0), True, False),
        (unit(0), False, False),
        (unit(0), False, True),
        (unit(2), True, True),
    ]


def test_a_unit_that_comes_late_does_not_stop_those_in_progress(source: ShardSet) -> None:
    asked: list[bool] = []

    def late() -> Iterator[UnitId | None]:
        yield from (unit(2), None, None, unit(1), None)
        while True:
            yield None

    given = late()

    def take(may_wait: bool) -> UnitId | None:
        asked.append(may_wait)
        return next(given)

    batches = UnitBatches(source, 25, take)
    plan = batches.plan()
    ahead = [next(plan) for _ in range(4)]  # a loader asks before it has answered
    assert [len(items) for items in ahead] == [20, 0, 0, 50] and ahead[1] is NO_ITEMS
    assert asked == [True, False, False, False] and batches.in_progress() == [unit(2), unit(1)]
    assert batches.next_piece() is not None and batches.next_piece() is None and batches.next_piece() is None
    assert batches.in_progress() == [unit(1)] and batches.next_piece() is not None
    assert next(plan, None) is None and asked[-1]
