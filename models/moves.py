"""The parts of which a job's transitions (`models.jobs`) are made: the one UPDATE of ``status``,
what follows from an end, and the columns that each kind of state sets.

The statements of a run are constants: SQLAlchemy takes longer to build one than to run it
(bench/results/sql-per-job.md). What differs from call to call is a `bindparam`; its name is not
that of a column, since such a parameter of an UPDATE would set the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import ColumnElement, bindparam, case, insert, inspect, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from models import batches, outbox, sessions
from models.base import table
from models.database import db_now, fetch
from models.outcomes import QueuedJob, Transition
from models.tables import Job, JobEvent
from visq.types import JobStatus

PUBLISH_GRACE_SECONDS = 2.0
"""How long the process that queued a job has to publish it before the maintenance loop does."""

LONGEST_BACKOFF = 300.0
"""Seconds before another attempt at most, unless the first wait is longer already."""

SHARED_CRASHES: Final = 2
"""So many times an engine or a worker may die with a job among others: it is no failure of the job,
since nobody knows which of them was to blame. From then on the job runs alone, and a death is its
own failure."""

PENDING = (JobStatus.WAITING, JobStatus.QUEUED)
UNFINISHED: Final = (*PENDING, JobStatus.RUNNING)

_COLUMNS: Final = {
    attribute.key: getattr(Job, attribute.key) for attribute in inspect(Job).column_attrs
}
"""Of a `Job`, by the names of its attributes."""

Move: TypeAlias = ReturningUpdate[*tuple[Any, ...]]
"""An UPDATE of ``status`` (`moving`); ``.where`` adds guards to it."""

ENDED: Final[dict[str, Any]] = {
    "finished_at": db_now(),
    "lease_expires_at": None,
    "publish_at": None,
    "run_after": None,
}
"""Columns of a job that enters a terminal state."""

QUEUED: Final[dict[str, Any]] = {
    "worker": None,
    "lease_expires_at": None,
    "publishes": 0,
    "run_after": None,
    "publish_at": db_now(PUBLISH_GRACE_SECONDS),
}
"""Columns of a job that enters ``queued``."""


_ONE: Final = Job.id == bindparam("job_id")


def moving(*guards: ColumnElement[bool], which: ColumnElement[bool] = _ONE, **values: Any) -> Move:
    """An UPDATE of ``status`` that also sets `values`, if `guards` hold; `move` runs it."""
    return (
        update(Job)
        .where(which, Job.status == bindparam("from_status"), *guards)
        .values(status=bindparam("to_status"), **values)
        .returning(*_COLUMNS.values())
        .execution_options(synchronize_session=False)
    )


END: Final = moving(**ENDED)

QUEUE: Final = moving(**QUEUED)

_ATTEMPTS_LEFT: Final = Job.failures + 1 < Job.max_attempts
_LATER: Final = QUEUED | {
    "run_after": db_now("run_after_seconds"),
    "publish_at": db_now("publish_seconds"),
}

REQUEUE: Final = moving(
    _ATTEMPTS_LEFT,
    Job.cancel_requested_at.is_(None),
    **_LATER | {"failures": Job.failures + 1},
)
"""After a failure of the job; made by `requeue`."""

ALONE: Final = Job.crashes >= SHARED_CRASHES
"""Whether the job runs, or ran, without others beside it."""

REQUEUE_AFTER_CRASH: Final = moving(
    or_(~ALONE, _ATTEMPTS_LEFT),
    Job.cancel_requested_at.is_(None),
    **_LATER
    | {
        "crashes": Job.crashes + 1,
        "failures": case((ALONE, Job.failures + 1), else_=Job.failures),
    },
)
"""After the death of the engine or of the worker; made by `requeue`."""

_FAILED: Final[dict[str, Any]] = {
    "failures": Job.failures + 1,
    "error_code": bindparam("code"),
    "error_message": bindparam("message"),
    "error_param": bindparam("param"),
    **ENDED,
}

FAIL: Final = moving(**_FAILED)
"""Its parameters are of the error."""

GIVE_UP: Final = moving(**_FAILED, dead_at=db_now())
"""`FAIL` for a reason that may pass: the job becomes a dead letter."""

_RECORD: Final = insert(table(JobEvent))


def move(
    session: Session,
    how: Move,
    job_id: str,
    from_status: JobStatus,
    to_status: JobStatus,
    *,
    reason: str | None,
    **parameters: Any,
) -> Job | None:
    """Change ``status``, guarded, and record it; ``None`` if a guard did not hold.

    `parameters` are what `how` has beside those of every move. The job is no object of the session:
    it shows the row as this move left it.
    """
    for job in moved(session, how, from_status, to_status, job_id=job_id, **parameters):
        record(session, job, from_status, reason)
        return job
    return None


def moved(
    session: Session, how: Move, from_status: JobStatus, to_status: JobStatus, **parameters: Any
) -> list[Job]:
    """The jobs whose ``status`` was changed; it is still to be recorded."""
    rows = fetch(session, how, parameters | {"from_status": from_status, "to_status": to_status})
    return [Job(**dict(zip(_COLUMNS, row, strict=True))) for row in rows.all()]


def record(session: Session, job: Job, from_status: JobStatus | None, reason: str | None) -> None:
    """Write the transition that brought `job` to its present status."""
    record_all(session, [(job, from_status, reason)])


def record_all(
    session: Session, transitions: Sequence[tuple[Job, JobStatus | None, str | None]]
) -> None:
    """`record` for several jobs: (job, state before, reason)."""
    rows = [
        {
            "tenant_id": job.tenant_id,
            "job_id": job.id,
            "from_status": from_status,
            "to_status": job.status,
            "attempt": job.attempt,
            "worker": job.worker,
            "reason": reason,
        }
        for job, from_status, reason in transitions
    ]
    session.execute(_RECORD, rows)


_FAILURES: Final = select(Job.failures + Job.crashes).where(Job.id == bindparam("job_id"))


def requeue(
    session: Session,
    how: Move,
    job_id: str,
    *,
    reason: str,
    backoff_seconds: float,
    **parameters: Any,
) -> Transition | None:
    """An attempt went wrong: queue the job again if attempts are left, later each time.

    `how` is `REQUEUE` or `REQUEUE_AFTER_CRASH`, with the guards of the caller.
    """
    failures = session.scalar(_FAILURES, {"job_id": job_id}) or 0
    delay = min(backoff_seconds * 2**failures, max(backoff_seconds, LONGEST_BACKOFF))
    job = move(
        session,
        how,
        job_id,
        JobStatus.RUNNING,
        JobStatus.QUEUED,
        reason=reason,
        run_after_seconds=delay or None,  # at once: NULL
        publish_seconds=delay or PUBLISH_GRACE_SECONDS,
        **parameters,
    )
    # It is published by the maintenance loop, when its back-off is over.
    return None if job is None else Transition(job)


def after_end(session: Session, job: Job) -> Transition:
    """What follows from a job's end: the session's next turn, the batch's counters, the event."""
    queued = []
    if job.session_id is not None:
        following = release_next_turn(session, job.session_id)
        if following is not None:
            queued.append(to_publish(following))
    events = outbox.add_results(session, [job])
    if job.batch_id is not None:
        events += batches.count_ends(session, job.batch_id, [job])
    return Transition(job, queued=queued, events=events)


def to_publish(job: Job) -> QueuedJob:
    """What the broker must be told of a job that was queued."""
    return QueuedJob(job.id, job.lane, alone=job.crashes >= SHARED_CRASHES)


_FIRST_UNFINISHED: Final = (
    select(Job.id, Job.status)
    .where(
        Job.session_id == bindparam("session_id"),
        Job.status.in_(UNFINISHED),
    )
    .order_by(Job.turn)
    .limit(1)
)


def release_next_turn(session: Session, session_id: str) -> Job | None:
    """Queue the session's first waiting turn, unless a turn is still to end (lock held)."""
    first = fetch(session, _FIRST_UNFINISHED, {"session_id": session_id}).one_or_none()
    if first is None or first.status is not JobStatus.WAITING:
        return None
    return move(
        session,
        QUEUE,
        first.id,
        JobStatus.WAITING,
        JobStatus.QUEUED,
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
