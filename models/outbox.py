"""The outbox: events that are written with the end of a job or batch, and published after the
commit.

The process that ended the job publishes at once; the maintenance loop publishes what was left
behind (a crash, a broker that was away, a queue that refuses). A reserved row that is not deleted
comes back by itself; what was refused comes back later each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from models.base import table
from models.database import db_now, fetch
from models.tables import Batch, Job, Outbox, Tenant
from models.views import batch_view, job_view
from visq.cloudevents import batch_event, result_event
from visq.ids import new_id

GRACE_SECONDS = 3.0
"""How long the process that wrote an entry has to publish it before the loop does."""

REDELIVERY_SECONDS = 10.0
"""How long a reservation holds."""

FIRST_PAUSE: Final = 5.0
"""Seconds before an event that was refused is tried again; twice as long after each refusal."""

LONGEST_PAUSE: Final = 120.0
"""At most."""


@dataclass(frozen=True)
class OutboxEntry:
    """One event to publish; `id` is the event's id."""

    id: str
    kind: str
    payload: dict[str, Any]
    tries: int = 0
    """How often it was reserved, this time included; 0: it has just been written."""


@dataclass(frozen=True)
class Postponed:
    """An entry that is due again in `seconds`; `tried` if that time counts as one of its tries."""

    entry: OutboxEntry
    seconds: float
    tried: bool


_TENANT_NAMES: Final = select(Tenant.id, Tenant.name).where(
    Tenant.id.in_(bindparam("tenant_ids", expanding=True))
)
_ADD: Final = insert(table(Outbox)).values(available_at=db_now("grace_seconds"))


def add_results(session: Session, jobs: Sequence[Job]) -> list[OutboxEntry]:
    """Write the events that `jobs` have ended, one for each."""
    tenant_ids = list({job.tenant_id for job in jobs})
    names = dict(fetch(session, _TENANT_NAMES, {"tenant_ids": tenant_ids}).all())
    entries = []
    for job in jobs:
        event_id = new_id("evt")
        event = result_event(event_id, names[job.tenant_id], job_view(job))
        entries.append(OutboxEntry(event_id, "result", event))
    _write(session, entries)
    return entries


def add_batch(session: Session, batch: Batch) -> OutboxEntry:
    """Write the event that `batch` has ended."""
    names = dict(fetch(session, _TENANT_NAMES, {"tenant_ids": [batch.tenant_id]}).all())
    event_id = new_id("evt")
    event = batch_event(event_id, names[batch.tenant_id], batch_view(batch))
    entry = OutboxEntry(event_id, "batch", event)
    _write(session, [entry])
    return entry


def _write(session: Session, entries: Sequence[OutboxEntry]) -> None:
    session.execute(
        _ADD,
        [
            {
                "id": entry.id,
                "kind": entry.kind,
                "payload": entry.payload,
                "grace_seconds": GRACE_SECONDS,
            }
            for entry in entries
        ],
    )


_DUE: Final = (
    select(Outbox.id)
    .where(Outbox.available_at <= db_now())
    .order_by(Outbox.available_at)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
)


def reserve(session: Session, limit: int) -> list[OutboxEntry]:
    """Take entries that are due, for `REDELIVERY_SECONDS`; other processes skip them."""
    # Two statements, for the reason given in `models.dispatch.reserve_due`.
    due = session.scalars(_DUE, {"most": limit}).all()
    if not due:
        return []
    rows = session.execute(
        update(Outbox)
        .where(Outbox.id.in_(due))
        .values(available_at=db_now(REDELIVERY_SECONDS), tries=Outbox.tries + 1)
        .returning(Outbox.id, Outbox.kind, Outbox.payload, Outbox.tries),
        execution_options={"synchronize_session": False},
    )
    return sorted((OutboxEntry(*row) for row in rows), key=lambda entry: entry.id)


_ENTRIES: Final = table(Outbox)
_DELETE: Final = delete(_ENTRIES).where(_ENTRIES.c.id.in_(bindparam("entry_ids", expanding=True)))


def done(session: Session, entry_ids: list[str]) -> None:
    """The entries were published and confirmed."""
    session.execute(_DELETE, {"entry_ids": entry_ids})


def refused(entry: OutboxEntry) -> Postponed:
    """It was tried, and whoever it is for does not take it."""
    return Postponed(entry, pause_after(entry.tries), tried=True)


def pause_after(tries: int) -> float:
    """Seconds until the next try."""
    longer = 2.0 ** min(max(tries - 1, 0), 20)
    return min(FIRST_PAUSE * longer, LONGEST_PAUSE)


def released(entry: OutboxEntry, seconds: float = 0.0) -> Postponed:
    """It was not tried, for a reason that it has no part in."""
    return Postponed(entry, seconds, tried=False)


# Only of the reservation that is held: the entry may have come back, and be another process's now.
_POSTPONE: Final = (
    update(_ENTRIES)
    .where(_ENTRIES.c.id == bindparam("entry_id"), _ENTRIES.c.tries == bindparam("held"))
    .values(available_at=db_now("seconds"), tries=bindparam("counted"))
)


def postpone(session: Session, postponed: Sequence[Postponed]) -> None:
    """The entries were not published."""
    session.execute(
        _POSTPONE,
        [
            {
                "entry_id": each.entry.id,
                "held": each.entry.tries,
                "seconds": each.seconds,
                "counted": each.entry.tries if each.tried else max(0, each.entry.tries - 1),
            }
            # In the order in which everybody locks them.
            for each in sorted(postponed, key=lambda each: each.entry.id)
        ],
    )


def settle(session: Session, published: list[str], postponed: Sequence[Postponed]) -> None:
    """What became of entries: `done` and `postpone` in one transaction."""
    if published:
        done(session, published)
    if postponed:
        postpone(session, postponed)
