"""What the engine process says, taken together: token events merge while they wait.

A step of a large batch makes an event of each sequence, and a GPU makes a hundred steps a second.
Each event by itself through the pipe would cost both ends more than the rest of their work. So what
comes within `TICK_SECONDS` goes as one message, and of that each choice's text as one event.
Nothing waits if nothing was sent just before; and only tokens do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Final

from worker.engine.face import Event, Outcome, TokenEvent
from worker.engine.wire import FromEngine, Happened, Said

TICK_SECONDS: Final = 0.02
"""Shortest time between two messages of tokens."""


class Postbox:
    """Thread-safe: many `put`, one takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: list[tuple[int, TokenEvent]] = []
        self._ended: list[tuple[int, Outcome]] = []
        self._others: list[FromEngine] = []
        self._filled = threading.Event()
        self._urgent = threading.Event()
        self._earliest = 0.0

    def put(self, message: FromEngine) -> None:
        """Send at once."""
        with self._lock:
            self._others.append(message)
            self._wake(urgent=True)

    def happened(self, number: int, event: Event) -> None:
        """Tell of an event of request `number`."""
        with self._lock:
            if isinstance(event, TokenEvent):
                self._said.append((number, event))
                self._wake(urgent=False)
            else:
                self._ended.append((number, event))
                self._wake(urgent=True)

    def take(self) -> list[FromEngine]:
        """All there is to send, in order; waits until there is something."""
        self._filled.wait()
        if (pause := self._earliest - time.monotonic()) > 0:
            self._urgent.wait(pause)
        with self._lock:
            said, self._said = self._said, []
            ended, self._ended = self._ended, []
            others, self._others = self._others, []
            self._filled.clear()
            self._urgent.clear()
        if not said and not ended:
            return others
        self._earliest = time.monotonic() + TICK_SECONDS
        return [*others, Happened(merged(said), ended)]

    def _wake(self, *, urgent: bool) -> None:
        if not self._filled.is_set():
            self._filled.set()
        if urgent:
            self._urgent.set()


def merged(events: Iterable[tuple[int, TokenEvent]]) -> list[Said]:
    """One entry for each choice of each request; every choice's text stays in order."""
    found: dict[tuple[int, int], list[TokenEvent]] = {}
    for number, event in events:
        found.setdefault((number, event.index), []).append(event)
    return [(number, *_joined(several)) for (number, _), several in found.items()]


def _joined(events: list[TokenEvent]) -> tuple[str, list[int], int, list[dict[int, float]] | None]:
    first = events[0]
    if len(events) == 1:
        return first.text, first.token_ids, first.index, first.logprobs
    asked = any(event.logprobs is not None for event in events)
    return (
        "".join([event.text for event in events]),
        [token for event in events for token in event.token_ids],
        first.index,
        [each for event in events for each in event.logprobs or ()] if asked else None,
    )
