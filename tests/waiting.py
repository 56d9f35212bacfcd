"""Waiting on conditions in tests, instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float, what: str, every: float = 0.02) -> T:
    """Poll `condition` until it is truthy and return its value.

    :param what: ends the sentence "waited N s for ..." of the failure.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}; last value: {value!r}")
        time.sleep(every)
    return value


async def until_async(
    condition: Callable[[], Awaitable[T]], seconds: float, what: str, every: float = 0.02
) -> T:
    """:func:`until` for a coroutine function."""
    deadline = time.monotonic() + seconds
    while not (value := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}; last value: {value!r}")
        await asyncio.sleep(every)
    return value
