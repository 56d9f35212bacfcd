"""Batches give way to chat: while chat jobs wait longer for their start than they would without
batches, fewer items are let in.

Places that are free (`worker.queue.window`) are not enough where processors are what is short. So
the window follows what is seen, as LEDBAT (RFC 6817) does for transfers in the background: the
lowest wait of the last half hour is what chat takes by itself; while the present one is much
longer, the window shrinks by a part, and otherwise it grows by a step. Without chat it is as large
as it may be. All dispatchers share one pace, in Redis; who loses it begins anew.
"""

from __future__ import annotations

import statistics
import time
from typing import Final

import redis
from pydantic import BaseModel, Field, ValidationError

PACE_KEY: Final = "visq:pace"
TURN_KEY: Final = "visq:pace:turn"

LOOK_SECONDS: Final = 1.0
"""Between two changes, whoever makes them."""
WAITS_OF_SECONDS: Final = 4.0
"""Chat jobs that came in this time are looked at."""

ENOUGH: Final = 3
"""Fewer waits say nothing."""
TOO_LONG: Final = 1.3
"""Times the lowest wait. The waits are medians: of a hundred, five are about twice as long, alone
as well as beside batches."""
SLIGHT: Final = 0.003
"""Seconds more than the lowest wait that nobody notices."""
SHRINK: Final = 0.5
GROW: Final = 1 / 32
LEAST: Final = 1 / 32
"""Of the whole window: batches go on, whatever chat does."""
REMEMBERED: Final = 30
"""Minutes of which the lowest wait is known."""


class Pace(BaseModel):
    """What is known of the waits, and what follows from it."""

    share: float = 1.0
    """Of the window."""
    lowest: dict[int, float] = Field(default_factory=dict)
    """By minute: the lowest median wait, in seconds."""

    def after(self, waits: list[float], minute: int) -> Pace:
        """The next pace, after these waits of chat jobs (seconds) were seen."""
        lowest = {at: wait for at, wait in self.lowest.items() if at > minute - REMEMBERED}
        if len(waits) < ENOUGH:
            return Pace(share=min(1.0, self.share + GROW), lowest=lowest)
        wait = statistics.median(waits)
        lowest[minute] = min(wait, lowest.get(minute, wait))
        base = min(lowest.values())
        if wait > base * TOO_LONG and wait > base + SLIGHT:
            return Pace(share=max(LEAST, self.share * SHRINK), lowest=lowest)
        return Pace(share=min(1.0, self.share + GROW), lowest=lowest)


def is_ones_turn(client: redis.Redis) -> bool:
    """Whether this process is to look and to change the pace."""
    return bool(client.set(TURN_KEY, "1", nx=True, px=int(LOOK_SECONDS * 1000)))


def read(client: redis.Redis) -> Pace:
    stored = client.get(PACE_KEY)
    try:
        return Pace() if stored is None else Pace.model_validate_json(stored)
    except ValidationError:  # of another version
        return Pace()


def write(client: redis.Redis, pace: Pace) -> None:
    client.set(PACE_KEY, pace.model_dump_json(), ex=REMEMBERED * 60)


def this_minute() -> int:
    return int(time.time() // 60)
