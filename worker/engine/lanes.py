"""The requests that wait for an engine, in the order in which it takes them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from visq.types import Lane
from worker.engine.face import EngineRequest, Handle


@dataclass(eq=False, slots=True)
class Task:
    """A request inside an engine."""

    request: EngineRequest
    handle: Handle
    deadline: float | None
    """On the clock of :func:`time.monotonic`."""
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """Set by any thread; the engine looks at it between two tokens."""

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


class LaneQueue:
    """Waiting tasks: a lane before the next one, first come first served inside a lane."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[Task]] = {lane: deque() for lane in Lane}
        self.changed = threading.Condition(threading.RLock())  # finalizers run anywhere
        self._closed = False

    def __len__(self) -> int:
        with self.changed:
            return sum(map(len, self._lanes.values()))

    def put(self, task: Task) -> bool:
        """Add `task`; returns whether the queue is still open."""
        with self.changed:
            if not self._closed:
                self._lanes[task.request.lane].append(task)
                self.changed.notify()
            return not self._closed

    def take(self, may: Callable[[Task], bool] = lambda task: True) -> Task | None:
        """Wait for a task and remove it; ``None`` once the queue is closed.

        :param may: says which tasks may be taken; those that may not are passed by, and stay.
            Whoever changes its mind does so under `changed`, and notifies it.
        """
        with self.changed:
            while not self._closed:
                for lane in self._lanes.values():
                    for task in lane:
                        if may(task):
                            lane.remove(task)
                            return task
                self.changed.wait()
            return None

    def remove(self, task: Task) -> bool:
        """Remove `task` if it still waits; returns whether it did."""
        with self.changed:
            lane = self._lanes[task.request.lane]
            if task in lane:
                lane.remove(task)
                return True
            return False

    def take_expired(self) -> list[Task]:
        """Remove and return the tasks whose deadline has passed."""
        with self.changed:
            expired = [task for lane in self._lanes.values() for task in lane if task.expired]
            for task in expired:
                self._lanes[task.request.lane].remove(task)
            return expired

    def close(self) -> list[Task]:
        """Take nothing more; returns what was waiting. Repeatable."""
        with self.changed:
            self._closed = True
            left = [task for lane in self._lanes.values() for task in lane]
            for lane in self._lanes.values():
                lane.clear()
            self.changed.notify_all()
            return left
