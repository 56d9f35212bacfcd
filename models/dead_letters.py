"""Dead letters: jobs that failed for a reason that may pass, with all their attempts used up.

A job becomes one in `models.jobs` (``jobs.dead_at``) and stays one until somebody retries or drops
it. They are an operator's to look at (`visq dead`): nothing here is scoped to a tenant.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import func, select, tuple_, update
from sqlalchemy.orm import Session

from models import jobs
from models.outcomes import Transition
from models.tables import Job, Tenant
from visq.errors import Conflict

_DEAD: Final = Job.dead_at.is_not(None)


@dataclass(frozen=True)
class DeadLetter:
    """What a list shows of one."""

    id: str
    tenant: str
    dead_at: datetime
    attempts: int
    """Claims in all, those after earlier retries and those that were handed back included."""
    error_code: str
    error_message: str
    session_id: str | None
    turn: int | None
    batch_id: str | None
    custom_id: str | None


_LETTERS: Final = select(
    Job.id,
    Tenant.name.label("tenant"),
    Job.dead_at,
    Job.attempt.label("attempts"),
    func.coalesce(Job.error_code, "").label("error_code"),
    func.coalesce(Job.error_message, "").label("error_message"),
    Job.session_id,
    Job.turn,
    Job.batch_id,
    Job.custom_id,
).join(Tenant, Tenant.id == Job.tenant_id)
"""The fields of a `DeadLetter`, by their names."""


def count(session: Session, most: int | None = None) -> int:
    """How many there are; counts no further than `most`."""
    found = select(Job.id).where(_DEAD).limit(most).subquery()
    return session.scalar(select(func.count()).select_from(found)) or 0


def count_by_error(session: Session) -> dict[str, int]:
    """Error code -> number, the most frequent first."""
    rows = session.execute(
        select(Job.error_code, func.count())
        .where(_DEAD)
        .group_by(Job.error_code)
        .order_by(func.count().desc(), Job.error_code)
    )
    return {code or "": number for code, number in rows}


def page(
    session: Session, *, after: tuple[datetime, str] | None = None, limit: int
) -> list[DeadLetter]:
    """Dead letters, the oldest first, after that with ``(dead_at, id)``."""
    query = _LETTERS.where(_DEAD).order_by(Job.dead_at, Job.id).limit(limit)
    if after is not None:
        query = query.where(tuple_(Job.dead_at, Job.id) > after)
    return [DeadLetter(**row._asdict()) for row in session.execute(query)]


def ids(session: Session) -> list[str]:
    """Ids of all of them, the oldest first."""
    return list(session.scalars(select(Job.id).where(_DEAD).order_by(Job.dead_at, Job.id)))


def get(session: Session, job_id: str) -> DeadLetter:
    """One of them; `models.jobs.get` has all that is stored of its job.

    :raises NotFound: no such job.
    :raises Conflict: it is no dead letter.
    """
    found = session.execute(_LETTERS.where(_DEAD, Job.id == job_id)).one_or_none()
    if found is not None:
        return DeadLetter(**found._asdict())
    job = jobs.get(session, job_id)
    why = "" if job.error_code is None else f" ({job.error_code})"
    raise Conflict(f"job {job_id} is no dead letter: it is {job.status}{why}")


def retry(session: Session, job_id: str) -> Transition:
    """Queue a dead letter again, with all its attempts.

    :raises NotFound: no such job.
    :raises Conflict: it is no dead letter, or cannot be retried any more (`models.jobs.retry`).
    """
    get(session, job_id)
    return jobs.retry(session, job_id)


def drop(session: Session, job_id: str) -> None:
    """Let go of a dead letter: the job stays ``failed``, as its client was told, and nothing else
    of it changes.

    :raises NotFound: no such job.
    :raises Conflict: it is no dead letter.
    """
    get(session, job_id)
    session.execute(
        update(Job).where(Job.id == job_id, _DEAD).values(dead_at=None),
        execution_options={"synchronize_session": False},
    )
