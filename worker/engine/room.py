"""Memory for prepared pictures, which bounds how many requests with pictures are prepared ahead."""

from __future__ import annotations

import threading
import weakref

from worker.engine.families.base import PreparedImage
from worker.engine.lanes import Task


class Room:
    """Memory for prepared pictures; while there is none, requests with pictures stay in the queue.

    (It can be passed by what one request holds: waiting in the middle of a request, for what only
    itself can give back, would be for ever.)
    """

    def __init__(self, nbytes: int, changed: threading.Condition) -> None:
        """:param changed: of an RLock, as finalizers run anywhere; notified when some is freed."""
        self._left = nbytes
        self._kept: dict[Task, int] = {}
        """For pictures that are being prepared."""
        self._changed = changed

    def admit(self, task: Task, nbytes: int) -> bool:
        """Whether there is room (`changed` held); if so, keep it for `task` until it `is_prepared`.

        :param nbytes: what its pictures will take, as far as one can tell.
        """
        if self._left - sum(self._kept.values()) <= 0:
            return False
        self._kept[task] = nbytes
        return True

    def is_prepared(self, task: Task) -> None:
        """What is to be held of `task` is held."""
        with self._changed:
            if self._kept.pop(task, 0):
                self._changed.notify_all()

    def hold(self, prepared: PreparedImage) -> None:
        """Count `prepared` for as long as anybody refers to it."""
        nbytes = prepared.nbytes
        self._add(-nbytes)
        weakref.finalize(prepared, self._add, nbytes).atexit = False

    def _add(self, nbytes: int) -> None:
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()
