"""Who runs beside whom: jobs share the worker, but one that must be alone has it for itself.

A job with which engines or workers died (`models.moves.SHARED_CRASHES`) is run alone: if the next
death is its doing, nobody else is lost with it, and nobody else is blamed. It is alone in the whole
worker, not only in the engine, since it may take the worker with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

LOOK_SECONDS: Final = 0.2
"""Time between two looks at whether to go on waiting."""


class Company:
    """A lock with many sharers or one holder. Who wants to be alone goes first: else the sharers,
    who never end together, would let nobody in."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._alone = False
        self._wanting_alone = 0

    @contextmanager
    def shared(self, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Run beside others; yields False if `give_up` came true before that was possible."""
        with self._changed:
            free = self._wait(lambda: not (self._alone or self._wanting_alone), give_up)
            self._sharing += free
        try:
            yield free
        finally:
            with self._changed:
                self._sharing -= free
                self._changed.notify_all()

    @contextmanager
    def alone(self, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Run without others; yields False if `give_up` came true before that was possible."""
        with self._changed:
            self._wanting_alone += 1
            free = self._wait(lambda: not (self._alone or self._sharing), give_up)
            self._wanting_alone -= 1
            self._alone = self._alone or free
            self._changed.notify_all()
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()

    def _wait(self, free: Callable[[], bool], give_up: Callable[[], bool]) -> bool:
        while not free():
            if give_up():
                return False
            self._changed.wait(LOOK_SECONDS)
        return True
