"""The life of a batch: counters that equal its rows, its end, and its cancellation.

An item's end locks the item's row and then its batch's. So nothing here waits for the row of an
item while it holds that of a batch. `models.batch_items` adds items, `models.batch_windows` lets
them into the broker, `models.batch_holds` reads inputs and writes outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.orm import Session, defer

from models import outbox
from models.base import table
from models.database import db_now, fetch
from models.outbox import OutboxEntry
from models.tables import Batch, BatchEnd, Job, has_status
from visq.errors import NotFound
from visq.types import BatchStatus, JobStatus

TAKING_ITEMS: Final = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
"""While items may be added, and may start."""


def get(session: Session, batch_id: str) -> Batch:
    """:raises NotFound: no such batch."""
    batch = session.scalars(select(Batch).where(Batch.id == batch_id)).one_or_none()
    if batch is None:
        raise NotFound(f"there is no batch {batch_id}", param="batch_id")
    return batch


def locked(session: Session, batch_id: str) -> Batch:
    """The row as it is now, locked until the end of the transaction."""
    return session.scalars(
        select(Batch)
        .where(Batch.id == batch_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()


# --- ends ------------------------------------------------------------------------------------


_COUNT_ENDS: Final = (
    update(Batch)
    .where(Batch.id == bindparam("batch_id"))
    .values(
        succeeded=Batch.succeeded + bindparam("new_succeeded"),
        failed=Batch.failed + bindparam("new_failed"),
        cancelled=Batch.cancelled + bindparam("new_cancelled"),
        expired=Batch.expired + bindparam("new_expired"),
        ends=Batch.ends + bindparam("new_ends"),
        prompt_tokens=Batch.prompt_tokens + bindparam("new_prompt_tokens"),
        completion_tokens=Batch.completion_tokens + bindparam("new_completion_tokens"),
    )
    .returning(
        Batch.ends,
        Batch.total,
        Batch.succeeded + Batch.failed + Batch.cancelled + Batch.expired,
        Batch.intake_done,
        Batch.status,
        Batch.on_item_error,
    )
    .execution_options(synchronize_session=False)
)
_NUMBER_ENDS: Final = insert(table(BatchEnd))


def count_ends(session: Session, batch_id: str, ended: Sequence[Job]) -> list[OutboxEntry]:
    """Items have ended: count and number them. The last one ends the batch, and a failed one stops
    it if it was asked to. Returns the event of the batch's end, if it has ended."""
    by_status = Counter(job.status for job in ended)
    usages = [job.result["usage"] for job in ended if job.result is not None]
    ends, total, finished, intake_done, status, on_item_error = fetch(
        session,
        _COUNT_ENDS,
        {
            "batch_id": batch_id,
            "new_succeeded": by_status[JobStatus.SUCCEEDED],
            "new_failed": by_status[JobStatus.FAILED],
            "new_cancelled": by_status[JobStatus.CANCELLED],
            "new_expired": by_status[JobStatus.EXPIRED],
            "new_ends": len(ended),
            "new_prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
            "new_completion_tokens": sum(usage["completion_tokens"] for usage in usages),
        },
    ).one()
    session.execute(
        _NUMBER_ENDS,
        [
            {"batch_id": batch_id, "number": number, "job_id": job.id}
            for number, job in enumerate(ended, start=ends - len(ended) + 1)
        ],
    )
    stops = on_item_error == "stop" and by_status[JobStatus.FAILED] and status in TAKING_ITEMS
    if stops:
        failed = next(job for job in ended if job.status is JobStatus.FAILED)
        stop(session, batch_id, [_item_failed(failed)])
    if finished == total and (intake_done or stops):
        return end(session, batch_id)
    return []


ITEM_FAILED: Final = "item_failed"
OUTPUT: Final = "output"
"""`param` of an error: the output could not be written."""


def _item_failed(job: Job) -> dict[str, Any]:
    return {
        "code": ITEM_FAILED,
        "message": f"item {job.custom_id!r} failed ({job.error_code}), and `on_item_error` is "
        "`stop`",
        "param": job.custom_id,
        "line": None if job.position is None else job.position + 1,
    }


def stop(session: Session, batch_id: str, errors: list[dict[str, Any]] | None = None) -> None:
    """Start and read nothing more of it (the row is locked from here on)."""
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.status.in_(TAKING_ITEMS))
        .values(
            status=BatchStatus.CANCELLING,
            cancelling_at=db_now(),
            intake_done=True,
            held_until=None,
            hold=Batch.hold + 1,  # who reads it is to know
            errors=errors,
        ),
        execution_options={"synchronize_session": False},
    )


def end(session: Session, batch_id: str) -> list[OutboxEntry]:
    """All its items have ended (its row is locked): write its output, or end it at once."""
    batch = locked(session, batch_id)
    if batch.output_uri is not None or batch.input_file_id is not None:
        batch.status, batch.finalizing_at = BatchStatus.FINALIZING, db_now()
        batch.held_until = None
        # Who began to write before an item was retried must not end it with what was then.
        batch.hold += 1
        batch.hold_failures = 0
        session.flush()
        return []
    return close(session, batch)


def end_if_over(session: Session, batch_id: str) -> list[OutboxEntry]:
    """`end` it, if it is still open and nothing of it is to be waited for."""
    batch = locked(session, batch_id)
    counted = batch.succeeded + batch.failed + batch.cancelled + batch.expired
    is_open = batch.finished_at is None and batch.status is not BatchStatus.FINALIZING
    is_over = batch.intake_done and counted == batch.total
    return end(session, batch_id) if is_open and is_over else []


def close(session: Session, batch: Batch) -> list[OutboxEntry]:
    """There is nothing more to do for it (its row is locked)."""
    batch.status, batch.finished_at = final_status(batch), db_now()
    batch.held_until = None
    session.flush()
    session.refresh(batch)  # times that the database computed
    return [outbox.add_batch(session, batch)]


def final_status(batch: Batch) -> BatchStatus:
    """As what it ends, now that all its items have ended."""
    codes = {error["code"] for error in batch.errors or ()}
    if batch.expired or "batch_expired" in codes:
        return BatchStatus.EXPIRED
    if codes:
        return BatchStatus.FAILED
    return BatchStatus.COMPLETED if batch.cancelling_at is None else BatchStatus.CANCELLED


def uncount_failed(session: Session, batch_id: str) -> bool:
    """A failed item is retried by a call: it has no longer ended, and neither has its batch.

    False if the batch is being cancelled: then nothing of it may start.
    """
    batch = locked(session, batch_id)
    if batch.status is BatchStatus.CANCELLING:
        return False
    batch.failed -= 1
    batch.status = BatchStatus.IN_PROGRESS
    batch.finalizing_at = batch.finished_at = batch.cancelling_at = None
    # An input that was not read to its end is still not; the rest is tried again.
    kept = [error for error in batch.errors or () if not _is_tried_again(error)]
    batch.errors = kept or None
    session.flush()
    return True


def _is_tried_again(error: dict[str, Any]) -> bool:
    return bool(error["code"] == ITEM_FAILED or error["param"] == OUTPUT)


# --- cancellation ----------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchTransition:
    """A committed change, and what must be published because of it."""

    batch: Batch
    events: list[OutboxEntry]


def request_cancel(session: Session, batch_id: str) -> BatchTransition:
    """Stop a batch: from now on none of its items starts. If there is nothing to wait for, it ends
    at once.

    The maintenance loop ends the pending items and asks the running ones to stop (`to_cancel`), a
    chunk at a time.

    :raises NotFound: no such batch.
    """
    get(session, batch_id)
    stop(session, batch_id)
    events = end_if_over(session, batch_id)
    return BatchTransition(locked(session, batch_id), events)


_CANCELLING: Final = (
    select(Batch.id)
    .where(Batch.finished_at.is_(None), Batch.status == BatchStatus.CANCELLING)
    .order_by(Batch.id)
)
_TO_CANCEL: Final = (
    select(Job.id)
    .where(
        Job.batch_id == bindparam("batch_id"),
        has_status(JobStatus.WAITING, JobStatus.QUEUED, JobStatus.RUNNING),
        Job.cancel_requested_at.is_(None),
    )
    .order_by(Job.id)
    .limit(bindparam("most"))
)


def to_cancel(session: Session, limit: int) -> list[str]:
    """Ids of items to cancel in batches that are being cancelled: those that wait, and those that
    run and were not asked to stop yet (also if they were claimed while the cancellation came)."""
    found: list[str] = []
    # A batch at a time: for all at once, PostgreSQL reads the table in the order of its ids.
    for batch_id in session.scalars(_CANCELLING).all():
        if len(found) < limit:
            most = limit - len(found)
            found += session.scalars(_TO_CANCEL, {"batch_id": batch_id, "most": most})
    return found


# --- results ---------------------------------------------------------------------------------


def ended_items(
    session: Session, batch_id: str, *, after_number: int, limit: int
) -> list[tuple[int, Job]]:
    """Items in the order in which they ended, with the numbers of those ends, of which none is left
    out. One that is being retried shows that it has not ended: it comes again, with a higher
    number. (Without their requests.)"""
    rows = session.execute(
        select(BatchEnd.number, Job)
        .join(Job, Job.id == BatchEnd.job_id)
        .where(
            BatchEnd.batch_id == batch_id,
            BatchEnd.number > after_number,
        )
        .order_by(BatchEnd.number)
        .limit(limit)
        .options(defer(Job.request, raiseload=True))
    )
    return [(number, job) for number, job in rows]
