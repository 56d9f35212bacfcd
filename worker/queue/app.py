"""The Celery application: queues, and the settings of an expert for this use.

A message carries job ids and nothing else. The broker is not trusted: losing, repeating or
reordering messages delays a job, but never loses or repeats it (`models.dispatch`). So there is no
result backend, no ETA, no retry by Celery, and no reliance on redelivery: a message lives for the
length of its job, and is then acknowledged; if the worker dies, the lease brings the job back.
"""

from __future__ import annotations

from typing import Any, Final

from celery import Celery
from kombu import Exchange, Queue

from visq.settings import Settings
from visq.types import Lane
from worker.queue import broker_clients

RUN_TASK: Final = "visq.run"
"""Name of the one task: a list of job ids, and perhaps ``alone`` (`models.jobs.claim`)."""

ONE_DAY_MS: Final = 24 * 3600 * 1000


def queue_name(lane: Lane) -> str:
    return f"visq.{lane.value}"


def is_redis(url: str) -> bool:
    return url.startswith(("redis:", "rediss:"))


def transport_options(broker_url: str) -> dict[str, Any]:
    """Transport options of every connection that visq's own processes open."""
    if not is_redis(broker_url):
        # An outage is told at once: kombu would try to connect for six seconds at each message.
        return {"confirm_publish": True, "max_retries": 1, "interval_start": 0}
    return {
        # Redelivery is not how a job recovers (its lease is), so this is long: a short one would
        # only bring repeats of messages whose jobs still run.
        "visibility_timeout": 3600,
        # Keys of our own: the sweep of these must not touch the unacknowledged messages of
        # consumers of results, which live under kombu's default keys.
        "unacked_key": "visq:unacked",
        "unacked_index_key": "visq:unacked_index",
        "unacked_mutex_key": "visq:unacked_mutex",
        "socket_timeout": 15,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "queue_order_strategy": "priority",
    }


def make_app(settings: Settings) -> Celery:
    """The application for `settings`; importing this module has no side effects."""
    if is_redis(settings.broker):
        broker_clients.install()
    app = Celery("visq", set_as_current=False)
    exchange = Exchange("visq.jobs", type="direct", durable=True)
    queue_arguments: dict[str, Any] = {}
    if not is_redis(settings.broker):
        # Quorum queues have no priorities, and need none: one queue a lane.
        queue_arguments = {"x-queue-type": "quorum", "x-consumer-timeout": ONE_DAY_MS}
    app.conf.update(
        broker_url=settings.broker,
        broker_transport_options=transport_options(settings.broker),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_acquire_timeout=5,
        broker_heartbeat=30,
        # In the order in which a free worker looks at them (Redis: queue_order_strategy).
        task_queues=[
            Queue(
                queue_name(lane),
                exchange,
                routing_key=lane.value,
                durable=True,
                queue_arguments=queue_arguments,
            )
            for lane in Lane
        ],
        task_default_queue=queue_name(Lane.STANDARD),
        task_create_missing_queues=False,
        task_acks_late=True,
        # With late acknowledgement: as many messages as jobs that run. On RabbitMQ that is so for
        # each lane, since quorum queues limit each consumer, not the channel: up to twice as many
        # more wait in the worker, until they are published again and others take the jobs.
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        result_backend=None,
        task_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        task_publish_retry=False,  # the maintenance loop publishes again
        worker_cancel_long_running_tasks_on_connection_loss=False,  # fencing makes repeats harmless
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,  # cancel and inspection go through the database
        worker_detect_quorum_queues=True,
    )
    return app
