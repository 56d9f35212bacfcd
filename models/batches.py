"""The life of a batch: counters that equal its rows, the window in the broker, cancellation.

An item's end locks the item's row and then its batch's. So nothing here waits for the row of an
item while it holds that of a batch.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from models.database import db_now, fetch
from models.tables import Batch, Job
from visq.errors import NotFound
from visq.types import BatchStatus, JobStatus


def get(session: Session, batch_id: str) -> Batch:
    """:raises NotFound: no such batch."""
    batch = session.scalars(select(Batch).where(Batch.id == batch_id)).one_or_none()
    if batch is None:
        raise NotFound(f"there is no batch {batch_id}", param="batch_id")
    return batch


_COUNT_ENDS: Final = {
    status: update(Batch)
    .where(Batch.id == bindparam("batch_id"))
    .values({counter: counter + bindparam("ends")})
    .returning(
        Batch.status, Batch.total, Batch.succeeded, Batch.failed, Batch.cancelled, Batch.expired
    )
    .execution_options(synchronize_session=False)
    for status, counter in (
        (JobStatus.SUCCEEDED, Batch.succeeded),
        (JobStatus.FAILED, Batch.failed),
        (JobStatus.CANCELLED, Batch.cancelled),
        (JobStatus.EXPIRED, Batch.expired),
    )
}


def count_ends(session: Session, batch_id: str, status: JobStatus, ends: int) -> None:
    """`ends` items have ended with `status`; the last one ends the batch."""
    batch = fetch(session, _COUNT_ENDS[status], {"batch_id": batch_id, "ends": ends}).one()
    if batch.succeeded + batch.failed + batch.cancelled + batch.expired == batch.total:
        cancelling = batch.status is BatchStatus.CANCELLING
        session.execute(
            update(Batch)
            .where(Batch.id == batch_id)
            .values(
                status=BatchStatus.CANCELLED if cancelling else BatchStatus.COMPLETED,
                finished_at=db_now(),
            ),
            execution_options={"synchronize_session": False},
        )


def uncount_failed(session: Session, batch_id: str) -> bool:
    """A failed item is retried by a call: it has no longer ended, and neither has its batch.

    False if the batch is being cancelled: then nothing of it may start.
    """
    reopened = session.scalars(
        update(Batch)
        .where(Batch.id == batch_id, Batch.status != BatchStatus.CANCELLING)
        .values(failed=Batch.failed - 1, status=BatchStatus.IN_PROGRESS, finished_at=None)
        .returning(Batch.id),
        execution_options={"synchronize_session": False},
    )
    return reopened.one_or_none() is not None


_HELD: Final = select(Job.batch_id).where(
    Job.status == JobStatus.QUEUED, Job.publish_at.is_(None), Job.batch_id.is_not(None)
)
_WITH_HELD_ITEMS: Final = (
    select(Batch.id)
    .where(Batch.id.in_(_HELD), Batch.status == BatchStatus.IN_PROGRESS)
    .order_by(Batch.id)
    # The lock keeps two loops from filling the same window twice.
    .with_for_update(skip_locked=True)
)
_QUEUED_ITEM: Final = (Job.batch_id == bindparam("batch_id"), Job.status == JobStatus.QUEUED)
_IN_BROKER: Final = (
    select(func.count()).select_from(Job).where(*_QUEUED_ITEM, Job.publish_at.is_not(None))
)
_NEXT_HELD: Final = (
    select(Job.id)
    .where(*_QUEUED_ITEM, Job.publish_at.is_(None))
    .order_by(Job.position)
    .limit(bindparam("free"))
    .with_for_update(skip_locked=True)  # an item that ends just now waits for the batch
)
_LET_GO: Final = (
    update(Job)
    .where(Job.id.in_(bindparam("job_ids", expanding=True)))
    .values(publish_at=db_now())
    .execution_options(synchronize_session=False)
)


def fill_windows(session: Session, window: int) -> int:
    """Let held items of each batch into the broker, up to `window` of a batch at a time.

    Returns the number of items that are now due for publishing (`models.dispatch`).
    """
    batch_ids = session.scalars(_WITH_HELD_ITEMS).all()
    return sum(_fill_window(session, batch_id, window) for batch_id in batch_ids)


def _fill_window(session: Session, batch_id: str, window: int) -> int:
    free = window - (session.scalar(_IN_BROKER, {"batch_id": batch_id}) or 0)
    if free <= 0:
        return 0
    following = session.scalars(_NEXT_HELD, {"batch_id": batch_id, "free": free}).all()
    session.execute(_LET_GO, {"job_ids": list(following)})
    return len(following)


def request_cancel(session: Session, batch_id: str) -> Batch:
    """Stop a batch: from now on none of its items starts.

    The maintenance loop ends the pending items and asks the running ones to stop (`to_cancel`), a
    chunk at a time.

    :raises NotFound: no such batch.
    """
    get(session, batch_id)
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.status == BatchStatus.IN_PROGRESS)
        .values(status=BatchStatus.CANCELLING),
        execution_options={"synchronize_session": False},
    )
    return session.scalars(
        select(Batch).where(Batch.id == batch_id).execution_options(populate_existing=True)
    ).one()


def to_cancel(session: Session, limit: int) -> list[str]:
    """Ids of items to cancel in batches that are being cancelled: those that wait, and those that
    run and were not asked to stop yet (also if they were claimed while the cancellation came)."""
    cancelling = select(Batch.id).where(Batch.status == BatchStatus.CANCELLING)
    return list(
        session.scalars(
            select(Job.id)
            .where(
                Job.batch_id.in_(cancelling),
                Job.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]),
                Job.cancel_requested_at.is_(None),
            )
            .order_by(Job.id)
            .limit(limit)
        )
    )
