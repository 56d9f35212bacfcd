"""What the latest jobs took: from it the cost of others is estimated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from models.database import db_now
from models.tables import Job, JobEvent
from visq.ids import earliest_id
from visq.types import JobStatus, Lane, Prompt

LATEST_JOBS: Final = 200
LOOKED_THROUGH: Final = 200_000
"""No more jobs are looked through for them: all before may be queued."""
LATEST_RUNS: Final = 500
RECENT_SECONDS: Final = 600.0
RECENT_EVENTS: Final = 50_000
"""No more transitions are looked through for runs: there is no index by their time."""


@dataclass(frozen=True)
class Asked:
    """A prompt without a history, and the tokens that it was."""

    prompt: Prompt
    prompt_tokens: int


@dataclass(frozen=True)
class Run:
    """One that succeeded."""

    started_at: datetime
    finished_at: datetime
    worker: str | None


def latest_prompts(session: Session) -> list[Asked]:
    """Of the latest jobs that succeeded, outside of sessions (whose prompts have a history)."""
    newest_first = select(Job.id).order_by(Job.id.desc())
    oldest = session.scalar(newest_first.offset(LOOKED_THROUGH).limit(1)) or ""
    rows = session.execute(
        select(Job.request, Job.result)
        .where(Job.id > oldest, Job.status == JobStatus.SUCCEEDED, Job.session_id.is_(None))
        .order_by(Job.id.desc())
        .limit(LATEST_JOBS)
    )
    return [
        Asked(_prompt(request), tokens)
        for request, result in rows
        # Answers that were made for another item used none.
        if result is not None and (tokens := result["usage"]["prompt_tokens"])
    ]


def latest_runs(session: Session) -> list[Run]:
    """Of the last minutes, of all tenants: call it on a session that is not scoped to one."""
    newest = session.scalar(select(func.max(JobEvent.id))) or 0
    rows = session.execute(
        select(Job.started_at, Job.finished_at, JobEvent.worker)
        .join(Job, Job.id == JobEvent.job_id)
        .where(
            JobEvent.id > newest - RECENT_EVENTS,
            JobEvent.to_status == JobStatus.SUCCEEDED,
            JobEvent.at > db_now(-RECENT_SECONDS),
        )
        .order_by(JobEvent.id.desc())
        .limit(LATEST_RUNS)
    )
    return [Run(start, end, worker) for start, end, worker in rows if start and end]


def _prompt(request: dict[str, Any]) -> Prompt:
    return Prompt.model_validate({k: v for k, v in request.items() if k in Prompt.model_fields})


CHATS: Final = 500
"""No more of them are looked at."""


def chat_waits(session: Session, seconds: float) -> list[float]:
    """How long the chat jobs (those of the lane ``interactive``) of the last `seconds` waited for
    their start, in seconds; those that still wait, until now. Turns that wait for an earlier one
    of their session are not among them."""
    rows = session.execute(
        select(Job.created_at, Job.started_at, db_now())
        .where(
            # Ids begin with the time: the rows before are not looked at. (Clocks may differ.)
            Job.id > earliest_id("job", time.time() - seconds - CLOCKS_DIFFER_SECONDS),
            Job.lane == Lane.INTERACTIVE,
            Job.status != JobStatus.WAITING,
            or_(Job.turn.is_(None), Job.turn == 1),
            Job.created_at >= db_now(-seconds),
        )
        .order_by(Job.id.desc())
        .limit(CHATS)
    )
    return [((started or now) - created).total_seconds() for created, started, now in rows]


CLOCKS_DIFFER_SECONDS: Final = 60.0
