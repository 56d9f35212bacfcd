"""Which queued jobs must be published to the broker, and when.

``jobs.publish_at`` is the whole dispatch state. A job that enters ``queued`` is due at once (after
a short grace in which the process that queued it publishes it) or after its back-off. Publishing
moves `publish_at` ahead, so a message that a broker lost is published again: first publication,
left-overs of a crash, retries and lost messages are one loop
(docs/decisions/003-publish-at.md). First publications go before repeats: a job that merely waits
for its turn is repeated for as long as it waits, and must not keep others out of the broker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, Select, bindparam, case, func, literal_column, select, update
from sqlalchemy.orm import Session

from models.database import db_now, fetch
from models.moves import ALONE
from models.outcomes import QueuedJob
from models.tables import Job, has_status
from visq.types import JobStatus, Lane


@dataclass(frozen=True)
class DueJob:
    """A job to publish. `publishes` counts this publication: from 2 on it is a repeat."""

    job: QueuedJob
    publishes: int


# Not parameters: an index may be for these rows only, and must be known to fit.
_QUEUED: Final = has_status(JobStatus.QUEUED)
_UNPUBLISHED: Final = Job.publishes == literal_column("0")


def _due(*which: ColumnElement[bool]) -> Select[str]:
    return (
        select(Job.id)
        .where(_QUEUED, Job.publish_at <= db_now(), *which)
        .order_by(Job.publish_at)
        .limit(bindparam("most"))
        .with_for_update(skip_locked=True)
    )


_FIRST: Final = _due(_UNPUBLISHED)
_REPEATS: Final = _due(Job.publishes > 0)
_RESERVE: Final = (
    update(Job)
    .where(Job.id.in_(bindparam("job_ids", expanding=True)))
    .values(publish_at=db_now("republish_seconds"), publishes=Job.publishes + 1)
    .returning(Job.id, Job.tenant_id, Job.lane, ALONE, Job.publishes)
    .execution_options(synchronize_session=False)
)


def reserve_due(session: Session, *, limit: int, republish_seconds: float) -> list[DueJob]:
    """Take jobs that are due for publishing, at most `limit`: first publications, and repeats in
    what room is left. A crash before they are published only delays them by `republish_seconds`."""
    # Not a subquery of the UPDATE: PostgreSQL may run one with SKIP LOCKED again for each row, and
    # each run takes `limit` other rows.
    due = list(session.scalars(_FIRST, {"most": limit}))
    if len(due) < limit:
        due += session.scalars(_REPEATS, {"most": limit - len(due)})
    if not due:
        return []
    rows = fetch(session, _RESERVE, {"job_ids": due, "republish_seconds": republish_seconds})
    # By turns: what stands behind all of another tenant would wait longer in each round.
    turns: Counter[str] = Counter()
    due_jobs = []
    for id_, tenant_id, lane, alone, publishes in sorted(rows):
        due_jobs.append((turns[tenant_id], DueJob(QueuedJob(id_, lane, alone), publishes)))
        turns[tenant_id] += 1
    return [due for _, due in sorted(due_jobs, key=lambda turn: (turn[0], turn[1].job.id))]


def mark_published(session: Session, job_ids: Sequence[str], *, republish_seconds: float) -> None:
    """The process that queued these jobs has published them itself."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED, Job.publishes == 0)
        .values(publish_at=db_now(republish_seconds), publishes=1),
        execution_options={"synchronize_session": False},
    )


def publish_again_now(session: Session, job_ids: Sequence[str], *, seconds: float) -> None:
    """Publishing of reserved jobs failed: they are due again in `seconds`, as what they were."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED)
        .values(
            publish_at=db_now(seconds),
            publishes=case((Job.publishes > 0, Job.publishes - 1), else_=0),
        ),
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
