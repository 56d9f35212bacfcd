"""The order in which an engine takes what waits for it."""

from __future__ import annotations

import threading

from tests.worker.engine.asking import ask
from visq.types import Lane
from worker.engine.face import Handle
from worker.engine.lanes import LaneQueue, Task


def task(lane: Lane = Lane.STANDARD, deadline: float | None = None) -> Task:
    return Task(ask(lane=lane), Handle(cancel=lambda: None), deadline)


def test_a_lane_comes_before_the_next_and_inside_it_the_first_comes_first() -> None:
    queue = LaneQueue()
    tasks = [task(Lane.BATCH), task(), task(Lane.INTERACTIVE), task(), task(Lane.INTERACTIVE)]
    for waiting in tasks:
        queue.put(waiting)
    assert [queue.take() for _ in tasks] == [tasks[i] for i in (2, 4, 1, 3, 0)]


def test_only_a_task_that_still_waits_is_removed() -> None:
    queue = LaneQueue()
    first, second = task(), task()
    queue.put(first)
    queue.put(second)
    assert queue.take() is first
    assert not queue.remove(first)
    assert queue.remove(second)


def test_only_tasks_past_their_deadline_are_taken_as_expired() -> None:
    queue = LaneQueue()
    late, early = task(deadline=0.0), task(deadline=float("inf"))
    queue.put(early)
    queue.put(late)
    assert queue.take_expired() == [late]
    assert queue.take() is early


def test_closing_gives_back_what_waits_and_wakes_who_takes() -> None:
    queue = LaneQueue()
    taken: list[Task | None] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()))
    taker.start()
    assert queue.close() == []
    taker.join(10)
    assert taken == [None]
    assert not queue.put(task())
