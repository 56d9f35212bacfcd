"""Dead letters: events that no consumer could handle, and how they come back."""

from __future__ import annotations

from visq.client.servers import find_broker
from visq.consumer_events import fresh_copy_of
from visq.consumer_queues import declare, depth, send
from visq.consumer_redis import connect, give_back_overdue

SUFFIX = ".dead"


def dead_queue(queue: str) -> str:
    """Where the dead letters of `queue` are."""
    return queue + SUFFIX


def bring_back(queue: str, *, broker_url: str | None = None, limit: int | None = None) -> int:
    """Move dead letters back to `queue`, to be delivered as if for the first time; how many.

    An event may come twice if the broker or this process dies meanwhile; none is lost.

    :param queue: the name that `consume` was given, without ``.dead``.
    :param limit: move the oldest only, so many; all that are there now by default.
    :raises ConfigurationError: no broker is known.
    """
    dead = dead_queue(queue)
    moved = 0
    with connect(find_broker(broker_url), dead, redeliver_after=60.0) as connection:
        give_back_overdue(connection.default_channel)
        source = declare(connection, dead)
        waiting = depth(source)
        for _ in range(waiting if limit is None else min(limit, waiting)):
            message = source.get()
            if message is None:
                break
            send(connection.default_channel, queue, **fresh_copy_of(message))
            message.ack()
            moved += 1
    return moved
