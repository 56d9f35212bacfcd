"""Questions that the API asks: lists with cursors, a job's history, and why a job waits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy import Select, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, defer

from models.database import db_now
from models.moves import UNFINISHED
from models.tables import Batch, ChatSession, Image, Job, JobEvent, Message, Tenant, has_status
from visq.ids import new_id
from visq.types import JobResult, JobStatus, Lane, Usage, WaitingFor


def ensure_tenants(session: Session, names: Sequence[str]) -> dict[str, str]:
    """Name -> id of the tenants, created where missing; two processes may start at once."""
    for name in names:
        if session.scalar(select(Tenant.id).where(Tenant.name == name)) is None:
            with suppress(IntegrityError), session.begin_nested():
                session.add(Tenant(id=new_id("ten"), name=name))
    return tenant_ids(session, names)


def tenant_ids(session: Session, names: Sequence[str]) -> dict[str, str]:
    """Name -> id of those tenants that are there."""
    rows = session.execute(select(Tenant.name, Tenant.id).where(Tenant.name.in_(names)))
    return dict(rows.all())


def list_jobs(
    session: Session,
    *,
    status: JobStatus | None = None,
    session_id: str | None = None,
    batch_id: str | None = None,
    lane: Lane | None = None,
    before: str | None = None,
    limit: int,
) -> list[Job]:
    """Jobs, newest first, older than the id `before`."""
    query: Select[tuple[Job]] = select(Job)
    if status is not None:
        query = query.where(Job.status == status)
    if session_id is not None:
        query = query.where(Job.session_id == session_id)
    if batch_id is not None:
        query = query.where(Job.batch_id == batch_id)
    if lane is not None:
        query = query.where(Job.lane == lane)
    if before is not None:
        query = query.where(Job.id < before)
    return list(session.scalars(query.order_by(Job.id.desc()).limit(limit)))


def job_events(session: Session, job_id: str) -> list[JobEvent]:
    """The job's transitions, oldest first."""
    return list(
        session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id))
    )


def batch_results(session: Session, batch_id: str, *, after_position: int, limit: int) -> list[Job]:
    """Items of a batch that have ended, in input order, after `after_position`. (Without their
    requests: a thousand of them may be gigabytes.)"""
    return list(
        session.scalars(
            select(Job)
            .where(
                Job.batch_id == batch_id,
                Job.position > after_position,
                Job.finished_at.is_not(None),
            )
            .order_by(Job.position)
            .limit(limit)
            .options(defer(Job.request, raiseload=True))
        )
    )


def answered_before(
    session: Session, batch_id: str, dedupe_key: str, job_id: str
) -> JobResult | None:
    """The answer to an item of the batch that asked for the same as the item `job_id`."""
    row = session.execute(
        select(Job.custom_id, Job.result)
        .where(
            Job.batch_id == batch_id,
            Job.dedupe_key == dedupe_key,
            Job.id != job_id,
            has_status(JobStatus.SUCCEEDED),
        )
        .order_by(Job.position)
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    custom_id, result = row
    answer = JobResult.model_validate(result)
    # What it took is counted where it was done.
    origin = answer.duplicate_of or custom_id
    return answer.model_copy(update={"duplicate_of": origin, "usage": Usage()})


def list_batches(session: Session, *, before: str | None = None, limit: int) -> list[Batch]:
    query = select(Batch)
    if before is not None:
        query = query.where(Batch.id < before)
    return list(session.scalars(query.order_by(Batch.id.desc()).limit(limit)))


def list_sessions(session: Session, *, before: str | None = None, limit: int) -> list[ChatSession]:
    query = select(ChatSession).where(ChatSession.deleted_at.is_(None))
    if before is not None:
        query = query.where(ChatSession.id < before)
    return list(session.scalars(query.order_by(ChatSession.id.desc()).limit(limit)))


def session_messages(
    session: Session, session_id: str, *, after: tuple[int, int], limit: int
) -> list[Message]:
    """The session's history in order, after the message at ``(turn, position)``."""
    turn, position = after
    return list(
        session.scalars(
            select(Message)
            .where(
                Message.session_id == session_id,
                (Message.turn > turn) | ((Message.turn == turn) & (Message.position > position)),
            )
            .order_by(Message.turn, Message.position)
            .limit(limit)
        )
    )


def image_by_id(session: Session, image_id: str) -> Image | None:
    return session.scalars(select(Image).where(Image.id == image_id)).one_or_none()


def waiting_for(session: Session, job: Job, *, workers_alive: bool) -> WaitingFor | None:
    """Why `job` is not running, or ``None`` if it is, or has ended.

    Counts the jobs of all tenants: call it on a session that is not scoped to one.
    """
    if job.status is JobStatus.WAITING:
        earlier = session.scalar(
            select(Job.id)
            .where(
                Job.session_id == job.session_id,
                Job.turn < job.turn,
                Job.status.in_(UNFINISHED),
            )
            .order_by(Job.turn)
            .limit(1)
        )
        return WaitingFor(reason="turn", job_id=earlier)
    if job.status is not JobStatus.QUEUED:
        return None
    if job.run_after is not None and session.scalar(select(db_now() < job.run_after)):
        return WaitingFor(reason="retry", at=job.run_after)
    if not workers_alive:
        return WaitingFor(reason="worker")
    before = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(Job.lane == job.lane, Job.status == JobStatus.QUEUED, Job.id < job.id)
    )
    return WaitingFor(reason="lane", position=before or 0)
