"""Which queued jobs must be published to the broker, and when.

``jobs.publish_at`` is the whole dispatch state. A job that enters ``queued`` is due at once (after
a short grace in which the process that queued it publishes it) or after its back-off. Publishing
moves `publish_at` ahead, so a message that a broker lost is published again: first publication,
left-overs of a crash, retries and lost messages are one loop
(docs/decisions/003-publish-at.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from models.database import db_now, fetch
from models.moves import ALONE
from models.outcomes import QueuedJob
from models.tables import Job
from visq.types import JobStatus, Lane


@dataclass(frozen=True)
class DueJob:
    """A job to publish. `publishes` counts this publication: from 2 on it is a repeat."""

    job: QueuedJob
    publishes: int


_DUE: Final = (
    select(Job.id)
    .where(Job.status == JobStatus.QUEUED, Job.publish_at <= db_now())
    .order_by(Job.publish_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)
_RESERVE: Final = (
    update(Job)
    .where(Job.id.in_(bindparam("job_ids", expanding=True)))
    .values(publish_at=db_now("republish_seconds"), publishes=Job.publishes + 1)
    .returning(Job.id, Job.lane, ALONE, Job.publishes)
    .execution_options(synchronize_session=False)
)


def reserve_due(session: Session, *, limit: int, republish_seconds: float) -> list[DueJob]:
    """Take jobs that are due for publishing; a crash before they are published only delays them
    by `republish_seconds`."""
    # Not a subquery of the UPDATE: PostgreSQL may run one with SKIP LOCKED again for each row, and
    # each run takes `limit` other rows.
    due = session.scalars(_DUE, {"most": limit}).all()
    if not due:
        return []
    rows = fetch(session, _RESERVE, {"job_ids": list(due), "republish_seconds": republish_seconds})
    due_jobs = (
        DueJob(QueuedJob(id_, lane, alone), publishes) for id_, lane, alone, publishes in rows
    )
    return sorted(due_jobs, key=lambda due: due.job.id)


def mark_published(session: Session, job_ids: Sequence[str], *, republish_seconds: float) -> None:
    """The process that queued these jobs has published them itself."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED, Job.publishes == 0)
        .values(publish_at=db_now(republish_seconds), publishes=1),
        execution_options={"synchronize_session": False},
    )


def publish_again_now(session: Session, job_ids: Sequence[str], *, seconds: float) -> None:
    """Publishing of reserved jobs failed: they are due again in `seconds`."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED)
        .values(publish_at=db_now(seconds), publishes=0),
        execution_options={"synchronize_session": False},
    )


def in_broker(session: Session) -> dict[Lane, int]:
    """Queued jobs of each lane that were published: what the broker should hold at least."""
    rows = session.execute(
        select(Job.lane, func.count())
        .where(Job.status == JobStatus.QUEUED, Job.publishes > 0)
        .group_by(Job.lane)
    )
    return dict(rows.all())
