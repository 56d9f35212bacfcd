"""The life of a job: every transition of ``jobs.status``, each one guarded UPDATE.

::

    submit ──► waiting ──(the session's earlier turn ends)──┐
       │                                                     ▼
       └────────────────────────────────────────────────► queued ──claim──► running ──► succeeded
                                                             ▲                │ ├─────► failed
                 lease ran out or retryable error,           │                │ ├─────► cancelled
                 attempts left (with back-off) ──────────────┴────────────────┘ └─────► expired

A run holds a `Claim`: the job and the attempt. Every write of the run says ``WHERE id AND attempt
AND status = 'running'``; if no row matches, the run has lost its job, and must stop and publish
nothing. Transitions return what the caller must publish after the commit (`Transition`); the
maintenance loop publishes what a crash left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.orm import Session

from models import batches, outbox, sessions
from models.database import db_now
from models.outcomes import (
    Cancelled,
    Claim,
    Expired,
    Failed,
    HandedBack,
    Outcome,
    QueuedJob,
    Renewed,
    Succeeded,
    Transition,
    Work,
)
from models.tables import Batch, Job, JobEvent, Tenant
from visq import types
from visq.errors import NotFound, NotRetriable, VisqError
from visq.types import BatchStatus, JobStatus, Prompt

PUBLISH_GRACE_SECONDS = 2.0
"""How long the process that queued a job has to publish it before the maintenance loop does."""

LONGEST_BACKOFF = 300.0
"""Seconds before another attempt at most, unless the first wait is longer already."""

PENDING = (JobStatus.WAITING, JobStatus.QUEUED)


# --- a run: claim, renew, finish -------------------------------------------------------------


def claim(session: Session, job_id: str, *, worker: str, lease_seconds: float) -> Work | None:
    """Take a queued job; ``None`` if it is not there to take (a repeated or early message)."""
    batch_is_ending = exists().where(
        Batch.id == Job.batch_id, Batch.status == BatchStatus.CANCELLING
    )
    job = _move(
        session,
        job_id,
        JobStatus.QUEUED,
        JobStatus.RUNNING,
        Job.cancel_requested_at.is_(None),
        or_(Job.run_after.is_(None), Job.run_after <= db_now()),
        or_(Job.expires_at.is_(None), Job.expires_at > db_now()),
        or_(Job.batch_id.is_(None), ~batch_is_ending),
        values={
            "attempt": Job.attempt + 1,
            "worker": worker,
            "lease_expires_at": db_now(lease_seconds),
            "started_at": func.coalesce(Job.started_at, db_now()),
            "publish_at": None,
            "run_after": None,
        },
        reason=None,
    )
    if job is None:
        return None
    tenant, now = session.execute(
        select(Tenant.name, db_now()).where(Tenant.id == job.tenant_id)
    ).one()
    history: list[types.Message] = []
    if job.session_id is not None and job.turn is not None:
        history = sessions.history(session, job.session_id, before_turn=job.turn)
    request = dict(job.request)
    accept_changed = request.pop("on_image_change", "fail") == "accept"
    return Work(
        claim=Claim(job.id, job.attempt, job.session_id),
        tenant_id=job.tenant_id,
        tenant=tenant,
        lane=job.lane,
        batch_id=job.batch_id,
        prompt=Prompt.model_validate(request),
        accept_changed_images=accept_changed,
        history=history,
        expires_in=_seconds_left(job.expires_at, now),
    )


def renew(session: Session, claims: Sequence[Claim], *, lease_seconds: float) -> list[Renewed]:
    """Extend the leases of a worker's claims, in one UPDATE. A claim that is not in the answer is
    lost: its job has gone on without this run."""
    held = {claim.job_id: claim for claim in claims}
    rows = session.execute(
        update(Job)
        .where(Job.id.in_(held), Job.status == JobStatus.RUNNING)
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(Job.id, Job.attempt, Job.cancel_requested_at),
        execution_options={"synchronize_session": False},
    )
    return [
        Renewed(held[job_id], cancel_requested_at is not None)
        for job_id, attempt, cancel_requested_at in rows
        if held[job_id].attempt == attempt
    ]


def finish(session: Session, claim: Claim, outcome: Outcome) -> Transition | None:
    """End the run, in one transaction with everything that follows from it.

    Returns ``None`` if the claim is lost: then nothing was written, and nothing may be published.
    """
    if claim.session_id is not None:
        sessions.lock(session, claim.session_id)
    fence = Job.attempt == claim.attempt
    match outcome:
        case Succeeded(result, messages):
            job = _move(
                session,
                claim.job_id,
                JobStatus.RUNNING,
                JobStatus.SUCCEEDED,
                fence,
                values={"result": result.model_dump(mode="json"), **_ended()},
                reason=result.finish_reason,
            )
            if job is not None and claim.session_id is not None:
                sessions.append(session, job, messages)
        case Failed(error, backoff_seconds):
            job = None
            if error.retryable:
                requeued = _requeue(session, claim.job_id, fence, str(error), backoff_seconds)
                if requeued is not None:
                    return requeued
                job = _cancel_if_asked(session, claim.job_id, fence)
            if job is None:
                job = _move(
                    session,
                    claim.job_id,
                    JobStatus.RUNNING,
                    JobStatus.FAILED,
                    fence,
                    values={**_error(error), "failures": Job.failures + 1, **_ended()},
                    reason=error.code,
                )
        case Cancelled():
            job = _move(
                session,
                claim.job_id,
                JobStatus.RUNNING,
                JobStatus.CANCELLED,
                fence,
                values=_ended(),
                reason="cancelled",
            )
        case Expired():
            job = _move(
                session,
                claim.job_id,
                JobStatus.RUNNING,
                JobStatus.EXPIRED,
                fence,
                values=_ended(),
                reason="deadline",
            )
        case HandedBack(reason):
            job = _move(
                session,
                claim.job_id,
                JobStatus.RUNNING,
                JobStatus.QUEUED,
                fence,
                Job.cancel_requested_at.is_(None),
                values=_queued(),
                reason=reason,
            )
            if job is not None:
                return Transition(job, queued=[QueuedJob(job.id, job.lane)])
            # Nobody claims a job that was asked to stop: in the queue it would stay for ever.
            job = _cancel_if_asked(session, claim.job_id, fence)
    return None if job is None else _after_end(session, job)


# --- from outside: cancel, retry -------------------------------------------------------------


def get(session: Session, job_id: str) -> Job:
    """:raises NotFound: no such job."""
    job = session.scalars(select(Job).where(Job.id == job_id)).one_or_none()
    if job is None:
        raise NotFound(f"there is no job {job_id}", param="job_id")
    return job


def cancel(session: Session, job_id: str) -> Transition:
    """End a waiting or queued job, ask the worker of a running one to stop, leave an ended one.

    :raises NotFound: no such job.
    """
    job = _locked(session, get(session, job_id))
    if job.status in PENDING:
        cancelled = _move(
            session,
            job_id,
            job.status,
            JobStatus.CANCELLED,
            values=_ended(),
            reason="cancelled",
        )
        assert cancelled is not None, "the row was locked"
        return _after_end(session, cancelled)
    if job.status is JobStatus.RUNNING:
        session.execute(
            update(Job)
            .where(Job.id == job_id, Job.status == JobStatus.RUNNING)
            .values(cancel_requested_at=func.coalesce(Job.cancel_requested_at, db_now())),
            execution_options={"synchronize_session": False},
        )
    return Transition(job)


def retry(session: Session, job_id: str) -> Transition:
    """Queue a failed job again, with all its attempts.

    :raises NotFound: no such job.
    :raises NotRetriable: it has not failed, it is a turn that later turns have followed, or its
        batch is being cancelled.
    """
    job = _locked(session, get(session, job_id))
    if job.status is not JobStatus.FAILED:
        raise NotRetriable(f"job {job_id} is {job.status}; only a failed job can be retried")
    if job.session_id is not None:
        current = sessions.get(session, job.session_id)
        if current.turns != job.turn:
            raise NotRetriable(
                f"job {job_id} is turn {job.turn} of {job.session_id}, and later turns have "
                "followed; submit it as a new turn"
            )
    if job.batch_id is not None and not batches.uncount_failed(session, job.batch_id):
        raise NotRetriable(f"job {job_id} is of {job.batch_id}, which is being cancelled")
    queued = _move(
        session,
        job_id,
        JobStatus.FAILED,
        JobStatus.QUEUED,
        values={
            **_queued(),
            "failures": 0,
            "error_code": None,
            "error_message": None,
            "error_param": None,
            "finished_at": None,
            "cancel_requested_at": None,
        },
        reason="retried by a call",
    )
    assert queued is not None, "the row was locked"
    return Transition(queued, queued=[QueuedJob(queued.id, queued.lane)])


def delete_session(session: Session, session_id: str) -> list[Transition]:
    """Delete a session and its history; turns that have not ended are cancelled.

    :raises NotFound: no such session.
    """
    current = sessions.get(session, session_id)
    sessions.forget(session, current)
    unfinished = session.scalars(
        select(Job.id)
        .where(Job.session_id == session_id, Job.status.in_([*PENDING, JobStatus.RUNNING]))
        .order_by(Job.turn.desc())  # the last first, so that none is released on the way
    ).all()
    return [cancel(session, job_id) for job_id in unfinished]


# --- from the maintenance loop: deadlines and dead workers -----------------------------------


def past_deadline(session: Session, limit: int) -> list[str]:
    """Ids of waiting and queued jobs whose deadline has passed."""
    return list(
        session.scalars(
            select(Job.id)
            .where(Job.status.in_(PENDING), Job.expires_at <= db_now())
            .order_by(Job.expires_at)
            .limit(limit)
        )
    )


def expire(session: Session, job_id: str) -> Transition | None:
    """End a waiting or queued job whose deadline has passed; ``None`` if it is not one."""
    job = _locked(session, get(session, job_id))
    if job.status not in PENDING:
        return None
    expired = _move(
        session,
        job_id,
        job.status,
        JobStatus.EXPIRED,
        Job.expires_at <= db_now(),
        values=_ended(),
        reason="deadline",
    )
    return None if expired is None else _after_end(session, expired)


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


def rescue(session: Session, job_id: str, *, backoff_seconds: float = 1.0) -> Transition | None:
    """Take a job from a worker whose lease has run out; ``None`` if it is not such a job."""
    job = _locked(session, get(session, job_id))
    ran_out = Job.lease_expires_at <= db_now()
    reason = f"the lease of {job.worker} ran out"
    if job.status is not JobStatus.RUNNING:
        return None
    if job.cancel_requested_at is not None:
        to, values = JobStatus.CANCELLED, _ended()
    elif job.expires_at is not None and session.scalar(select(db_now() >= job.expires_at)):
        to, values = JobStatus.EXPIRED, _ended()
    else:
        requeued = _requeue(session, job_id, ran_out, reason, backoff_seconds)
        if requeued is not None:
            return requeued
        to = JobStatus.FAILED
        values = {
            "error_code": "attempts_exhausted",
            "error_message": f"{reason}; all {job.max_attempts} attempts are used up",
            "failures": Job.failures + 1,
            **_ended(),
        }
    moved = _move(session, job_id, JobStatus.RUNNING, to, ran_out, values=values, reason=reason)
    return None if moved is None else _after_end(session, moved)


# --- the parts -------------------------------------------------------------------------------


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


def _move(
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


def _requeue(
    session: Session,
    job_id: str,
    guard: ColumnElement[bool],
    reason: str,
    backoff_seconds: float,
) -> Transition | None:
    """A counted attempt is over: queue the job again if attempts are left, later each time."""
    failures = session.scalar(select(Job.failures).where(Job.id == job_id)) or 0
    delay = min(backoff_seconds * 2**failures, max(backoff_seconds, LONGEST_BACKOFF))
    job = _move(
        session,
        job_id,
        JobStatus.RUNNING,
        JobStatus.QUEUED,
        guard,
        Job.failures + 1 < Job.max_attempts,
        Job.cancel_requested_at.is_(None),
        values={**_queued(delay), "failures": Job.failures + 1},
        reason=reason,
    )
    # It is published by the maintenance loop, when its back-off is over.
    return None if job is None else Transition(job)


def _cancel_if_asked(session: Session, job_id: str, guard: ColumnElement[bool]) -> Job | None:
    """End a running job that was asked to stop and has stopped, for whatever reason."""
    return _move(
        session,
        job_id,
        JobStatus.RUNNING,
        JobStatus.CANCELLED,
        guard,
        Job.cancel_requested_at.is_not(None),
        values=_ended(),
        reason="cancelled",
    )


def _after_end(session: Session, job: Job) -> Transition:
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
    return _move(
        session,
        unfinished.id,
        JobStatus.WAITING,
        JobStatus.QUEUED,
        values=_queued(),
        reason="the earlier turn ended",
    )


def _locked(session: Session, job: Job) -> Job:
    """Lock the job's row, its session first, and read it again."""
    if job.session_id is not None:
        sessions.lock(session, job.session_id)
    return session.scalars(
        select(Job)
        .where(Job.id == job.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()


def _queued(delay_seconds: float = 0.0) -> dict[str, Any]:
    """Columns of a job that enters ``queued``, to run not before `delay_seconds` from now."""
    return {
        "worker": None,
        "lease_expires_at": None,
        "publishes": 0,
        "run_after": db_now(delay_seconds) if delay_seconds else None,
        "publish_at": db_now(delay_seconds or PUBLISH_GRACE_SECONDS),
    }


def _ended() -> dict[str, Any]:
    """Columns of a job that enters a terminal state."""
    return {
        "finished_at": db_now(),
        "lease_expires_at": None,
        "publish_at": None,
        "run_after": None,
    }


def _error(error: VisqError) -> dict[str, Any]:
    return {
        "error_code": error.code,
        "error_message": error.message,
        "error_param": error.param,
    }


def _seconds_left(deadline: datetime | None, now: datetime) -> float | None:
    return None if deadline is None else (deadline - now).total_seconds()
