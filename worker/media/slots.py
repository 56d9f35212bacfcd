"""Who may read now: so many at a time, and a place that hangs keeps out no other.

A place is a bucket of the store or a host of the web. One has at most three quarters of the slots.
Of the places that wait, the one with the fewest readers comes next, and inside a place whoever came
first.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from visq.errors import ImageFetchFailed
from visq.objects.images import ImageRef
from visq.objects.web_ref import WebRef

_SPARED: Final = 4
"""Of so many slots, one is not for the place that has all others."""


class Slots:
    """`total` slots; thread-safe."""

    def __init__(self, total: int, patience: float) -> None:
        """:param patience: seconds for which one waits at a place of which nobody gets an answer;
        where others do, one waits for as long as it takes."""
        self._total = total
        self._of_one = total - total // _SPARED
        self._patience = patience
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[threading.Event]] = {}
        self._answered: dict[str, float] = {}
        """By place that is in use: when its last answer came."""

    @contextmanager
    def taken(self, ref: ImageRef) -> Iterator[None]:
        """Hold a slot for reading `ref`; waits for it.

        :raises ImageFetchFailed: the place does not answer, so that no slot becomes free for it.
        """
        place = _place_of(ref)
        self._take(ref)
        answered = True
        try:
            yield
        except ImageFetchFailed:
            answered = False
            raise
        finally:
            self._give_back(place, answered=answered)

    def _take(self, ref: ImageRef) -> None:
        place = _place_of(ref)
        with self._lock:
            if self._is_free(place):
                self._held[place] += 1
                return
            turn = threading.Event()
            self._waiting.setdefault(place, deque()).append(turn)
        began = time.monotonic()
        while True:
            since = max(began, self._answered.get(place, began))
            left = since + self._patience - time.monotonic()
            if turn.wait(max(left, 0.0)):
                return
            if left > 0:
                continue  # another answer may have come meanwhile
            with self._lock:
                if turn.is_set():
                    return
                self._leave(place, turn)
            raise ImageFetchFailed(
                f"image {ref} could not be fetched ({place} has answered nobody for "
                f"{self._patience:g} s)"
            )

    def _give_back(self, place: str, *, answered: bool) -> None:
        with self._lock:
            self._held[place] -= 1
            if answered:
                self._answered[place] = time.monotonic()
            while (following := self._next()) is not None:
                turn = self._waiting[following][0]
                self._leave(following, turn)
                self._held[following] += 1
                turn.set()
            if not self._held[place]:
                del self._held[place]
                self._answered.pop(place, None)

    def _next(self) -> str | None:
        free = [place for place in self._waiting if self._is_free(place)]
        return min(free, key=lambda place: self._held[place], default=None)

    def _is_free(self, place: str) -> bool:
        return self._held.total() < self._total and self._held[place] < self._of_one

    def _leave(self, place: str, turn: threading.Event) -> None:
        self._waiting[place].remove(turn)
        if not self._waiting[place]:
            del self._waiting[place]


def _place_of(ref: ImageRef) -> str:
    return ref.netloc if isinstance(ref, WebRef) else ref.bucket
