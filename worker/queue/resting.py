"""Places (`worker.queue.broker.places`) that have refused result events, and rest for a while.

One queue that is full or never confirms must not cost the others their time: its events go past it
until the rest is over, and then one of them finds out whether it takes them again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from models.outbox import LONGEST_PAUSE, pause_after


@dataclass(frozen=True)
class _Rest:
    refusals: int
    """One after the other."""
    until: float
    """By `time.monotonic`."""


class Resting:
    """Of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rests: dict[str | None, _Rest] = {}

    def seconds_left(self, places: Iterable[str | None]) -> float:
        """Until all of `places` may be tried; 0 if they may now."""
        now = time.monotonic()
        with self._lock:
            rests = [self._rests[place] for place in places if place in self._rests]
        return max((rest.until - now for rest in rests if rest.until > now), default=0.0)

    def suspects(self, places: Iterable[str | None]) -> bool:
        """Whether one of `places` refused the last event that it was given."""
        with self._lock:
            return any(place in self._rests for place in places)

    def refused(self, place: str) -> None:
        now = time.monotonic()
        with self._lock:
            before = self._rests.get(place)
            refusals = 1 if before is None else before.refusals + 1
            # Of queues that nobody names any more, nothing stays.
            for name in [n for n, r in self._rests.items() if r.until + LONGEST_PAUSE < now]:
                del self._rests[name]
            self._rests[place] = _Rest(refusals, now + pause_after(refusals))

    def accepted(self, places: Iterable[str | None]) -> None:
        with self._lock:
            for place in places:
                if place in self._rests:
                    del self._rests[place]
