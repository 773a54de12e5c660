"""A thread behind another one: order, back-pressure, errors, and how it ends."""

import threading
import time
from collections.abc import Callable

import pytest

from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.units.background import Background


def test_things_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with Background("test", done.append, 2) as background:
        for number in range(20):
            background.give(number)
        background.drain()
        assert done == list(range(20))
        background.give(20)
    assert done == list(range(21))


def test_who_gives_too_much_waits() -> None:
    go_on = threading.Event()
    with Background[int]("test", lambda _: waits(go_on), 1) as background:
        background.give(0)  # being worked on
        background.give(1)  # in line
        threading.Timer(0.3, go_on.set).start()
        began_s = time.monotonic()
        background.give(2)
        background.give(3)
        assert time.monotonic() - began_s > 0.1


def waits(event: threading.Event) -> None:
    event.wait()


def test_an_error_comes_out_of_the_next_call_and_nothing_more_is_done() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        done.append(number)
        if number == 1:
            raise ZeroDivisionError("the second")

    def give_three() -> None:
        with Background("test", work, 1) as background:
            for number in range(3):
                background.give(number)
            background.drain()

    with pytest.raises(ZeroDivisionError, match="the second"):
        give_three()
    assert done == [0, 1]


def test_an_error_is_not_lost_when_it_comes_last() -> None:
    with pytest.raises(ZeroDivisionError), Background[int]("test", divide, 1) as background:
        background.give(1)


def divide(number: int) -> None:
    raise ZeroDivisionError(number)


def stopped_by(error: BaseException, done: list[int]) -> None:
    def work(number: int) -> None:
        time.sleep(0.05)
        done.append(number)

    with Background("test", work, 5) as background:
        for number in range(4):
            background.give(number)
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Interrupted("asked to stop"), lambda done: done == [0, 1, 2, 3]),  # what was given is done
        (ZeroDivisionError(), lambda done: len(done) <= 1),  # what is at hand is finished
    ],
)
def test_leaving_with_an_error(error: BaseException, expected: Callable[[list[int]], bool]) -> None:
    done: list[int] = []
    with pytest.raises(type(error)):
        stopped_by(error, done)
    count = len(done)
    time.sleep(0.1)
    assert expected(done) and len(done) == count


def test_ctrl_c_twice_waits_for_nothing() -> None:
    go_on = threading.Event()
    timer = threading.Timer(60, go_on.set)  # or a failure would take for ever
    timer.start()

    def interrupted() -> None:
        with Background[int]("test", lambda _: waits(go_on), 5) as background:
            background.give(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not go_on.is_set()
    timer.cancel()
    go_on.set()
