"""Jobs beside each other, and those that must be alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.waiting import until
from worker.company import Company


def never() -> bool:
    return False


class Runner:
    """A thread that runs in a company until it is let go."""

    def __init__(self, threads: ThreadPoolExecutor, company: Company, how: str) -> None:
        self.inside = threading.Event()
        self.leave = threading.Event()
        self._how = getattr(company, how)
        self.done: Future[None] = threads.submit(self._run)

    def _run(self) -> None:
        with self._how(never) as free:
            assert free
            self.inside.set()
            assert self.leave.wait(30)

    def end(self) -> None:
        self.leave.set()
        self.done.result(30)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_many_share_and_one_that_must_be_alone_waits_for_all_of_them(
    threads: ThreadPoolExecutor,
) -> None:
    company = Company()
    sharers = [Runner(threads, company, "shared") for _ in range(3)]
    assert all(runner.inside.wait(30) for runner in sharers)
    alone = Runner(threads, company, "alone")
    for runner in sharers:
        assert not alone.inside.is_set()
        runner.end()
    assert alone.inside.wait(30)
    alone.end()


def test_who_comes_later_waits_for_the_one_that_wants_to_be_alone(
    threads: ThreadPoolExecutor,
) -> None:
    company = Company()
    first = Runner(threads, company, "shared")
    assert first.inside.wait(30)
    alone = Runner(threads, company, "alone")
    until(lambda: company._alone, 30, "the one that wants to be alone")
    later = Runner(threads, company, "shared")
    first.end()
    assert alone.inside.wait(30)
    assert not later.inside.is_set()
    alone.end()
    assert later.inside.wait(30)
    later.end()


def test_those_that_were_kept_waiting_go_before_the_next_one_that_wants_to_be_alone(
    threads: ThreadPoolExecutor,
) -> None:
    company = Company()
    first = Runner(threads, company, "alone")
    assert first.inside.wait(30)
    sharers = [Runner(threads, company, "shared") for _ in range(3)]
    until(lambda: company._waiting == 3, 30, "those that are kept waiting")
    first.end()
    second = Runner(threads, company, "alone")
    assert all(runner.inside.wait(30) for runner in sharers)
    assert not second.inside.is_set()
    for runner in sharers:
        runner.end()
    assert second.inside.wait(30)
    second.end()


def test_only_one_waits_to_be_alone(threads: ThreadPoolExecutor) -> None:
    company = Company()
    sharer = Runner(threads, company, "shared")
    assert sharer.inside.wait(30)
    alone = Runner(threads, company, "alone")
    until(lambda: company._alone, 30, "the one that waits")
    with company.alone(never) as free:
        assert not free, "it would only hold a slot"
    sharer.end()
    assert alone.inside.wait(30)
    with company.alone(never) as free:
        assert not free
    alone.end()


def test_waiting_is_given_up_at_a_shutdown_and_blocks_nobody_after_it(
    threads: ThreadPoolExecutor,
) -> None:
    company = Company()
    first = Runner(threads, company, "shared")
    assert first.inside.wait(30)
    with company.alone(lambda: True) as free:
        assert not free
    second = Runner(threads, company, "shared")
    assert second.inside.wait(30)
    first.end()
    second.end()
    alone = Runner(threads, company, "alone")
    assert alone.inside.wait(30)
    with company.shared(lambda: True) as free:
        assert not free
    alone.end()
