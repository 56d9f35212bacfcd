"""One Redis client for each channel of kombu, instead of a new one for each command.

kombu 5.7 builds a `redis.Redis` for every message that it sends, notes as unacknowledged or
acknowledges: 0.2 ms each, half of what these commands cost (bench/results/worker-cpu-profile.md).
A client is only a view of the channel's connection pool, and thread-safe; so one will do for as
long as the pool is the same. Delete this module, its call in `worker.queue.app` and its test
(tests/worker/queue/test_broker_clients.py) when upstream does so itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from kombu.transport.redis import Channel

_CREATE: Final = "_create_client"
_CLIENT: Final = "_visq_client"


def install() -> None:
    """Patch kombu in this process. Safe to call twice."""
    create = getattr(Channel, _CREATE)
    if not hasattr(create, "__wrapped__"):
        setattr(Channel, _CREATE, _keeping_the_client(create))


def _keeping_the_client(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def client(self: Any, asynchronous: bool = False) -> Any:
        if asynchronous:  # the hub gives these a connection of their own
            return create(self, asynchronous=True)
        kept = self.__dict__.get(_CLIENT)
        # After an outage the channel has another pool.
        if kept is None or kept.connection_pool is not self.pool:
            kept = self.__dict__[_CLIENT] = create(self)
        return kept

    return client
