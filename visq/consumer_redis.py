"""Redis as the broker of results: what kombu needs so that no consumer loses another's messages.

kombu keeps the messages that a consumer holds in a hash, ``unacked``, and puts those of dead
consumers back from there. For a topic exchange two things in this are wrong (kombu 5.7):

- The copies of a message in several queues have the same tag, so in a shared hash one consumer's
  acknowledgement deletes what another still needs. Here each queue has a hash of its own.
- A message is put back by its routing key, into *all* queues that the key leads to. Here it goes
  back to the queue that it came from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from kombu import Connection, Message
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

RENEWALS: Final = 4
"""Renewals of a held message in the time after which it would be given to another."""


class _Channel(kombu_redis.Channel):
    # The consumer gives back what it holds itself. On a broken connection kombu's own attempt ends
    # in an AttributeError.
    do_restore = False


class QueueTransport(kombu_redis.Transport):
    """kombu's transport, with messages that are put back where they came from."""

    Channel = _Channel

    def _deliver(self, message: dict[str, Any], queue: str | None) -> None:
        message["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        super()._deliver(message, queue)


def connect(url: str, queue: str, redeliver_after: float) -> Connection:
    """A connection (not yet made) for a consumer of `queue`, to Redis or another broker."""
    connection = Connection(url)
    if connection.transport_cls not in ("redis", "rediss"):
        connection.transport_options = {"confirm_publish": True}
        return connection
    connection.transport_cls = QueueTransport  # type: ignore[assignment]  # kombu takes a class too
    connection.transport_options = {
        "visibility_timeout": redeliver_after,
        "unacked_restore_throttle": 1,
        "unacked_key": f"visq:unacked:{queue}",
        "unacked_index_key": f"visq:unacked_index:{queue}",
        "unacked_mutex_key": f"visq:unacked_mutex:{queue}",
        "socket_timeout": 15,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
    return connection


def bind_again(channel: Any, queue: str, exchange: str, patterns: Sequence[str]) -> None:
    """Write the bindings of `queue` once more: a Redis that was flushed has lost them.

    Without it the queue would get nothing until its consumer connects again.
    """
    if isinstance(channel, kombu_redis.Channel):
        bind: Callable[..., None] = getattr(channel, "_queue_bind")  # noqa: B009  # not typed
        for pattern in patterns:
            bind(exchange, *channel.typeof(exchange).prepare_bind(queue, exchange, pattern, {}))


def stop_taking(channel: Any, other: Any, held: Sequence[Message]) -> None:
    """End what a cancelled consumer leaves behind: a BRPOP that would take one message more.

    :param other: the channel on which the messages `held` can be acknowledged then.
    """
    if isinstance(channel, kombu_redis.Channel):
        channel.close()  # reads the answer, and puts back what came with it
        for message in held:
            message.channel = other


def give_back_overdue(channel: Any) -> None:
    """Put the messages of dead processes back; a channel that consumes does so by itself."""
    if isinstance(channel, kombu_redis.Channel):
        channel.qos.restore_visible(num=None, interval=1)


class Held:
    """The messages that this process holds, renewed on Redis by a thread while it lives.

    A broker that notices by itself that a consumer has died needs none of it.
    """

    def __init__(self, channel: Any, redeliver_after: float) -> None:
        self._channel = channel if isinstance(channel, kombu_redis.Channel) else None
        self._interval = redeliver_after / RENEWALS
        self._tags: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="visq-held", daemon=True)

    def add(self, message: Message) -> None:
        with self._lock:
            self._tags.add(str(message.delivery_tag))

    def remove(self, message: Message) -> None:
        with self._lock:
            self._tags.discard(str(message.delivery_tag))

    def __enter__(self) -> Held:
        if self._channel is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._channel is not None:
            self._thread.join()

    def _renew(self) -> None:
        assert self._channel is not None
        while not self._closed.wait(self._interval):
            with self._lock:
                scores = dict.fromkeys(self._tags, time.time())
            if not scores:
                continue
            try:
                # Not `channel.client`: its one connection waits in BRPOP. XX: a message that is
                # settled meanwhile stays so.
                with self._channel.conn_or_acquire() as client:
                    client.zadd(self._channel.unacked_index_key, scores, xx=True)
            except (RedisError, OSError) as error:
                log.debug("held messages are not renewed: %s", error)
