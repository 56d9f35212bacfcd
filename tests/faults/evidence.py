"""What the checker of a round reads, and what it finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, select
from sqlalchemy.orm import Session

from models.tables import Batch, BatchEnd, ChatSession, Job, JobEvent, Message, Outbox


@dataclass(frozen=True)
class Violation:
    """A promise that was broken."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


@dataclass
class Evidence:
    """What the world was told."""

    events: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """The CloudEvents from the result queue, by id of the job or batch, repeats and all."""
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What Redis has of the ended jobs, by job id."""
    objects: list[str] = field(default_factory=list)
    """What is in the object store, by name."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Those that batches have read and written."""
    unfinished_uploads: Sequence[str] = ()
    """Objects of which there are parts only."""
    lost_before: datetime | None = None
    """Redis has lost what it held at this time (the database's clock): of jobs that ended before
    it, no value need be there,"""
    events_in_redis: bool = True
    """and no event either, if Redis is also the broker."""


@dataclass
class Rows:
    """The database at the end of a round."""

    jobs: dict[str, Job]
    events: dict[str, list[JobEvent]]
    sessions: dict[str, ChatSession]
    messages: dict[str, list[Message]]
    batches: dict[str, Batch]
    ends: dict[str, list[tuple[int, str]]]
    """By batch: the numbers of the ends of its items, and their ids."""
    outbox: int
    running_elsewhere: int

    @classmethod
    def read(cls, connection: Connection, after: str) -> Rows:
        with Session(connection, expire_on_commit=False) as session:
            jobs = {job.id: job for job in session.scalars(select(Job).where(Job.id > after))}
            events: dict[str, list[JobEvent]] = defaultdict(list)
            for event in session.scalars(
                select(JobEvent).where(JobEvent.job_id > after).order_by(JobEvent.id)
            ):
                events[event.job_id].append(event)
            session_ids = {job.session_id for job in jobs.values() if job.session_id is not None}
            messages: dict[str, list[Message]] = defaultdict(list)
            for message in session.scalars(
                select(Message)
                .where(Message.session_id.in_(session_ids))
                .order_by(Message.turn, Message.position)
            ):
                messages[message.session_id].append(message)
            batch_ids = {job.batch_id for job in jobs.values() if job.batch_id is not None}
            ends: dict[str, list[tuple[int, str]]] = defaultdict(list)
            for end in session.scalars(
                select(BatchEnd)
                .where(BatchEnd.batch_id.in_(batch_ids))
                .order_by(BatchEnd.batch_id, BatchEnd.number)
            ):
                ends[end.batch_id].append((end.number, end.job_id))
            return cls(
                jobs=jobs,
                events=events,
                sessions={
                    row.id: row
                    for row in session.scalars(
                        select(ChatSession).where(ChatSession.id.in_(session_ids))
                    )
                },
                messages=messages,
                batches={
                    row.id: row
                    for row in session.scalars(select(Batch).where(Batch.id.in_(batch_ids)))
                },
                ends=ends,
                outbox=session.scalar(select(func.count()).select_from(Outbox)) or 0,
                running_elsewhere=session.scalar(
                    select(func.count()).where(Job.id <= after, Job.finished_at.is_(None))
                )
                or 0,
            )
