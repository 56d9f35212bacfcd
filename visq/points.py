"""Named points between the steps of a job's life, for tests that kill a process exactly there.

In production nobody listens, and a point is a look at one variable. ``tests/faults`` listens, and
kills or stops the process that comes by::

    points.listen(lambda point: os.kill(os.getpid(), signal.SIGKILL) if point == ... else None)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias, get_args

Point: TypeAlias = Literal[
    "transaction.committing",  # a transaction has done its work, COMMIT comes next
    "transaction.committed",
    "jobs.reserved",  # the maintenance loop has taken jobs that are due, and will publish them
    "jobs.published",  # they are in the broker, which is noted next
    "jobs.moved",  # jobs were rescued, expired or cancelled, what follows is published next
    "events.reserved",  # the maintenance loop has taken entries of the outbox
    "events.in_redis",  # results are in Redis, and go to the broker next
    "events.published",  # results are in the broker, and leave the outbox next
    "run.taken",  # a worker has taken a message, and claims its job next
    "run.claimed",
    "run.shown",  # its pictures are there, and the engine is asked next
    "run.answered",  # the engine has answered, and the end is written next
    "run.ended",  # the end is written, and is published next
    "run.delivered",  # it is published, and the message is acknowledged next
    "submit.accepted",  # a job or batch is committed, and is published next
    "submit.answering",  # it was published, and the client is told next
    "batch.chunk_read",  # lines of a batch's input were read, and become rows next
    "batch.chunk_added",
    "batch.output_written",  # the output of a batch is in the store, which is noted next
]

POINTS: Final[tuple[Point, ...]] = get_args(Point)

_listener: Callable[[Point], None] | None = None


def listen(listener: Callable[[Point], None] | None) -> None:
    """Call `listener` at every point from now on, in the thread that reached it."""
    global _listener
    _listener = listener


def reached(point: Point) -> None:
    """Say where this thread is."""
    if _listener is not None:
        _listener(point)
