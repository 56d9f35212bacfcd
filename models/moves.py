"""The parts of which a job's transitions (`models.jobs`) are made: the one UPDATE of ``status``,
what follows from an end, and the columns that each kind of state sets."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from models import batches, outbox, sessions
from models.database import db_now
from models.outcomes import QueuedJob, Transition
from models.tables import Job, JobEvent
from visq.errors import VisqError
from visq.types import JobStatus

PUBLISH_GRACE_SECONDS = 2.0
"""How long the process that queued a job has to publish it before the maintenance loop does."""

LONGEST_BACKOFF = 300.0
"""Seconds before another attempt at most, unless the first wait is longer already."""

PENDING = (JobStatus.WAITING, JobStatus.QUEUED)


def record(session: Session, job: Job, from_status: JobStatus | None, reason: str | None) -> None:
    """Write the transition that brought `job` to its present status."""
    session.add(
        JobEvent(
            tenant_id=job.tenant_id,
            job_id=job.id,
            from_status=from_status,
            to_status=job.status,
            attempt=job.attempt,
            worker=job.worker,
            reason=reason,
        )
    )
    session.flush()


def move(
    session: Session,
    job_id: str,
    from_status: JobStatus,
    to_status: JobStatus,
    *guards: ColumnElement[bool],
    values: dict[str, Any],
    reason: str | None,
) -> Job | None:
    """The one UPDATE of ``status``: guarded, recorded; ``None`` if a guard did not hold."""
    job = session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.status == from_status, *guards)
        .values(status=to_status, **values)
        .returning(Job),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).one_or_none()
    if job is not None:
        record(session, job, from_status, reason)
    return job


def requeue(
    session: Session,
    job_id: str,
    guard: ColumnElement[bool],
    reason: str,
    backoff_seconds: float,
) -> Transition | None:
    """A counted attempt is over: queue the job again if attempts are left, later each time."""
    failures = session.scalar(select(Job.failures).where(Job.id == job_id)) or 0
    delay = min(backoff_seconds * 2**failures, max(backoff_seconds, LONGEST_BACKOFF))
    job = move(
        session,
        job_id,
        JobStatus.RUNNING,
        JobStatus.QUEUED,
        guard,
        Job.failures + 1 < Job.max_attempts,
        Job.cancel_requested_at.is_(None),
        values={**queued_columns(delay), "failures": Job.failures + 1},
        reason=reason,
    )
    # It is published by the maintenance loop, when its back-off is over.
    return None if job is None else Transition(job)


def cancel_if_asked(session: Session, job_id: str, guard: ColumnElement[bool]) -> Job | None:
    """End a running job that was asked to stop and has stopped, for whatever reason."""
    return move(
        session,
        job_id,
        JobStatus.RUNNING,
        JobStatus.CANCELLED,
        guard,
        Job.cancel_requested_at.is_not(None),
        values=ended_columns(),
        reason="cancelled",
    )


def after_end(session: Session, job: Job) -> Transition:
    """What follows from a job's end: the session's next turn, the batch's counters, the event."""
    queued = []
    if job.session_id is not None:
        following = _release_next_turn(session, job.session_id)
        if following is not None:
            queued.append(QueuedJob(following.id, following.lane))
    if job.batch_id is not None:
        batches.count_end(session, job.batch_id, job.status)
    return Transition(job, queued=queued, events=[outbox.add_result(session, job)])


def _release_next_turn(session: Session, session_id: str) -> Job | None:
    """Queue the session's first waiting turn, unless a turn is still to end (lock held)."""
    unfinished = session.execute(
        select(Job.id, Job.status)
        .where(
            Job.session_id == session_id,
            Job.status.in_([JobStatus.WAITING, JobStatus.QUEUED, JobStatus.RUNNING]),
        )
        .order_by(Job.turn)
        .limit(1)
    ).one_or_none()
    if unfinished is None or unfinished.status is not JobStatus.WAITING:
        return None
    return move(
        session,
        unfinished.id,
        JobStatus.WAITING,
        JobStatus.QUEUED,
        values=queued_columns(),
        reason="the earlier turn ended",
    )


def locked(session: Session, job: Job) -> Job:
    """Lock the job's row, its session first, and read it again."""
    if job.session_id is not None:
        sessions.lock(session, job.session_id)
    return session.scalars(
        select(Job)
        .where(Job.id == job.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()


def queued_columns(delay_seconds: float = 0.0) -> dict[str, Any]:
    """Columns of a job that enters ``queued``, to run not before `delay_seconds` from now."""
    return {
        "worker": None,
        "lease_expires_at": None,
        "publishes": 0,
        "run_after": db_now(delay_seconds) if delay_seconds else None,
        "publish_at": db_now(delay_seconds or PUBLISH_GRACE_SECONDS),
    }


def ended_columns() -> dict[str, Any]:
    """Columns of a job that enters a terminal state."""
    return {
        "finished_at": db_now(),
        "lease_expires_at": None,
        "publish_at": None,
        "run_after": None,
    }


def error_columns(error: VisqError) -> dict[str, Any]:
    return {
        "error_code": error.code,
        "error_message": error.message,
        "error_param": error.param,
    }
