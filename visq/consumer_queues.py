"""The queues of results on the broker: how they are made, and how a message gets into one for sure.

The workers (a job's own queue) and the consumers (theirs, and those for dead letters) use the same,
so that they declare a queue in the same form.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import amqp
from amqp.exceptions import NotFound
from kombu import Connection, Producer, Queue
from kombu.exceptions import OperationalError

QUORUM: Final = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
"""On RabbitMQ. The limit is there because the default of RabbitMQ 4 drops a message that was
returned 20 times, which a consumer that crashes at its start can reach within a minute."""
CONFIRM_SECONDS: Final = 10.0
"""How long to wait for RabbitMQ to confirm a message; more is an outage."""


def declare(connection: Connection, name: str) -> Queue:
    """The durable queue `name`, which is made if it is missing and otherwise used as it is."""
    queue: Queue = Queue(name, durable=True)(connection.default_channel)
    if connection.transport.driver_type != "amqp":
        queue.declare()
        return queue
    # Asked first on a channel of its own, which a refusal closes: somebody may have made the queue
    # in another form, and that is their choice.
    with suppress(NotFound), connection.channel() as channel:
        Queue(name)(channel).queue_declare(passive=True)
        return queue
    Queue(name, durable=True, queue_arguments=QUORUM)(connection.default_channel).declare()
    return queue


def depth(queue: Queue) -> int:
    """Messages that wait in `queue`, which is there, not counting those that consumers hold."""
    # kombu's Redis says of an empty queue that there is none.
    passive = _speaks_amqp(queue.channel)
    declared: Any = queue.queue_declare(passive=passive)
    return int(declared.message_count)


def send(
    channel: Any, name: str, *, confirm_seconds: float = CONFIRM_SECONDS, **message: Any
) -> None:
    """Publish to the queue `name`, made if it is missing. The message is there when this returns.

    :param channel: of a connection with the transport option ``confirm_publish``.
    :param message: arguments of kombu's ``Producer.publish``.
    :raises Exception: one of the connection's errors, or `amqp.exceptions.MessageNacked` if the
        queue refuses the message; the message may be there or not.
    """
    publish = Producer(channel, auto_declare=False).publish
    if not _speaks_amqp(channel):  # Redis, where a queue is there when it has a message
        publish(**message, exchange="", routing_key=name)
        return
    returned: list[object] = []

    def note(*what: object) -> None:
        returned.append(what)

    # RabbitMQ returns what has no queue before it confirms it. Without a handler, the return would
    # end the wait for the confirmation, and the next message would take it for its own.
    channel.events["basic_return"].add(note)
    try:
        for _ in range(2):
            returned.clear()
            publish(
                **message,
                exchange="",
                routing_key=name,
                mandatory=True,
                confirm_timeout=confirm_seconds,
            )
            if not returned:
                return
            declare(channel.connection.client, name)
    finally:
        channel.events["basic_return"].discard(note)
    raise OperationalError(f"the queue {name!r} is deleted as soon as it is made")


def _speaks_amqp(channel: object) -> bool:
    return isinstance(channel, amqp.Channel)
