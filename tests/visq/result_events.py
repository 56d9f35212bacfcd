"""Result events as the workers publish them, for tests of consumers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import SecretStr

from visq.cloudevents import result_event
from visq.ids import new_id
from visq.settings import Settings
from visq.types import ErrorBody, JobKind, JobResult, JobStatus, JobView, Json, Lane, Usage
from worker.queue.broker import Broker


def ended_job(
    text: str = "two red circles",
    *,
    kind: JobKind = JobKind.CHAT,
    status: JobStatus = JobStatus.SUCCEEDED,
    result_queue: str | None = None,
) -> JobView:
    """A job that has ended."""
    now = datetime.now(UTC)
    succeeded = status is JobStatus.SUCCEEDED
    return JobView(
        id=new_id("job"),
        kind=kind,
        status=status,
        lane=Lane.INTERACTIVE,
        attempt=1,
        max_attempts=3,
        metadata={},
        result_queue=result_queue,
        result=JobResult(text=text, finish_reason="stop", usage=Usage(), model="small")
        if succeeded
        else None,
        error=None if succeeded else ErrorBody(code="engine_error", message="it went wrong"),
        created_at=now,
        started_at=now,
        finished_at=now,
    )


def event_of(job: JobView, *, tenant: str = "acme") -> Json:
    return result_event(new_id("evt"), tenant, job)


@contextmanager
def publisher(broker_url: str) -> Iterator[Broker]:
    """The very publisher of the workers."""
    broker = Broker(Settings(broker_url=SecretStr(broker_url)))
    try:
        yield broker
    finally:
        broker.close()
