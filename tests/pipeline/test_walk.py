"""What is fetched ahead, by the manner of reading."""

from collections.abc import Iterable

from tinymim.pipeline.walk import Walk

BLOCK, LAST, MOST = 100, 50, 4


def after(walk: Walk, reads: Iterable[tuple[int, int]]) -> list[int]:
    """The blocks to fetch behind the last of `reads`, given as (offset, size)."""
    found: list[int] = []
    for offset, size in reads:
        walk.step(offset, offset + size)
        found = list(walk.ahead((offset + size - 1) // BLOCK, LAST, MOST))
    return found


def test_a_pass_reaches_twice_as_far_at_every_block() -> None:
    walk = Walk(BLOCK)
    assert after(walk, [(5, 40)]) == [1]
    assert after(walk, [(50, 40)]) == [1]
    assert after(walk, [(95, 40)]) == [2, 3]
    assert after(walk, [(140, 100)]) == [3, 4, 5, 6]
    assert after(walk, [(240, 100)]) == [4, 5, 6, 7]
    assert after(walk, [(100 * i, 100) for i in range(3, LAST)]) == [50]
    assert walk.scattered == 0


def test_a_run_after_a_gap_is_fetched_up_to_where_the_next_gap_is_expected() -> None:
    walk = Walk(BLOCK)
    first = [(20 * i, 20) for i in range(15)]  # 300 bytes
    after(walk, first)
    assert after(walk, [(1000, 20)]) == [11, 12] and walk.scattered == 0
    assert after(walk, [(1020 + 20 * i, 20) for i in range(14)]) == []
    assert after(walk, [(1300 + 20 * i, 20) for i in range(20)]) != []  # twice as long: no gap is expected any more
    assert after(Walk(BLOCK, like=300), [(1200, 20)]) == [13, 14]  # the next shard, the same manner


def test_reads_back_and_forth_are_scattered() -> None:
    walk = Walk(BLOCK)
    after(walk, [(50 * (i * 7 % 20), 10) for i in range(1, 9)])
    assert [walk.scattered, walk.settled] == [7, False]
    assert (after(walk, [(4900, 10)]), walk.settled) == ([50, 0, 1, 2], True)  # all of a shard that is kept
    assert after(walk, [(2000 + 10 * i, 10) for i in range(12)]) != []
    assert not walk.settled  # now a pass


def test_a_second_pass_expects_no_gap() -> None:
    walk = Walk(BLOCK)
    after(walk, [(10 * i, 10) for i in range(30)])
    assert after(walk, [(5, 10)]) == [1] and walk.like is None and walk.scattered == 0
