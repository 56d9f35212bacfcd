"""Promises that a process of the fault tests can be told to break, to show that they are tested.

Each takes one mechanism out of the real code, in this process only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from sqlalchemy import Integer, bindparam, delete, select, update
from sqlalchemy.orm import Session

from models import groups, jobs, leases, moves, outbox
from models.outcomes import Claim
from models.tables import Job, Outbox
from visq.types import JobStatus

R = TypeVar("R")


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

    leases.without_lease = running
    changed: dict[str, Any] = {
        "_END_DEAD": moves.END,
        "_GIVE_UP_DEAD": moves.GIVE_UP,
        "_REQUEUE_DEAD": moves.REQUEUE_AFTER_CRASH,
    }
    for name, move in changed.items():
        setattr(leases, name, move)


def by_own_clock() -> None:
    """Leases are stamped by the process's clock."""

    def stamped(write: Callable[..., R]) -> Callable[..., R]:
        def write_and_stamp(
            session: Session, which: str | Sequence[Any], *, lease_seconds: float, **more: Any
        ) -> R:
            written = write(session, which, lease_seconds=lease_seconds, **more)
            each = [which] if isinstance(which, str) else which
            held = [claim.job_id if isinstance(claim, Claim) else claim for claim in each]
            session.execute(
                update(Job)
                .where(Job.id.in_(held), Job.status == JobStatus.RUNNING)
                .values(lease_expires_at=datetime.now(UTC) + timedelta(seconds=lease_seconds)),
                execution_options={"synchronize_session": False},
            )
            return written

        return write_and_stamp

    jobs.claim = stamped(jobs.claim)
    jobs.renew = stamped(jobs.renew)
    groups.claim_all = stamped(groups.claim_all)


MUTATIONS: Final[Mapping[str, Callable[[], None]]] = {
    "fencing": without_fencing,
    "outbox": without_outbox,
    "lease": without_lease_check,
    "clock": by_own_clock,
}
