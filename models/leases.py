"""Leases that have run out: whether their workers are dead, and what becomes of the jobs."""

from __future__ import annotations

import math
from typing import Final

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models import jobs
from models.database import db_now
from models.moves import END, GIVE_UP, REQUEUE_AFTER_CRASH, after_end, locked, move, requeue
from models.outcomes import Transition
from models.tables import Job
from visq.types import JobStatus

_SECONDS_UP: Final = text(
    "SELECT extract(epoch FROM statement_timestamp() - pg_postmaster_start_time())"
)


def seconds_up(session: Session) -> float:
    """How long the database has been up: nobody could renew a lease before. Infinite on SQLite,
    which has no server."""
    if session.get_bind().dialect.name != "postgresql":
        return math.inf
    return float(session.execute(_SECONDS_UP).scalar_one())


def without_lease(session: Session, limit: int) -> list[str]:
    """Ids of running jobs whose lease has run out."""
    return list(
        session.scalars(
            select(Job.id)
            .where(Job.status == JobStatus.RUNNING, Job.lease_expires_at <= db_now())
            .order_by(Job.lease_expires_at)
            .limit(limit)
        )
    )


_LEASE_RAN_OUT: Final = Job.lease_expires_at <= db_now()
_END_DEAD: Final = END.where(_LEASE_RAN_OUT)
_GIVE_UP_DEAD: Final = GIVE_UP.where(_LEASE_RAN_OUT)
_REQUEUE_DEAD: Final = REQUEUE_AFTER_CRASH.where(_LEASE_RAN_OUT)


def rescue(session: Session, job_id: str, *, backoff_seconds: float = 1.0) -> Transition | None:
    """Take a job from a worker whose lease has run out; ``None`` if it is not such a job."""
    job = locked(session, jobs.get(session, job_id))
    reason = f"the lease of {job.worker} ran out"
    if job.status is not JobStatus.RUNNING:
        return None
    error: dict[str, str | None] = {}
    if job.cancel_requested_at is not None:
        how, to = _END_DEAD, JobStatus.CANCELLED
    elif job.expires_at is not None and session.scalar(select(db_now() >= job.expires_at)):
        how, to = _END_DEAD, JobStatus.EXPIRED
    else:
        requeued = requeue(
            session, _REQUEUE_DEAD, job_id, reason=reason, backoff_seconds=backoff_seconds
        )
        if requeued is not None:
            return requeued
        how, to = _GIVE_UP_DEAD, JobStatus.FAILED
        error = {
            "code": "attempts_exhausted",
            "message": f"{reason}; all {job.max_attempts} attempts are used up",
            "param": None,
        }
    moved = move(session, how, job_id, JobStatus.RUNNING, to, reason=reason, **error)
    return None if moved is None else after_end(session, moved)
