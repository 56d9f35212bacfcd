"""Promises that a process of the fault tests can be told to break, to show that they are tested.

Each takes one mechanism out of the real code, in this process only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Integer, bindparam, delete, select
from sqlalchemy.orm import Session

from models import groups, jobs, moves, outbox
from models.tables import Job, Outbox
from visq.types import JobStatus


def without_fencing() -> None:
    """The end of a run is written whatever attempt its job is at."""
    held = bindparam("held_attempt", type_=Integer())
    unfenced = moves.moving(held == held, result=bindparam("answer"), **moves.ENDED)
    jobs.SUCCEED = groups.SUCCEED = unfenced  # type: ignore[misc]


def without_outbox() -> None:
    """Result events are published after the commit, but not stored with it."""
    add = outbox.add_results

    def add_and_forget(session: Session, ended: Sequence[Job]) -> list[outbox.OutboxEntry]:
        entries = add(session, ended)
        session.execute(delete(Outbox).where(Outbox.id.in_([entry.id for entry in entries])))
        return entries

    outbox.add_results = add_and_forget


def without_lease_check() -> None:
    """Running jobs are taken from their workers whether or not their leases have run out."""

    def running(session: Session, limit: int) -> list[str]:
        found = select(Job.id).where(Job.status == JobStatus.RUNNING).limit(limit)
        return list(session.scalars(found))

    jobs.without_lease = running
    changed: dict[str, Any] = {
        "_END_DEAD": moves.END,
        "_GIVE_UP_DEAD": moves.GIVE_UP,
        "_REQUEUE_DEAD": moves.REQUEUE_AFTER_CRASH,
    }
    for name, move in changed.items():
        setattr(jobs, name, move)


MUTATIONS: Final[Mapping[str, Callable[[], None]]] = {
    "fencing": without_fencing,
    "outbox": without_outbox,
    "lease": without_lease_check,
}
