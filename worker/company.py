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
    """A lock with many sharers or one holder, who take turns: who wants to be alone keeps later
    sharers out, since they never end together; but those that it kept waiting go before the next
    one that wants to be alone. There is one of these at a time: more would only hold slots."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._waiting = 0
        self._alone = False
        """Whether somebody is alone, or waits for it."""
        self._turn_of_sharers = 0
        """Sharers that were kept waiting, and go first now."""

    @contextmanager
    def shared(self, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Run beside others; yields False if `give_up` came true before that was possible."""
        with self._changed:
            self._waiting += 1
            free = self._wait(lambda: not self._alone or self._turn_of_sharers > 0, give_up)
            self._waiting -= 1
            self._turn_of_sharers = max(0, self._turn_of_sharers - 1)
            self._sharing += free
            self._changed.notify_all()
        try:
            yield free
        finally:
            with self._changed:
                self._sharing -= free
                self._changed.notify_all()

    @contextmanager
    def alone(self, give_up: Callable[[], bool]) -> Iterator[bool]:
        """Run without others; yields False if `give_up` came true before that was possible, or if
        another one is alone or waits for it."""
        with self._changed:
            free = not self._alone
            if free:
                self._alone = True
                free = self._wait(lambda: not (self._turn_of_sharers or self._sharing), give_up)
                if not free:
                    self._let_others_go()
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._let_others_go()

    def _let_others_go(self) -> None:
        self._alone = False
        self._turn_of_sharers = self._waiting
        self._changed.notify_all()

    def _wait(self, free: Callable[[], bool], give_up: Callable[[], bool]) -> bool:
        while not free():
            self._changed.wait(LOOK_SECONDS)
            self._changed.release()  # it may ask the database
            try:
                gives_up = give_up()
            finally:
                self._changed.acquire()
            if gives_up:
                return False
        return True
