"""Doing together what many threads ask for at the same time.

A thread that calls waits for its own answer, and gets its own error. When nothing else is going on,
a call is done at once; while one group is being done the next one gathers, and groups that follow
each other closely begin at least `GATHER_SECONDS` apart, so that they are worth it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

from visq.errors import Unavailable

A = TypeVar("A")
R = TypeVar("R")

GATHER_SECONDS: Final = 0.02
"""Shortest time between the beginnings of two groups."""

MOST: Final = 64
"""Calls in one group."""


class Grouped(Generic[A, R]):
    """A function of one argument, done for many calls at a time in a thread of its own."""

    def __init__(self, name: str, together: Callable[[list[A]], Sequence[R | Exception]]) -> None:
        """:param together: does it for all arguments; one answer, or error, for each of them. What
        it raises itself is everybody's error."""
        self._together = together
        self._calls: list[tuple[A, Future[R]]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def __call__(self, argument: A) -> R:
        """:raises Unavailable: `close` was called."""
        answer: Future[R] = Future()
        with self._changed:
            if self._closing:
                raise Unavailable("the worker has ended")
            self._calls.append((argument, answer))
            self._changed.notify()
        return answer.result()

    def close(self) -> None:
        """End the thread, after the calls that were made before."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        began = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closing)
                if not self._calls:
                    return
            if (pause := began + GATHER_SECONDS - time.monotonic()) > 0:
                time.sleep(pause)
            with self._changed:
                calls, self._calls = self._calls[:MOST], self._calls[MOST:]
            began = time.monotonic()
            self._do(calls)

    def _do(self, calls: list[tuple[A, Future[R]]]) -> None:
        answers: Sequence[R | Exception]
        try:
            answers = self._together([argument for argument, _ in calls])
            if len(answers) != len(calls):
                raise RuntimeError(f"{len(calls)} calls have {len(answers)} answers")
        except Exception as error:  # noqa: BLE001 (it is raised where it was asked for)
            answers = [error] * len(calls)
        for (_, future), answer in zip(calls, answers, strict=True):
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def each_alone(function: Callable[[A], R], arguments: Sequence[A]) -> list[R | Exception]:
    """Call `function` for one after the other; an error is the answer of its own argument only."""
    answers: list[R | Exception] = []
    for argument in arguments:
        try:
            answers.append(function(argument))
        except Exception as error:  # noqa: BLE001 (it is raised where it was asked for)
            answers.append(error)
    return answers
