"""Publishing to the broker: job ids to the lanes, result events to the exchange."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from amqp.exceptions import MessageNacked
from celery import Celery
from kombu import Connection, Exchange, Producer
from kombu.exceptions import KombuError
from kombu.pools import ProducerPool

from models.outcomes import QueuedJob
from visq.cloudevents import CONTENT_TYPE, RESULTS_EXCHANGE, result_queue_name, routing_key
from visq.consumer_queues import CONFIRM_SECONDS, send
from visq.errors import Unavailable
from visq.settings import Settings
from visq.types import Lane
from worker.queue.app import RUN_TASK, make_app, queue_name, transport_options


class Refused(Unavailable):
    """A place does not take a result event, or does not confirm it; other places may."""

    place: str = ""

    @classmethod
    def by(cls, place: str, error: BaseException) -> Refused:
        refusal = cls(f"{place} does not take a result ({type(error).__name__})")
        refusal.place = place
        return refusal


def places(event: dict[str, Any]) -> tuple[str | None, str]:
    """Who takes a result event: the queue that its job names, and the queues that the tenant has
    bound to the exchange (one that is full refuses for all of them)."""
    tenant, queue = event["visqtenant"], event["data"]["result_queue"]
    own = None if queue is None else result_queue_name(tenant, queue)
    return own, f"{RESULTS_EXCHANGE} for {tenant}"


class Broker:
    """Blocking and thread-safe. Every method raises `Unavailable` if the broker does not answer."""

    def __init__(self, settings: Settings, app: Celery | None = None) -> None:
        self._app = app or make_app(settings)
        self._results = Connection(
            settings.broker, transport_options=transport_options(settings.broker)
        )
        self._producers = ProducerPool(self._results.Pool(limit=4), limit=4)
        self._errors: tuple[type[BaseException], ...] = (
            *self._results.connection_errors,
            *self._results.channel_errors,
            KombuError,
            OSError,
            MessageNacked,
        )
        self._refusals: tuple[type[BaseException], ...] = (
            MessageNacked,  # a queue with a limit that rejects, or without a leader
            TimeoutError,  # of a confirmation
            *self._results.channel_errors,
            KombuError,
        )
        self._exchange = Exchange(RESULTS_EXCHANGE, type="topic", durable=True)

    def publish_jobs(self, jobs: Sequence[QueuedJob]) -> None:
        """Tell the workers of `jobs`: one message each, in the queue of its lane."""
        with self._outage_typed(), self._app.producer_or_acquire() as p, _confirming(p) as producer:
            for job in jobs:
                self._app.send_task(
                    RUN_TASK,
                    args=[[job.id]],
                    kwargs={"alone": True} if job.alone else {},
                    queue=queue_name(job.lane),
                    producer=producer,
                    confirm_timeout=CONFIRM_SECONDS,
                )

    def publish_result(
        self, event: dict[str, Any], *, confirm_seconds: float | None = None
    ) -> None:
        """Publish a result event to the queue that its job names, and then to the exchange: what
        the one refuses is tried again, and the many need not hear of that.

        :param confirm_seconds: how long to wait for each confirmation, `CONFIRM_SECONDS` if None.
        :raises Refused: by one of its `places`; others may take theirs.
        """
        queue, topic = places(event)
        if confirm_seconds is None:
            confirm_seconds = CONFIRM_SECONDS
        message = {
            "body": json.dumps(event),
            "content_type": CONTENT_TYPE,
            "content_encoding": "utf-8",
            "delivery_mode": 2,
            "message_id": event["id"],
            "retry": False,
        }
        acquire = self._producers.acquire
        with self._outage_typed(), acquire(block=True, timeout=5) as p, _confirming(p) as producer:
            channel = producer.channel  # connects: a server that is away is no refusal
            if queue is not None:
                with self._refusal_typed(queue):
                    send(channel, queue, confirm_seconds=confirm_seconds, **message)
            publish: Callable[..., Any] = producer.publish
            with self._refusal_typed(topic):
                publish(
                    **message,
                    exchange=self._exchange,
                    routing_key=routing_key(event),
                    declare=[self._exchange],
                    confirm_timeout=confirm_seconds,
                )

    def depth(self, lane: Lane) -> int:
        """Messages that wait in the lane's queue, not counting those that workers hold."""
        with self._outage_typed(), self._app.connection_for_write() as connection:
            queue: Any = self._app.amqp.queues[queue_name(lane)](connection.default_channel)
            return int(queue.queue_declare().message_count)

    def ping(self) -> None:
        with self._outage_typed(), self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=3)

    def close(self) -> None:
        self._producers.force_close_all()  # type: ignore[attr-defined]  # in kombu's Resource
        self._results.release()
        self._app.close()

    @contextmanager
    def _outage_typed(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise Unavailable(f"the broker does not answer ({type(error).__name__})") from error

    @contextmanager
    def _refusal_typed(self, place: str) -> Iterator[None]:
        try:
            yield
        except self._refusals as error:
            raise Refused.by(place, error) from error


@contextmanager
def _confirming(producer: Producer) -> Iterator[Producer]:
    """Close the connection at an error: a confirmation that is still to come would be taken for
    that of the next message."""
    try:
        yield producer
    except BaseException:
        if producer.connection is not None:
            producer.connection.collect()
        raise
