"""A migrated database of each kind, and short ways to bring jobs into every state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import select

from migrations import run as migrations
from models import jobs, reading, submit
from models.database import Database
from models.outcomes import Failed, Outcome, Succeeded, Transition, Work
from models.tables import Job, JobEvent
from visq.errors import EngineCrashed, ImageFetchFailed, ImageNotFound
from visq.types import BatchRequest, JobRequest, JobResult, JobStatus, Message, Usage


@dataclass
class World:
    """A database with one tenant, and the calls of an API and a worker on it."""

    database: Database
    tenant_id: str
    max_attempts: int = 3

    def another_tenant(self, name: str) -> World:
        """The same database, called by another tenant."""
        tenants = self.database.run(reading.ensure_tenants, [name])
        return World(self.database, tenants[name], self.max_attempts)

    def submit(self, *, key: str | None = None, **fields: Any) -> Job:
        if "messages" not in fields:
            fields.setdefault("prompt", "what is this?")
        request = JobRequest.model_validate(fields)
        return self.database.run(
            submit.submit_job,
            self.tenant_id,
            request,
            max_attempts=self.max_attempts,
            idempotency_key=key,
            fingerprint=submit.body_fingerprint(request),
        ).job

    def submit_batch(self, count: int, **fields: Any) -> str:
        """A batch of `count` items, unless `fields` gives others."""
        body = {
            "items": [{"custom_id": f"item-{i}", "prompt": f"picture {i}"} for i in range(count)]
        }
        request = BatchRequest.model_validate(body | fields)
        submitted = self.database.run(submit.submit_batch, self.tenant_id, request, max_attempts=3)
        return submitted.batch.id

    def claim(self, job_id: str, lease_seconds: float = 30.0) -> Work | None:
        return self.database.run(jobs.claim, job_id, worker="worker-1", lease_seconds=lease_seconds)

    def claimed(self, job_id: str, lease_seconds: float = 30.0) -> Work:
        work = self.claim(job_id, lease_seconds)
        assert work is not None, f"{job_id} is {self.job(job_id).status}, not there to claim"
        return work

    def finish(self, work: Work, outcome: Outcome) -> Transition | None:
        return self.database.run(jobs.finish, work.claim, outcome)

    def succeed(
        self, job_id: str, text: str = "a cat", token_ids: list[int] | None = None
    ) -> Transition:
        work = self.claimed(job_id)
        transition = self.finish(work, answered(work, text, token_ids))
        assert transition is not None
        return transition

    def job(self, job_id: str) -> Job:
        return self.database.read(jobs.get, job_id)

    def history(self, job_id: str) -> list[tuple[JobStatus | None, JobStatus, int]]:
        """(from, to, attempt) of each of the job's transitions."""
        events: list[JobEvent] = self.database.read(reading.job_events, job_id)
        return [(event.from_status, event.to_status, event.attempt) for event in events]

    def statuses(self, **by: Any) -> list[JobStatus]:
        return list(
            self.database.read(
                lambda session: session.scalars(
                    select(Job.status).filter_by(**by).order_by(Job.id)
                ).all()
            )
        )


def answered(work: Work, text: str, token_ids: list[int] | None = None) -> Succeeded:
    result = JobResult(
        text=text, finish_reason="stop", usage=Usage(completion_tokens=2), model="small"
    )
    answer = Message(role="assistant", content=text)
    return Succeeded(result, [*work.prompt.as_messages(), answer], token_ids, "tokenizer-1")


TRANSIENT = Failed(ImageFetchFailed("the store did not answer"), backoff_seconds=0.0)
CRASHED = Failed(EngineCrashed("the engine died"), backoff_seconds=0.0)
PERMANENT = Failed(ImageNotFound("s3://a-bucket/cat.png does not exist"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrations.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def world(database: Database) -> World:
    tenants = database.run(reading.ensure_tenants, ["acme"])
    return World(database, tenants["acme"])
