"""A cancel that races the run of its job: one end of the two, told once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Final

import pytest
from sqlalchemy import func, select

from migrations import run as migrations
from models import batches, groups, jobs, reading, submit
from models.database import Database
from models.outcomes import Cancelled, Outcome, Succeeded, Work
from models.tables import Job, JobEvent, Outbox
from visq.types import BatchRequest, BatchStatus, JobResult, JobStatus, Message, Usage

JOBS: Final = 1000
AT_ONCE: Final = 10
"""Jobs that a worker claims, and ends, together."""
LEASE_SECONDS: Final = 60.0

ENDS: Final = {JobStatus.SUCCEEDED, JobStatus.CANCELLED}


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrations.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


def test_a_cancel_that_races_the_end_of_its_job_gives_one_end_and_one_event(
    database: Database,
) -> None:
    tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
    items = [{"custom_id": f"item-{n}", "prompt": "?"} for n in range(JOBS)]
    request = BatchRequest.model_validate({"items": items})
    batch_id = database.run(submit.submit_batch, tenant, request, max_attempts=3).batch.id
    ids = database.read(
        lambda session: session.scalars(select(Job.id).order_by(Job.position)).all()
    )
    chunks = [list(ids[n : n + AT_ONCE]) for n in range(0, JOBS, AT_ONCE)]
    meet = threading.Barrier(2)

    def work() -> None:
        for chunk in chunks:
            meet.wait(60)  # both are at the same jobs
            run(database, chunk)

    def call_off() -> None:
        chance = random.Random(1)
        for chunk in chunks:
            meet.wait(60)
            for job_id in chance.sample(chunk, AT_ONCE):
                database.run(jobs.cancel, job_id)

    with ThreadPoolExecutor() as pool:
        both = [pool.submit(work), pool.submit(call_off)]
        for each in as_completed(both):
            if each.exception() is not None:
                meet.abort()  # the other waits for nobody
        for each in both:
            each.result()

    history = select(JobEvent.job_id, JobEvent.to_status).where(JobEvent.to_status.in_(ENDS))
    ends = database.read(lambda session: session.execute(history).all())
    rows = database.read(lambda session: session.execute(select(Job.id, Job.status)).all())
    found = {row.id: row.status for row in rows}
    assert Counter(job_id for job_id, _ in ends) == dict.fromkeys(ids, 1), "an end, and no second"
    assert {end.job_id: end.to_status for end in ends} == found
    events = select(Outbox.payload).where(Outbox.kind == "result")
    told = database.read(lambda session: session.scalars(events).all())
    assert len(told) == JOBS
    assert {event["data"]["id"]: event["data"]["status"] for event in told} == found
    batch = database.read(batches.get, batch_id)
    counted = Counter(found.values())
    assert (batch.succeeded, batch.cancelled) == tuple(
        counted[status] for status in (JobStatus.SUCCEEDED, JobStatus.CANCELLED)
    )
    assert batch.status is BatchStatus.COMPLETED
    assert min(counted[status] for status in ENDS) > JOBS // 50, f"no race: {counted}"
    stopped = (
        select(func.count())
        .select_from(JobEvent)
        .where(JobEvent.from_status == JobStatus.RUNNING, JobEvent.to_status == JobStatus.CANCELLED)
    )
    assert database.read(lambda session: session.scalar(stopped)), "no run was stopped by a cancel"


def run(database: Database, ids: list[str]) -> None:
    """As a worker does: it learns of cancels from its heartbeat, and some come after that."""
    claimed = database.run(groups.claim_all, ids, worker="w", lease_seconds=LEASE_SECONDS)
    works = [work for work in claimed.values() if work is not None]
    for job_id in set(ids) - claimed.keys():
        alone = database.run(jobs.claim, job_id, worker="w", lease_seconds=LEASE_SECONDS)
        works += [] if alone is None else [alone]
    if not works:
        return
    claims = [work.claim for work in works]
    renewed = database.run(jobs.renew, claims, lease_seconds=LEASE_SECONDS)
    stopped = {each.claim for each in renewed if each.cancel_requested}
    outcomes: dict[str, Outcome] = {
        work.claim.job_id: Cancelled() if work.claim in stopped else answer(work) for work in works
    }
    succeeded = [
        (work.claim, outcome)
        for work in works
        if isinstance(outcome := outcomes[work.claim.job_id], Succeeded)
    ]
    ended = database.run(groups.succeed_all, succeeded)
    assert all(transition is not None for transition in ended.values()), "nobody takes its job"
    for claim in claims:
        if claim not in ended:
            one = database.run(jobs.finish, claim, outcomes[claim.job_id])
            assert one is not None, "nobody takes a running job from its worker"


def answer(work: Work) -> Succeeded:
    result = JobResult(text="!", finish_reason="stop", usage=Usage(), model="played")
    return Succeeded(result, [*work.prompt.as_messages(), Message(role="assistant", content="!")])
