"""`consume`: take results from a queue of the broker, one by one, and lose none.

The message is acknowledged after the handler has returned, and delivered again if it raised or its
process died; so a handler may see a result twice. Repeats that this process has handled are dropped
by the event's id; a handler whose effect must happen once keeps the ids in its own transaction
(docs/consumers.md).

How a message goes when its handler does not succeed::

    queue ──> handler raises ──> held back here for a pause ──> queue
      │       consumer dies  ──> the broker delivers it again ──> counted ──> queue
      └─ one delivery is left ──> queue.suspects ──> handled alone ──> queue.dead

What goes back is a copy whose headers count (visq/consumer_events.py). A process that dies takes
with it what the broker had sent in advance, and those messages are counted too; so the last
delivery is one in which a message is fetched alone, when its handler begins. Who dies then is to
blame, and nobody beside it.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from amqp.exceptions import MessageNacked
from kombu import Connection, Consumer, Exchange, Message, Queue
from kombu.exceptions import OperationalError
from pydantic import ValidationError

from visq.client.servers import find_broker
from visq.cloudevents import RESULTS_EXCHANGE
from visq.consumer_dead import dead_queue
from visq.consumer_events import (
    ENDED,
    Event,
    Failure,
    copy_of,
    failed_copy_of,
    is_dead,
    was_redelivered,
)
from visq.consumer_queues import declare, send
from visq.consumer_redis import Held, bind_again, connect, stop_taking

__all__ = ["Event", "Failure", "consume"]

log = logging.getLogger(__name__)

IDLE_SECONDS: Final = 0.5
"""How long one look at the broker waits; `stop` is heeded this fast."""
UPKEEP_SECONDS: Final = 1.0
"""Between two looks for suspects; on Redis also between two writes of the bindings."""
FIRST_PAUSE: Final = 1.0
"""Seconds before the first repeat, of a failed message or a failed connection; doubles."""
MAX_DELIVERIES: Final = 20
"""With the pauses of `consume`'s defaults, a handler may fail for seven minutes."""


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
    max_deliveries: int | None = MAX_DELIVERIES,
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
    :param max_deliveries: an event whose handler has raised, or whose consumer has died, so often
        goes to the queue ``<queue>.dead`` (`visq.bring_back` moves it back). None: never.
    :param remember: ids of handled events to keep in memory.
    :raises ConfigurationError: no broker is known.
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
        max_deliveries=max_deliveries,
        remember=remember,
    ).run()


class _Consumer:
    """Connects, again and again, and remembers over connections which events were handled."""

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
        max_deliveries: int | None,
        remember: int,
    ) -> None:
        self.name = queue
        self.suspects = f"{queue}.suspects"
        self.handler = handler
        self.patterns = patterns
        self.prefetch = prefetch
        self.stop = stop
        self.on_ready = on_ready
        self.redeliver_after = redeliver_after
        self.max_deliveries = max_deliveries or None
        self.handled = _Recent(remember)
        self._url = broker_url
        self.max_pause = max_pause

    def run(self) -> None:
        outages = 0
        while not self.stop.is_set():
            connection = connect(self._url, self.name, self.redeliver_after)
            started = time.monotonic()
            try:
                connection.ensure_connection(max_retries=1, timeout=5)
                _Connected(self, connection).consume()
            except _outages(connection) as error:  # the broker delivers again what was held
                outages = 1 if time.monotonic() - started > self.max_pause else outages + 1
                pause = self.pause(outages)
                log.warning("the broker is away (%s); trying again in %.1f s", error, pause)
                self.stop.wait(pause)
            finally:
                with suppress(*_outages(connection)):
                    connection.release()

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.max_pause, FIRST_PAUSE * 2.0 ** min(failures - 1, 16))


class _Connected:
    """One connection of a consumer, and the messages that it holds."""

    def __init__(self, consumer: _Consumer, connection: Connection) -> None:
        self._consumer = consumer
        self._connection = connection
        self._channel: Any = connection.default_channel
        self._side: Any = connection.channel()
        """For what is sent or fetched singly; an error there must not be taken for the queue's."""
        self._held = Held(self._channel, consumer.redeliver_after)
        self._inbox: deque[Message] = deque()
        """Messages that came, maybe while a confirmation was awaited; handled one by one."""
        self._waiting: list[tuple[float, int, Message, Failure]] = []
        """Failed messages: when to give them back, a number, and the message."""
        self._numbers = itertools.count()
        self._upkeep_due = 0.0

    def consume(self) -> None:
        """Until the consumer is to stop."""
        consumer = self._consumer
        queue = self._declare()
        with (
            self._held,
            Consumer(
                self._channel,
                [queue],
                on_message=self._receive,
                auto_declare=False,
                prefetch_count=consumer.prefetch,
            ),
        ):
            log.info("consuming %s", consumer.name)
            consumer.on_ready()
            while not consumer.stop.is_set():
                now = time.monotonic()
                wait = self._give_back(now)
                if now >= self._upkeep_due:
                    self._upkeep()
                elif self._inbox:
                    self._take(self._inbox.popleft())
                else:
                    with suppress(TimeoutError):
                        self._connection.drain_events(timeout=wait)
        # Only now, or what is given back would come here once more.
        stop_taking(self._channel, self._side, [*self._inbox, *(held[2] for held in self._waiting)])
        self._give_back(math.inf)
        for message in self._inbox:
            self._move(message, consumer.name, _failure_of(message))

    def _declare(self) -> Queue:
        consumer = self._consumer
        queue = declare(self._connection, consumer.name)
        if consumer.max_deliveries is not None:
            declare(self._connection, consumer.suspects)
        if consumer.patterns:
            exchange = Exchange(RESULTS_EXCHANGE, type="topic", durable=True)(self._channel)
            exchange.declare()
            for pattern in consumer.patterns:
                queue.bind_to(exchange, routing_key=pattern)
        return queue

    def _receive(self, message: Message) -> None:
        self._held.add(message)
        self._inbox.append(message)

    def _upkeep(self) -> None:
        """Handle one suspect, if there is one; see to the bindings."""
        self._upkeep_due = time.monotonic() + UPKEEP_SECONDS
        consumer = self._consumer
        bind_again(self._side, consumer.name, RESULTS_EXCHANGE, consumer.patterns)
        if consumer.max_deliveries is None:
            return
        message = Queue(consumer.suspects)(self._side).get()
        if message is not None:
            self._held.add(message)
            self._take(message, alone=True)
            self._upkeep_due = 0.0  # there may be more

    def _take(self, message: Message, *, alone: bool = False) -> None:
        """Handle one message, or send it where it belongs.

        :param alone: it is from the queue of suspects.
        """
        consumer = self._consumer
        limit = consumer.max_deliveries
        try:
            event = Event.model_validate_json(message.body or "")
        except ValidationError as error:
            self._refuse(message, error)
            return
        if consumer.handled.has(event.id):
            log.info("dropping a repeat of event %s", event.id)
            self._settle(message)
            return
        failure = _failure_of(message)
        deliveries = 0 if failure is None else failure.deliveries
        if limit is not None and failure is not None and deliveries >= limit:
            self._bury(message, failure)
        elif limit is not None and deliveries == limit - 1 and not alone:
            self._move(message, consumer.suspects, failure)
            self._upkeep_due = 0.0
        elif was_redelivered(
            message
        ):  # the count must be in the headers before the handler can end us
            self._move(message, consumer.suspects if alone else consumer.name, failure)
        else:
            event.failure = Failure.of(message)
            self._handle(message, event, failure)

    def _handle(self, message: Message, event: Event, failure: Failure | None) -> None:
        consumer = self._consumer
        try:
            consumer.handler(event)
        except Exception as error:
            failure = Failure.after(failure, type(error).__name__, str(error))
            if consumer.max_deliveries is None or failure.deliveries < consumer.max_deliveries:
                log.exception("the handler failed on event %s; it will come again", event.id)
                # A dead letter that is only looked at need not come again soon.
                looked_at = is_dead(message) and consumer.max_deliveries is None
                pause = consumer.max_pause if looked_at else consumer.pause(failure.deliveries)
                due = time.monotonic() + pause
                heapq.heappush(self._waiting, (due, next(self._numbers), message, failure))
            else:
                log.exception("the handler failed on event %s", event.id)
                self._bury(message, failure)
        except BaseException:  # Ctrl-C: another consumer gets it at once
            message.requeue()
            raise
        else:
            consumer.handled.note(event.id)
            self._settle(message)

    def _give_back(self, now: float) -> float:
        """Return the failed messages that are due to the queue; seconds until a next one may be."""
        while self._waiting:
            due, _, message, failure = self._waiting[0]
            if due > now:
                return min(due - now, IDLE_SECONDS)
            heapq.heappop(self._waiting)
            self._move(message, self._consumer.name, failure)
        return IDLE_SECONDS

    def _refuse(self, message: Message, error: ValidationError) -> None:
        """A message that is no result: the handler is not called."""
        name = self._consumer.name
        if self._consumer.max_deliveries is None:
            log.error("dropping a message of %s that is no result: %s", name, error)
            self._settle(message)
        else:
            self._bury(message, Failure.after(None, type(error).__name__, str(error)))

    def _bury(self, message: Message, failure: Failure) -> None:
        consumer = self._consumer
        log.error(
            "message %s of %s is a dead letter after %d deliveries: %s: %s",
            message.properties.get("message_id"),
            consumer.name,
            failure.deliveries,
            failure.error,
            failure.message,
        )
        letter = failed_copy_of(message, failure, dead_from=consumer.name)
        send(self._side, dead_queue(consumer.name), **letter)
        self._settle(message)

    def _move(self, message: Message, queue: str, failure: Failure | None) -> None:
        """Put a copy into `queue`, then acknowledge: between the two it may be there twice."""
        # Who only looks at dead letters does not overwrite what they say.
        only_looked_at = is_dead(message) and self._consumer.max_deliveries is None
        if failure is None or only_looked_at:
            send(self._side, queue, **copy_of(message))
        else:
            send(self._side, queue, **failed_copy_of(message, failure))
        self._settle(message)

    def _settle(self, message: Message) -> None:
        message.ack()
        self._held.remove(message)


def _failure_of(message: Message) -> Failure | None:
    """What became of its deliveries from this queue; None if this is the first."""
    failure = None if is_dead(message) else Failure.of(message)
    if was_redelivered(message):
        return Failure.after(failure, ENDED, "a consumer ended before it was done with it")
    return failure


class _Recent:
    """The last so many ids that were noted."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ids: OrderedDict[str, None] = OrderedDict()

    def has(self, event_id: str) -> bool:
        return event_id in self._ids

    def note(self, event_id: str) -> None:
        self._ids[event_id] = None
        self._ids.move_to_end(event_id)
        if len(self._ids) > self._size:
            self._ids.popitem(last=False)


def _outages(connection: Connection) -> tuple[type[Exception], ...]:
    """What an unreachable or restarting broker raises, or one that refuses a message."""
    return (
        *connection.connection_errors,
        *connection.channel_errors,
        OperationalError,
        MessageNacked,
        OSError,
    )
