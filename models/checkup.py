"""What `visq doctor` asks the database: is something late that the design says cannot be?

Every question has its answer from an index, or from rows that a healthy system has few of,
and none locks a row. Ages go by the database's clock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session, aliased

from models import dead_letters, revision
from models.connections import checked_url
from models.database import Database, db_now
from models.moves import PENDING, UNFINISHED
from models.tables import Job, JobEvent, Outbox, has_status
from visq.errors import ConfigurationError, Unavailable
from visq.types import JobStatus

EXAMPLES: Final = 3
"""Ids that are named of what is stuck."""

OLDEST_QUEUED: Final = 200
"""Queued jobs that are looked at: the oldest ones, as those are what is stuck."""


@dataclass(frozen=True)
class Late:
    """Rows that are late, and for how long the first of them is."""

    count: int = 0
    seconds: float = 0.0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clock:
    """The database's clock against that of this machine."""

    ahead_seconds: float
    """By how much the database's is ahead; negative: behind."""
    uncertain_seconds: float
    """How far off that can be, as the answer took its time."""


@dataclass(frozen=True)
class Checkup:
    """What was found. Those of `Late` that name the maintenance loop are its work."""

    clock: Clock
    queued: Late
    """Jobs that may run and that the broker was told of, by the time since they may."""
    unpublished: Late
    """Queued jobs that the maintenance loop should have published."""
    expired: Late
    """Waiting and queued jobs that it should have ended at their deadline."""
    lost: Late
    """Running jobs whose lease ran out, which it should have taken from their worker."""
    blocked: Late
    """Turns that wait although every earlier turn of their session has ended: a defect."""
    untold: Late
    """Ended jobs whose result event has not been published, by the time since their end."""
    most_tries: int
    """How often the publishing of one of those was tried."""
    dead_letters: Mapping[str, int]
    """By error code."""


def connect(url: str) -> Database:
    """The database at `url`, which must be there: SQLite would make an empty one.

    :raises ConfigurationError: there is none.
    """
    parsed = checked_url(url)
    path = Path(parsed.database or "")
    if parsed.get_backend_name() == "sqlite" and not path.is_file():
        what = f"{path} is no file" if path.exists() else f"there is no database {path}"
        raise ConfigurationError(what)
    try:
        return Database(url, pool_size=1)
    except ArgumentError as error:  # `sqlite+nonsense:`
        raise ConfigurationError("VISQ_DATABASE_URL names a driver that is not there") from error


def ask_revision(database: Database) -> str | None:
    """Its revision; ``None`` before the first migration.

    :raises Unavailable: it cannot be asked, whyever.
    """
    try:
        return database.read(revision.current)
    except Unavailable as error:
        # The driver knows more: a refused password, a name that does not resolve.
        raise Unavailable(in_one_line(error.__cause__ or error)) from error
    except DBAPIError as error:
        raise Unavailable(in_one_line(error)) from error


def look(session: Session, *, late_seconds: float, untold_seconds: float) -> Checkup:
    """
    :param late_seconds: what the maintenance loop does at once is late after so long.
    :param untold_seconds: a result event is late after so long.
    """
    late = db_now(-late_seconds)
    untold = Outbox.created_at <= db_now(-untold_seconds)
    return Checkup(
        queued=_queued(session),
        unpublished=_late(
            session, Job.publish_at, Job.status == JobStatus.QUEUED, Job.publish_at <= late
        ),
        expired=_late(session, Job.expires_at, has_status(*PENDING), Job.expires_at <= late),
        lost=_late(
            session,
            Job.lease_expires_at,
            Job.status == JobStatus.RUNNING,
            Job.lease_expires_at <= late,
        ),
        blocked=_blocked(session),
        untold=_ages(session, select(Outbox.id.label("id"), Outbox.created_at).where(untold)),
        most_tries=session.scalar(select(func.max(Outbox.tries)).where(untold)) or 0,
        dead_letters=dead_letters.count_by_error(session),
        clock=_clock(session),
    )


def _late(session: Session, since: Any, *which: ColumnElement[bool]) -> Late:
    return _ages(session, select(Job.id.label("id"), since).where(*which))


def _ages(session: Session, rows: Select[Any, Any]) -> Late:
    """Of a query for (id, since when it is late)."""
    found = rows.subquery()
    since = found.columns[1]
    count, first, now = session.execute(
        select(func.count(), func.min(since), db_now()).select_from(found)
    ).one()
    if not count:
        return Late()
    ids = session.scalars(select(found.c.id).order_by(since, found.c.id).limit(EXAMPLES)).all()
    return Late(count, _seconds(first, now), tuple(ids))


def _queued(session: Session) -> Late:
    due = and_(
        has_status(JobStatus.QUEUED),
        Job.publish_at.is_not(None),  # else its batch holds it back
        or_(Job.run_after.is_(None), Job.run_after <= db_now()),
    )
    count = session.scalar(select(func.count()).select_from(Job).where(due)) or 0
    if not count:
        return Late()
    # By their ids, SQLite would read the whole table in that order.
    by_age = (Job.created_at, Job.id)
    oldest = select(Job.id, Job.run_after).where(due).order_by(*by_age).limit(OLDEST_QUEUED)
    candidates = oldest.subquery()
    last_event = (
        select(func.max(JobEvent.at))
        .where(JobEvent.job_id == candidates.c.id)
        .scalar_subquery()
        .correlate(candidates)
    )
    since = func.coalesce(candidates.c.run_after, last_event).label("since")
    looked_at = _ages(session, select(candidates.c.id.label("id"), since))
    return Late(max(count, looked_at.count), looked_at.seconds, looked_at.examples)


def _blocked(session: Session) -> Late:
    earlier = aliased(Job)
    unfinished = exists().where(
        earlier.session_id == Job.session_id,
        earlier.turn < Job.turn,
        earlier.status.in_(UNFINISHED),
    )
    # Twice, so that the index of those that wait is used.
    waits = (has_status(*PENDING), Job.status == JobStatus.WAITING)
    return _late(session, Job.created_at, *waits, ~unfinished)


def _clock(session: Session) -> Clock:
    before = time.time()
    now = session.scalars(select(db_now())).one()
    after = time.time()
    return Clock(now.timestamp() - (before + after) / 2, (after - before) / 2)


def _seconds(since: datetime, now: datetime) -> float:
    return max(0.0, (now - since).total_seconds())


def in_one_line(error: BaseException) -> str:
    """What the driver says, without its hints."""
    original = error.orig if isinstance(error, DBAPIError) else error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    return lines[0] if lines else type(original).__name__
