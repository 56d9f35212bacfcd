"""A clock that is off, for a process of the fault tests: ``FAULT_CLOCK`` says by how many seconds.

To be imported before anything else: whoever has imported `datetime.datetime` or `time.time` by name
before keeps the right one. What Python's code sees is shifted, the monotonic clock is not.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any, Final

SETTING: Final = "FAULT_CLOCK"

_RIGHT: Final = datetime.datetime


class _Anything(type):
    """Makes each true `datetime` an instance of the class that stands in for it."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RIGHT)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _RIGHT)


class _ShiftedDatetime(_RIGHT, metaclass=_Anything):
    """`datetime` by `time.time`; all that it makes are true datetimes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _RIGHT(*args, **kwargs)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return _RIGHT.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return _RIGHT.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    @classmethod
    def today(cls) -> Any:
        return _RIGHT.fromtimestamp(time.time())


def shift(seconds: float) -> None:
    """Set this process's clock, as Python's code sees it, so far off."""
    read, read_ns = time.time, time.time_ns
    time.time = lambda: read() + seconds
    time.time_ns = lambda: read_ns() + round(seconds * 1e9)
    datetime.datetime = _ShiftedDatetime  # type: ignore[misc]


if SETTING in os.environ:
    shift(float(os.environ[SETTING]))
