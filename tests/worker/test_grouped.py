"""Calls that come together are done together, and each gets its own answer."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from visq.errors import Unavailable
from worker.grouped import MOST, Grouped, each_alone


class Doubling:
    """Notes its groups; the first one waits until it may go on."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, numbers: list[int]) -> list[int | Exception]:
        self.groups.append(numbers)
        self.begun.set()
        self.go_on.wait(30)
        return each_alone(self._double, numbers)

    def _double(self, number: int) -> int:
        if number < 0:
            raise ValueError(f"{number} is negative")
        return 2 * number


def called(
    pool: ThreadPoolExecutor, grouped: Grouped[int, int], numbers: list[int]
) -> list[Future[int]]:
    return [pool.submit(grouped, number) for number in numbers]


def test_a_call_when_nothing_goes_on_is_a_group_of_its_own() -> None:
    doubling = Doubling()
    doubling.go_on.set()
    grouped = Grouped("test", doubling)
    assert grouped(3) == 6
    assert grouped(4) == 8
    assert doubling.groups == [[3], [4]]
    grouped.close()


def test_what_comes_while_a_group_is_done_is_the_next_group_and_errors_stay_apart() -> None:
    doubling = Doubling()
    grouped = Grouped("test", doubling)
    with ThreadPoolExecutor(MOST + 10) as pool:
        [first] = called(pool, grouped, [1])
        doubling.begun.wait(30)
        numbers = [*range(10), -5]
        others = called(pool, grouped, numbers)
        while len(grouped._calls) < len(numbers):
            pass
        doubling.go_on.set()
        assert first.result(30) == 2
        answers = dict(zip(numbers, others, strict=True))
        with pytest.raises(ValueError, match="-5 is negative"):
            answers.pop(-5).result(30)
        assert [future.result(30) for future in answers.values()] == [2 * n for n in answers]
    assert [len(group) for group in doubling.groups] == [1, len(numbers)]
    grouped.close()


def test_a_group_that_breaks_is_the_error_of_all_in_it_and_of_no_later_one() -> None:
    broken = [True]

    def together(numbers: list[int]) -> list[int | Exception]:
        if broken.pop():
            raise Unavailable("away")
        return list(numbers)

    grouped = Grouped("test", together)
    with pytest.raises(Unavailable):
        grouped(1)
    broken.append(False)
    assert grouped(2) == 2
    grouped.close()


def test_close_does_what_was_asked_for_before_and_nothing_later() -> None:
    doubling = Doubling()
    grouped = Grouped("test", doubling)
    with ThreadPoolExecutor(3) as pool:
        asked = called(pool, grouped, [1, 2])
        doubling.begun.wait(30)
        closing = pool.submit(grouped.close)
        doubling.go_on.set()
        assert [future.result(30) for future in asked] == [2, 4]
        closing.result(30)
    with pytest.raises(Unavailable):
        grouped(3)
