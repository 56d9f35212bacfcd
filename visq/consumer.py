"""`consume`: take results from a queue of the broker, one by one, and lose none.

The message is acknowledged after the handler has returned, and delivered again if it raised or its
process died; so a handler may see a result twice. Repeats that this process has handled are dropped
by the event's id; a handler whose effect must happen once keeps the ids in its own transaction
(docs/consumers.md).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from amqp.exceptions import PreconditionFailed
from kombu import Connection, Consumer, Exchange, Message, Queue
from kombu.exceptions import OperationalError
from pydantic import BaseModel, Field, ValidationError

from visq.client.servers import find_broker
from visq.cloudevents import RESULTS_EXCHANGE
from visq.consumer_redis import Held, connect
from visq.errors import ConfigurationError
from visq.types import JobView

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 0.5
"""How long one look at the broker waits; `stop` is heeded this fast."""
FIRST_PAUSE: Final = 1.0
"""Seconds before the first repeat, of a failed message or a failed connection; doubles."""


class Event(BaseModel):
    """That a job has ended: the CloudEvents 1.0 envelope, and the job in it."""

    id: str
    """The same when the event is delivered or published again."""
    type: str
    """``visq.job.succeeded``, ``.failed``, ``.cancelled`` or ``.expired``."""
    time: datetime
    tenant: str = Field(validation_alias="visqtenant")
    job: JobView = Field(validation_alias="data")


def consume(
    queue: str,
    handler: Callable[[Event], object],
    *,
    broker_url: str | None = None,
    topics: str | Sequence[str] = (),
    prefetch: int = 16,
    stop: threading.Event | None = None,
    on_ready: Callable[[], object] = lambda: None,
    redeliver_after: float = 60.0,
    max_pause: float = 30.0,
    remember: int = 10_000,
) -> None:
    """Call `handler` with each result that comes into `queue`, until `stop` is set.

    Broker outages are waited out, however long. Several processes may consume one queue: each
    result goes to one of them.

    :param queue: the queue's full name on the broker. A job's own ``result_queue`` is
        ``visq.results.<tenant>.<result_queue>``.
    :param handler: its return acknowledges the event; an exception brings it back later, here or
        to another consumer, after a pause that doubles each time.
    :param broker_url: by default ``VISQ_BROKER_URL``, else that of the `visq up` that runs on
        ``VISQ_DATA``.
    :param topics: routing patterns of the results that `queue` collects from now on, such as
        ``acme.chat.*`` or ``acme.*.failed`` (``<tenant>.<kind>.<status>``; ``*`` is one word,
        ``#`` any number). The queue is durable: it collects while nobody consumes, too.
    :param prefetch: messages that may wait here, those that failed and are held back included.
    :param stop: set it, also from a signal handler, and `consume` returns within a second or so,
        after the handler.
    :param on_ready: is called when the queue is there and results are awaited, after each
        connection.
    :param redeliver_after: on Redis, seconds after which the message of a dead consumer goes to
        another (RabbitMQ notices a death at once). A handler may take longer.
    :param max_pause: longest pause, in seconds, before a failed message is given back.
    :param remember: ids of handled events to keep in memory.
    :raises ConfigurationError: no broker is known, or `queue` exists in another form.
    """
    patterns = [topics] if isinstance(topics, str) else list(topics)
    _Consumer(
        queue,
        handler,
        find_broker(broker_url),
        patterns,
        prefetch=prefetch,
        stop=stop or threading.Event(),
        on_ready=on_ready,
        redeliver_after=redeliver_after,
        max_pause=max_pause,
        remember=remember,
    ).run()


class _Consumer:
    """One consumer: connects, takes messages, gives failed ones back, connects again."""

    def __init__(
        self,
        queue: str,
        handler: Callable[[Event], object],
        broker_url: str,
        patterns: list[str],
        *,
        prefetch: int,
        stop: threading.Event,
        on_ready: Callable[[], object],
        redeliver_after: float,
        max_pause: float,
        remember: int,
    ) -> None:
        self._name = queue
        self._handler = handler
        self._url = broker_url
        self._patterns = patterns
        self._prefetch = prefetch
        self._stop = stop
        self._on_ready = on_ready
        self._redeliver_after = redeliver_after
        self._max_pause = max_pause
        self._handled = _Recent(remember)
        self._failures = _Recent(remember)
        self._waiting: list[tuple[float, int, Message]] = []
        """Failed messages: when to give them back, a number, and the message."""
        self._numbers = itertools.count()

    def run(self) -> None:
        outages = 0
        while not self._stop.is_set():
            connection = connect(self._url, self._name, self._redeliver_after)
            started = time.monotonic()
            try:
                self._consume(connection)
            except PreconditionFailed as error:
                raise ConfigurationError(
                    f"the queue {self._name!r} exists on the broker in another form: {error}"
                ) from error
            except _outages(connection) as error:
                self._waiting.clear()  # the broker delivers them again
                outages = 1 if time.monotonic() - started > self._max_pause else outages + 1
                pause = self._pause(outages)
                log.warning("the broker is away (%s); trying again in %.1f s", error, pause)
                self._stop.wait(pause)
            finally:
                with suppress(*_outages(connection)):
                    connection.release()

    def _consume(self, connection: Connection) -> None:
        connection.ensure_connection(max_retries=1, timeout=5)
        channel: Any = connection.default_channel
        queue = self._declare(channel)
        with (
            Held(channel, self._redeliver_after) as held,
            Consumer(
                channel,
                [queue],
                on_message=lambda message: self._take(message, held),
                prefetch_count=self._prefetch,
            ),
        ):
            log.info("consuming %s", self._name)
            self._on_ready()
            while not self._stop.is_set():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=self._give_back(held, time.monotonic()))
            self._give_back(held, math.inf)

    def _declare(self, channel: Any) -> Queue:
        queue = Queue(self._name, durable=True)(channel)
        queue.declare()
        if self._patterns:
            exchange = Exchange(RESULTS_EXCHANGE, type="topic", durable=True)(channel)
            exchange.declare()
            for pattern in self._patterns:
                queue.bind_to(exchange, routing_key=pattern)
        return queue

    def _take(self, message: Message, held: Held) -> None:
        """Handle one message."""
        held.add(message)
        try:
            event = Event.model_validate_json(message.body or "")
        except ValidationError as error:
            log.error("dropping a message of %s that is no result: %s", self._name, error)
            message.reject()
        else:
            try:
                done = self._handle(event)
            except BaseException:  # Ctrl-C: another consumer gets it at once
                message.requeue()
                raise
            if not done:
                due = time.monotonic() + self._pause(self._failures.count(event.id))
                heapq.heappush(self._waiting, (due, next(self._numbers), message))
                return
            message.ack()
        held.remove(message)

    def _handle(self, event: Event) -> bool:
        """Whether the event is done with."""
        if self._handled.count(event.id):
            log.info("dropping a repeat of event %s", event.id)
            return True
        try:
            self._handler(event)
        except Exception:
            self._failures.note(event.id)
            log.exception("the handler failed on event %s; it will be delivered again", event.id)
            return False
        self._handled.note(event.id)
        return True

    def _give_back(self, held: Held, now: float) -> float:
        """Return the failed messages that are due to the queue; seconds until a next one may be."""
        while self._waiting:
            due, _, message = self._waiting[0]
            if due > now:
                return min(due - now, IDLE_SECONDS)
            heapq.heappop(self._waiting)
            message.requeue()
            held.remove(message)
        return IDLE_SECONDS

    def _pause(self, failures: int) -> float:
        return min(self._max_pause, FIRST_PAUSE * 2.0 ** min(failures - 1, 16))


class _Recent:
    """How often each of the last ids was noted."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: OrderedDict[str, int] = OrderedDict()

    def count(self, event_id: str) -> int:
        return self._counts.get(event_id, 0)

    def note(self, event_id: str) -> None:
        self._counts[event_id] = self.count(event_id) + 1
        self._counts.move_to_end(event_id)
        if len(self._counts) > self._size:
            self._counts.popitem(last=False)


def _outages(connection: Connection) -> tuple[type[Exception], ...]:
    """What an unreachable or restarting broker raises."""
    return (*connection.connection_errors, *connection.channel_errors, OperationalError, OSError)
