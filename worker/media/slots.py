"""Who may read from the store now: so many at a time, and a bucket that hangs keeps out no other.

One bucket has at most three quarters of the slots. Of the buckets that wait, the one with the
fewest readers comes next, and inside a bucket whoever came first.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from visq.errors import ImageFetchFailed
from visq.objects import ObjectRef

_SPARED: Final = 4
"""Of so many slots, one is not for the bucket that has all others."""


class Slots:
    """`total` slots; thread-safe."""

    def __init__(self, total: int, patience: float) -> None:
        """:param patience: seconds for which one waits at a bucket of which nobody gets an answer;
        where others do, one waits for as long as it takes."""
        self._total = total
        self._of_one = total - total // _SPARED
        self._patience = patience
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[threading.Event]] = {}
        self._answered: dict[str, float] = {}
        """By bucket that is in use: when its last answer came."""

    @contextmanager
    def taken(self, ref: ObjectRef) -> Iterator[None]:
        """Hold a slot for reading `ref`; waits for it.

        :raises ImageFetchFailed: the bucket does not answer, so that no slot becomes free for it.
        """
        bucket = ref.bucket
        self._take(ref)
        answered = True
        try:
            yield
        except ImageFetchFailed:
            answered = False
            raise
        finally:
            self._give_back(bucket, answered=answered)

    def _take(self, ref: ObjectRef) -> None:
        bucket = ref.bucket
        with self._lock:
            if self._is_free(bucket):
                self._held[bucket] += 1
                return
            turn = threading.Event()
            self._waiting.setdefault(bucket, deque()).append(turn)
        began = time.monotonic()
        while True:
            since = max(began, self._answered.get(bucket, began))
            left = since + self._patience - time.monotonic()
            if turn.wait(max(left, 0.0)):
                return
            if left > 0:
                continue  # another answer may have come meanwhile
            with self._lock:
                if turn.is_set():
                    return
                self._leave(bucket, turn)
            raise ImageFetchFailed(
                f"image {ref} could not be fetched (its bucket has answered nobody for "
                f"{self._patience:g} s)"
            )

    def _give_back(self, bucket: str, *, answered: bool) -> None:
        with self._lock:
            self._held[bucket] -= 1
            if answered:
                self._answered[bucket] = time.monotonic()
            while (following := self._next()) is not None:
                turn = self._waiting[following][0]
                self._leave(following, turn)
                self._held[following] += 1
                turn.set()
            if not self._held[bucket]:
                del self._held[bucket]
                self._answered.pop(bucket, None)

    def _next(self) -> str | None:
        free = [bucket for bucket in self._waiting if self._is_free(bucket)]
        return min(free, key=lambda bucket: self._held[bucket], default=None)

    def _is_free(self, bucket: str) -> bool:
        return self._held.total() < self._total and self._held[bucket] < self._of_one

    def _leave(self, bucket: str, turn: threading.Event) -> None:
        self._waiting[bucket].remove(turn)
        if not self._waiting[bucket]:
            del self._waiting[bucket]
