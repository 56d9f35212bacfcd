"""The outbox: result events that are written with the job's end and published after the commit.

The process that ended the job publishes at once; the maintenance loop publishes what was left
behind (a crash, a broker that was away). A reserved row that is not deleted comes back by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from models.database import db_now
from models.tables import Job, Outbox, Tenant
from models.views import job_view
from visq.cloudevents import result_event
from visq.ids import new_id

GRACE_SECONDS = 3.0
"""How long the process that wrote an entry has to publish it before the loop does."""

REDELIVERY_SECONDS = 10.0
"""How long a reservation holds."""


@dataclass(frozen=True)
class OutboxEntry:
    """One event to publish; `id` is the event's id."""

    id: str
    kind: str
    payload: dict[str, Any]


def add_result(session: Session, job: Job) -> OutboxEntry:
    """Write the event that `job` has ended."""
    tenant = session.execute(select(Tenant.name).where(Tenant.id == job.tenant_id)).scalar_one()
    event_id = new_id("evt")
    event = result_event(event_id, tenant, job_view(job))
    session.add(
        Outbox(id=event_id, kind="result", payload=event, available_at=db_now(GRACE_SECONDS))
    )
    session.flush()
    return OutboxEntry(event_id, "result", event)


def reserve(session: Session, limit: int) -> list[OutboxEntry]:
    """Take entries that are due, for `REDELIVERY_SECONDS`; other processes skip them."""
    # Two statements, for the reason given in `models.dispatch.reserve_due`.
    due = session.scalars(
        select(Outbox.id)
        .where(Outbox.available_at <= db_now())
        .order_by(Outbox.available_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    rows = session.execute(
        update(Outbox)
        .where(Outbox.id.in_(due))
        .values(available_at=db_now(REDELIVERY_SECONDS), tries=Outbox.tries + 1)
        .returning(Outbox.id, Outbox.kind, Outbox.payload),
        execution_options={"synchronize_session": False},
    )
    return sorted(
        (OutboxEntry(id_, kind, payload) for id_, kind, payload in rows), key=lambda e: e.id
    )


def done(session: Session, entry_ids: list[str]) -> None:
    """The entries were published and confirmed."""
    session.execute(delete(Outbox).where(Outbox.id.in_(entry_ids)))
