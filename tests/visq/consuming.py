"""`visq.consume` in a thread, and what waits in a queue, for tests of consumers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection, Message, Queue

from visq import consume
from visq.consumer import Event
from visq.consumer_queues import depth as depth_of

SOON = 30.0
"""Seconds; a deadline, not an expectation."""


@contextmanager
def consuming(
    broker_url: str, queue: str, handler: Callable[[Event], object], **options: Any
) -> Iterator[threading.Semaphore]:
    """Run `consume` in a thread; entered when its queue is there.

    Gives a semaphore that is released when it is connected again.
    """
    stop = threading.Event()
    connected = threading.Semaphore(0)
    options = {"topics": "acme.#", "max_pause": 0.1, "redeliver_after": 2.0} | options
    thread = threading.Thread(
        target=consume,
        args=(queue, handler),
        kwargs={
            "broker_url": broker_url,
            "stop": stop,
            "on_ready": connected.release,
            **options,
        },
    )
    thread.start()
    assert connected.acquire(timeout=SOON)
    try:
        yield connected
    finally:
        stop.set()
        thread.join(SOON)
        assert not thread.is_alive(), "consume() did not stop"


def depth(broker_url: str, queue: str) -> int:
    """Messages that wait in `queue`, not counting those that consumers hold; 0 if it is missing."""
    with Connection(broker_url) as connection:
        try:
            return depth_of(Queue(queue, durable=True)(connection.default_channel))
        except NotFound:
            return 0


def take_all(broker_url: str, queue: str) -> list[Message]:
    """What waits in `queue`, which is there; it is empty then."""
    with Connection(broker_url) as connection:
        source = Queue(queue, durable=True)(connection.default_channel)
        messages = []
        while (message := source.get(no_ack=True)) is not None:
            messages.append(message)
        return messages
