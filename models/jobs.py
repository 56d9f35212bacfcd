"""The life of a job: the transitions of ``jobs.status``, each one guarded UPDATE.

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
maintenance loop publishes what a crash left behind. What becomes of a job whose lease has run out
is in `models.leases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import bindparam, exists, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from models import batches, sessions
from models.database import db_now, fetch
from models.moves import (
    ALONE,
    END,
    ENDED,
    FAIL,
    GIVE_UP,
    PENDING,
    QUEUE,
    QUEUED,
    REQUEUE,
    REQUEUE_AFTER_CRASH,
    UNFINISHED,
    Move,
    after_end,
    locked,
    move,
    moving,
    requeue,
    to_publish,
)
from models.outcomes import (
    Cancelled,
    Claim,
    Expired,
    Failed,
    HandedBack,
    Outcome,
    Remembered,
    Renewed,
    Succeeded,
    Transition,
    Work,
)
from models.tables import Batch, Job, JobEvent, Tenant, has_status
from visq.errors import EngineCrashed, InternalError, NotFound, NotRetriable
from visq.types import BatchStatus, JobStatus, Prompt

# --- a run: claim, renew, finish -------------------------------------------------------------


_BATCH_IS_ENDING: Final = exists().where(
    Batch.id == Job.batch_id, Batch.status == BatchStatus.CANCELLING
)
_CLAIM_GUARDS: Final = (
    Job.cancel_requested_at.is_(None),
    or_(Job.run_after.is_(None), Job.run_after <= db_now()),
    or_(Job.expires_at.is_(None), Job.expires_at > db_now()),
    or_(Job.batch_id.is_(None), ~_BATCH_IS_ENDING),
)
CLAIM_VALUES: Final[dict[str, Any]] = {
    "attempt": Job.attempt + 1,
    "worker": bindparam("claimed_by"),
    "lease_expires_at": db_now("lease_seconds"),
    "started_at": func.coalesce(Job.started_at, db_now()),
    "publish_at": None,
    "run_after": None,
}
CLAIM_GUARDS: Final = (*_CLAIM_GUARDS, ~ALONE)
"""Of a job that may run among others."""
_CLAIM: Final = moving(*CLAIM_GUARDS, **CLAIM_VALUES)
_CLAIM_ALONE: Final = moving(*_CLAIM_GUARDS, ALONE, **CLAIM_VALUES)
_STOP_FOR: Final = (
    update(Job)
    .where(Job.id == bindparam("job_id"), Job.status == JobStatus.QUEUED, ALONE, *_CLAIM_GUARDS)
    .values(publish_at=db_now("seconds"))
    .returning(Job.id)
    .execution_options(synchronize_session=False)
)
_TENANT_AND_TIME: Final = select(Tenant.name, db_now()).where(Tenant.id == bindparam("tenant_id"))


def claim(
    session: Session, job_id: str, *, worker: str, lease_seconds: float, alone: bool = False
) -> Work | None:
    """Take a queued job; ``None`` if it is not there to take (a repeated or early message).

    :param alone: the worker holds no other job, and will take none until this one has ended. Jobs
        with which engines or workers died (`SHARED_CRASHES`) are taken in this way, and only they.
    """
    job = move(
        session,
        _CLAIM_ALONE if alone else _CLAIM,
        job_id,
        JobStatus.QUEUED,
        JobStatus.RUNNING,
        reason=None,
        claimed_by=worker,
        lease_seconds=lease_seconds,
    )
    if job is None:
        return None
    tenant, now = fetch(session, _TENANT_AND_TIME, {"tenant_id": job.tenant_id}).one()
    try:
        return work_of(session, job, tenant, now)
    except ValidationError as error:
        # Of another version. If it were raised, the job would be claimed again for ever.
        unreadable = InternalError(f"what is stored of this job cannot be read: {error}")
        finish(session, Claim(job.id, job.attempt, job.session_id), Failed(unreadable))
        return None


def stop_for(session: Session, job_id: str, *, seconds: float) -> bool:
    """Whether the job is there to be taken alone. If so, this worker stops for it, and it is not
    published again for `seconds`: other workers need not stop as well."""
    row = session.execute(_STOP_FOR, {"job_id": job_id, "seconds": seconds})
    return row.one_or_none() is not None


def work_of(session: Session, job: Job, tenant: str, now: datetime) -> Work:
    """What a run needs of a job that it has claimed."""
    history: list[Remembered] = []
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
        dedupe_key=job.dedupe_key,
        prompt=Prompt.model_validate(request),
        accept_changed_images=accept_changed,
        history=history,
        expires_in=_seconds_left(job.expires_at, now),
    )


_RENEW: Final = (
    update(Job)
    .where(
        tuple_(Job.id, Job.attempt).in_(bindparam("held", expanding=True)),
        Job.status == JobStatus.RUNNING,
    )
    .values(lease_expires_at=db_now("lease_seconds"))
    .returning(Job.id, Job.cancel_requested_at)
    .execution_options(synchronize_session=False)
)


def renew(session: Session, claims: Sequence[Claim], *, lease_seconds: float) -> list[Renewed]:
    """Extend the leases of a worker's claims, in one UPDATE. A claim that is not in the answer is
    lost: its job has gone on without this run."""
    by_id = {claim.job_id: claim for claim in claims}
    held = [(claim.job_id, claim.attempt) for claim in claims]
    rows = fetch(session, _RENEW, {"held": held, "lease_seconds": lease_seconds})
    return [
        Renewed(by_id[job_id], cancel_requested_at is not None)
        for job_id, cancel_requested_at in rows
    ]


_HELD: Final = select(Job.id, Job.attempt, Job.session_id).where(
    Job.status == JobStatus.RUNNING, Job.worker == bindparam("held_by")
)


def claims_of(session: Session, worker: str) -> list[Claim]:
    """The claims that the database knows of a worker."""
    return [Claim(*row) for row in fetch(session, _HELD, {"held_by": worker})]


_FENCE: Final = Job.attempt == bindparam("held_attempt")
_ASKED_TO_STOP: Final = Job.cancel_requested_at.is_not(None)

SUCCEED: Final = moving(_FENCE, result=bindparam("answer"), **ENDED)
"""Its parameters are of the claim and of the result."""
_FAIL_RUN: Final = FAIL.where(_FENCE)
_GIVE_UP_RUN: Final = GIVE_UP.where(_FENCE)
_END_RUN: Final = END.where(_FENCE)
_REQUEUE_RUN: Final = REQUEUE.where(_FENCE)
_REQUEUE_CRASHED: Final = REQUEUE_AFTER_CRASH.where(_FENCE)
_HAND_BACK: Final = QUEUE.where(_FENCE, ~_ASKED_TO_STOP)
_STOP_IF_ASKED: Final = END.where(_FENCE, _ASKED_TO_STOP)


def finish(session: Session, claim: Claim, outcome: Outcome) -> Transition | None:
    """End the run, in one transaction with everything that follows from it.

    Returns ``None`` if the claim is lost: then nothing was written, and nothing may be published.
    """
    conversation = None if claim.session_id is None else sessions.lock(session, claim.session_id)

    def leave(how: Move, to_status: JobStatus, reason: str, **parameters: Any) -> Job | None:
        """The run's own move."""
        return move(
            session,
            how,
            claim.job_id,
            JobStatus.RUNNING,
            to_status,
            reason=reason,
            held_attempt=claim.attempt,
            **parameters,
        )

    match outcome:
        case Succeeded(result):
            answer = result.model_dump(mode="json")
            job = leave(SUCCEED, JobStatus.SUCCEEDED, result.finish_reason, answer=answer)
            if job is not None and conversation is not None and conversation.deleted_at is None:
                sessions.append(session, conversation.id, job, outcome)
        case Failed(error, backoff_seconds):
            job = None
            if error.retryable:
                requeued = requeue(
                    session,
                    _REQUEUE_CRASHED if isinstance(error, EngineCrashed) else _REQUEUE_RUN,
                    claim.job_id,
                    reason=str(error),
                    backoff_seconds=backoff_seconds,
                    held_attempt=claim.attempt,
                )
                if requeued is not None:
                    return requeued
                job = leave(_STOP_IF_ASKED, JobStatus.CANCELLED, "cancelled")
            if job is None:
                job = leave(
                    _GIVE_UP_RUN if error.retryable else _FAIL_RUN,
                    JobStatus.FAILED,
                    error.code,
                    code=error.code,
                    message=error.message,
                    param=error.param,
                )
        case Cancelled():
            job = leave(_END_RUN, JobStatus.CANCELLED, "cancelled")
        case Expired():
            job = leave(_END_RUN, JobStatus.EXPIRED, "deadline")
        case HandedBack(reason):
            job = leave(_HAND_BACK, JobStatus.QUEUED, reason)
            if job is not None:
                return Transition(job, queued=[to_publish(job)])
            # Nobody claims a job that was asked to stop: in the queue it would stay for ever.
            job = leave(_STOP_IF_ASKED, JobStatus.CANCELLED, "cancelled")
    return None if job is None else after_end(session, job)


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
    job = locked(session, get(session, job_id))
    if job.status in PENDING:
        cancelled = move(session, END, job_id, job.status, JobStatus.CANCELLED, reason="cancelled")
        assert cancelled is not None, "the row was locked"
        return after_end(session, cancelled)
    if job.status is JobStatus.RUNNING:
        session.execute(
            update(Job)
            .where(Job.id == job_id, Job.status == JobStatus.RUNNING)
            .values(cancel_requested_at=func.coalesce(Job.cancel_requested_at, db_now())),
            execution_options={"synchronize_session": False},
        )
    return Transition(job)


_RETRY: Final = moving(
    failures=0,
    error_code=None,
    error_message=None,
    error_param=None,
    dead_at=None,
    finished_at=None,
    cancel_requested_at=None,
    expires_at=db_now("expires_in_seconds"),
    **QUEUED,
)


def retry(session: Session, job_id: str) -> Transition:
    """Queue a failed job again, with all its attempts, and as much time until its deadline as it
    was given at first.

    :raises NotFound: no such job.
    :raises NotRetriable: it has not failed, it is a turn that later turns have followed, or its
        batch is being cancelled.
    """
    job = locked(session, get(session, job_id))
    if job.status is not JobStatus.FAILED:
        raise NotRetriable(f"job {job_id} is {job.status}; only a failed job can be retried")
    if not job.request:
        raise NotRetriable(
            f"job {job_id} is a line of a batch's input that asks nothing that can be done: "
            f"{job.error_message}"
        )
    if job.session_id is not None:
        current = sessions.get(session, job.session_id)
        if current.turns != job.turn:
            raise NotRetriable(
                f"job {job_id} is turn {job.turn} of {job.session_id}, and later turns have "
                "followed; submit it as a new turn"
            )
    if job.batch_id is not None and not batches.uncount_failed(session, job.batch_id):
        raise NotRetriable(f"job {job_id} is of {job.batch_id}, which is being cancelled")
    queued = move(
        session,
        _RETRY,
        job_id,
        JobStatus.FAILED,
        JobStatus.QUEUED,
        reason="retried by a call",
        expires_in_seconds=_seconds_left(job.expires_at, _last_queued_by_a_call(session, job)),
    )
    assert queued is not None, "the row was locked"
    return Transition(queued, queued=[to_publish(queued)])


_LAST_RETRY: Final = select(func.max(JobEvent.at)).where(
    JobEvent.job_id == bindparam("job_id"), JobEvent.from_status == JobStatus.FAILED
)


def _last_queued_by_a_call(session: Session, job: Job) -> datetime:
    """When it was submitted, or last retried: the deadline was counted from there."""
    return session.scalar(_LAST_RETRY, {"job_id": job.id}) or job.created_at


def delete_session(session: Session, session_id: str) -> list[Transition]:
    """Delete a session and its history; turns that have not ended are cancelled.

    :raises NotFound: no such session.
    """
    current = sessions.get(session, session_id)
    sessions.forget(session, current)
    unfinished = session.scalars(
        select(Job.id)
        .where(Job.session_id == session_id, Job.status.in_(UNFINISHED))
        .order_by(Job.turn.desc())  # the last first, so that none is released on the way
    ).all()
    return [cancel(session, job_id) for job_id in unfinished]


# --- from the maintenance loop: deadlines -----------------------------------------------------


def past_deadline(session: Session, limit: int) -> list[str]:
    """Ids of waiting and queued jobs whose deadline has passed."""
    return list(
        session.scalars(
            select(Job.id)
            .where(has_status(*PENDING), Job.expires_at <= db_now())
            .order_by(Job.expires_at)
            .limit(limit)
        )
    )


_EXPIRE: Final = END.where(Job.expires_at <= db_now())


def expire(session: Session, job_id: str) -> Transition | None:
    """End a waiting or queued job whose deadline has passed; ``None`` if it is not one."""
    job = locked(session, get(session, job_id))
    if job.status not in PENDING:
        return None
    expired = move(session, _EXPIRE, job_id, job.status, JobStatus.EXPIRED, reason="deadline")
    return None if expired is None else after_end(session, expired)


def _seconds_left(deadline: datetime | None, now: datetime) -> float | None:
    return None if deadline is None else (deadline - now).total_seconds()
