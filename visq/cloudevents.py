"""The envelope of an event: CloudEvents 1.0 in JSON (cloudevents.io, structured mode)."""

from __future__ import annotations

from typing import Any, Final

from visq.types import BatchView, JobView

CONTENT_TYPE: Final = "application/cloudevents+json"
RESULTS_EXCHANGE: Final = "visq.results"
"""Durable topic exchange; the routing key is ``<tenant>.<kind>.<status>``."""


def result_event(event_id: str, tenant: str, job: JobView) -> dict[str, Any]:
    """The event that `job`, of the tenant named `tenant`, has ended.

    `event_id` stays the same when the event is published again.
    """
    if job.finished_at is None:
        raise ValueError("only a job that has ended has a result event")
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": "/visq/jobs",
        "type": f"visq.job.{job.status}",
        "subject": job.id,
        "time": job.finished_at.isoformat(),
        "datacontenttype": "application/json",
        "visqtenant": tenant,
        "data": job.model_dump(mode="json"),
    }


def batch_event(event_id: str, tenant: str, batch: BatchView) -> dict[str, Any]:
    """The event that `batch` has ended; it comes after those of its items were written."""
    if batch.finished_at is None:
        raise ValueError("only a batch that has ended has an event")
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": "/visq/batches",
        "type": f"visq.batch.{batch.status}",
        "subject": batch.id,
        "time": batch.finished_at.isoformat(),
        "datacontenttype": "application/json",
        "visqtenant": tenant,
        "data": batch.model_dump(mode="json"),
    }


def routing_key(event: dict[str, Any]) -> str:
    """``<tenant>.<kind>.<status>``, e.g. ``acme.chat.succeeded`` or ``acme.batch.completed``."""
    data = event["data"]
    return f"{event['visqtenant']}.{data.get('kind', 'batch')}.{data['status']}"


def result_queue_name(tenant: str, name: str) -> str:
    """The broker's name of a tenant's own queue: no tenant can name another's, or one of visq's."""
    return f"visq.results.{tenant}.{name}"
