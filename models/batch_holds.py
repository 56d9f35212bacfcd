"""Reading the input of a batch and writing its output: by one process at a time, and by another
one if that dies.

A process *holds* a batch for some seconds, and renews that with each chunk. The number of the hold
is its fencing token: every write of the holder says ``WHERE id AND hold``, so that a process that
was held up for too long writes nothing more. Items and the place up to which the input was read
are committed together: a reader that takes over goes on there, and adds none twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from models import batches
from models.batch_items import ImageOrder, NewItem, add_items
from models.database import as_tenant, db_now
from models.outbox import OutboxEntry
from models.tables import Batch, StoredFile, Tenant
from visq.errors import VisqError
from visq.types import BatchStatus

LONGEST_PAUSE: Final = 60.0
"""Seconds until a failed reading or writing is tried again, at most."""


class HoldLostError(Exception):
    """Another process holds the batch now, or it was cancelled: stop, and write nothing more."""


@dataclass(frozen=True)
class Hold:
    """The right to read the input of a batch, or to write its output."""

    batch: Batch
    tenant: str
    """Its name."""
    number: int
    is_expired: bool
    """Whether its time is over, by the database's clock."""

    @property
    def reads(self) -> bool:
        """Whether there is input to read; otherwise there is output to write."""
        return not self.batch.intake_done


@dataclass(frozen=True)
class Place:
    """Up to where an input was read."""

    position: int = 0
    """Lines, or images."""
    offset: int = 0
    """Bytes."""
    after: str | None = None
    """Key of an image."""


def place_of(batch: Batch) -> Place:
    return Place(batch.intake_position, batch.intake_offset, batch.intake_after)


_TO_DO: Final = and_(
    Batch.finished_at.is_(None),
    or_(Batch.held_until.is_(None), Batch.held_until <= db_now()),
    or_(
        and_(Batch.intake_done.is_(False), Batch.status.in_(batches.TAKING_ITEMS)),
        Batch.status == BatchStatus.FINALIZING,
    ),
)
_TENANTS: Final = select(Batch.tenant_id).where(_TO_DO).distinct()
_NEXT: Final = (
    select(Batch)
    .where(_TO_DO, Batch.tenant_id == bindparam("tenant_id"))
    .order_by(Batch.held_until.asc().nulls_first(), Batch.id)
    .limit(1)
    .with_for_update(skip_locked=True)
    .execution_options(populate_existing=True)
)


def take(session: Session, *, seconds: float) -> Hold | None:
    """Hold the batch that has waited longest for its input to be read, or its output to be
    written; ``None``: there is none.

    Of a tenant that is drawn by lot: ten thousand batches of one delay no other.
    """
    tenant_ids = list(session.scalars(_TENANTS))
    random.shuffle(tenant_ids)
    for tenant_id in tenant_ids:
        batch = session.scalars(_NEXT, {"tenant_id": tenant_id}).one_or_none()
        if batch is not None:
            break
    else:
        return None
    batch.hold += 1
    batch.held_until = db_now(seconds)
    session.flush()
    now, tenant = session.execute(
        select(db_now(), Tenant.name).where(Tenant.id == batch.tenant_id)
    ).one()
    session.refresh(batch)
    is_expired = batch.expires_at is not None and batch.expires_at <= now
    return Hold(batch, tenant, batch.hold, is_expired)


def is_any_to_do(session: Session) -> bool:
    """Whether `take` would find one; a look that locks nothing."""
    return session.scalar(select(Batch.id).where(_TO_DO).limit(1)) is not None


def renew(session: Session, hold: Hold, *, seconds: float) -> None:
    """:raises HoldLostError: it is no longer held."""
    _update(session, hold, held_until=db_now(seconds))


def release(session: Session, hold: Hold) -> None:
    """Let others have their turn; a released one goes to the end of the line."""
    _update(session, hold, held_until=db_now())


def postpone(session: Session, hold: Hold) -> None:
    """It failed for a reason that may pass: try again later each time."""
    pause = min(LONGEST_PAUSE, 2.0 ** min(hold.batch.hold_failures, 10))
    _update(session, hold, held_until=db_now(pause), hold_failures=Batch.hold_failures + 1)


def begin(session: Session, hold: Hold, etag: str | None) -> None:
    """The input is there: it must stay this one until it was read to its end."""
    _update(session, hold, input_etag=etag)


def add_chunk(
    session: Session,
    hold: Hold,
    items: Sequence[NewItem],
    order: ImageOrder,
    *,
    place: Place,
    is_last: bool,
    seconds: float,
) -> list[OutboxEntry]:
    """Add items, and note that the input was read up to `place`.

    :raises HoldLostError: it is no longer held.
    """
    batch = hold.batch
    as_tenant(session, batch.tenant_id)
    rows = add_items(session, batch, items, order) if items else None
    # After the items: their sessions are locked before the batch, as everywhere.
    _update(
        session,
        hold,
        Batch.status.in_(batches.TAKING_ITEMS),
        total=Batch.total + len(items),
        intake_position=place.position,
        intake_offset=place.offset,
        intake_after=place.after,
        intake_done=is_last,
        held_until=None if is_last else db_now(seconds),
        hold_failures=0,
        status=BatchStatus.IN_PROGRESS,
        in_progress_at=func.coalesce(Batch.in_progress_at, db_now()),
    )
    events = [] if rows is None else rows.count_failed()
    return events + (batches.end_if_over(session, batch.id) if is_last and not events else [])


def fail(session: Session, hold: Hold, error: VisqError) -> list[OutboxEntry]:
    """The input cannot be read (to its end): nothing more of the batch starts. Or the output cannot
    be written: then the batch ends without it, and its items can be read from the API.

    :raises HoldLostError: it is no longer held.
    """
    as_tenant(session, hold.batch.tenant_id)
    said = {"code": error.code, "message": error.message, "param": error.param, "line": None}
    if not hold.reads:
        _update(session, hold, Batch.status == BatchStatus.FINALIZING, held_until=None)
        batch = batches.locked(session, hold.batch.id)
        batch.errors = [*(batch.errors or ()), said | {"param": batches.OUTPUT}]
        return batches.close(session, batch)
    _update(session, hold, held_until=None)
    batches.stop(session, hold.batch.id, [said])
    return batches.end_if_over(session, hold.batch.id)


def expire(session: Session, hold: Hold) -> list[OutboxEntry]:
    """Its time is over before its input was read to the end: nothing more is read. (Items that
    are there expire by themselves.)

    :raises HoldLostError: it is no longer held.
    """
    as_tenant(session, hold.batch.tenant_id)
    said = {
        "code": "batch_expired",
        "message": f"its time was over when {hold.batch.intake_position} lines were read",
        "param": None,
        "line": hold.batch.intake_position,
    }
    _update(session, hold, intake_done=True, held_until=None, errors=[said])
    return batches.end_if_over(session, hold.batch.id)


def close(
    session: Session, hold: Hold, output: StoredFile | None, errors: StoredFile | None
) -> list[OutboxEntry]:
    """Its output is written; the files are those of a batch in OpenAI's form.

    :raises HoldLostError: it is no longer held, or an item was retried meanwhile.
    """
    as_tenant(session, hold.batch.tenant_id)
    _update(session, hold, Batch.status == BatchStatus.FINALIZING, held_until=None)
    batch = batches.locked(session, hold.batch.id)
    seconds = batch.options.get("output_seconds")
    for file in (output, errors):
        if file is not None:
            row = session.merge(file)
            row.expires_at = None if seconds is None else db_now(seconds)
    batch.output_file_id = None if output is None else output.id
    batch.error_file_id = None if errors is None else errors.id
    return batches.close(session, batch)


def _update(session: Session, hold: Hold, *guards: ColumnElement[bool], **values: Any) -> None:
    held = session.scalars(
        update(Batch)
        .where(
            Batch.id == bindparam("held_id"),
            Batch.hold == bindparam("held_number"),
            Batch.finished_at.is_(None),
            *guards,
        )
        .values(**values)
        .returning(Batch.id),
        {"held_id": hold.batch.id, "held_number": hold.number},
        execution_options={"synchronize_session": False},
    )
    if held.one_or_none() is None:
        raise HoldLostError(f"batch {hold.batch.id} is held by another process, or was ended")
