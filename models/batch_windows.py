"""Which items of batches are let into the broker: fair turns between tenants, and between the
batches of a tenant.

At most `most` items of all batches are *in flight* (in the broker, or running) at a time. Whoever
has the fewest of them in flight, by the tenant's weight, is next. Since all of them wait in one
queue, what a tenant has in flight is its share of the workers (Little's law), whatever its items
cost: 50,000 items of one tenant delay another one by one turn of the window, and a cancel takes
effect at once. (docs/decisions/013-fair-windows.md)
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Final

from sqlalchemy import bindparam, exists, func, or_, select, text, update
from sqlalchemy.orm import Session, aliased

from models.database import db_now
from models.moves import UNFINISHED
from models.tables import Batch, Job, has_status
from visq.types import BatchStatus, JobStatus

_LOCK_ID: Final = 0x76697371
"""Of the advisory lock: "visq"."""

_TRY_LOCK: Final = text("SELECT pg_try_advisory_xact_lock(:id)")

_IS_HELD: Final = (has_status(JobStatus.QUEUED), Job.publish_at.is_(None))
_BATCHES_WITH_HELD_ITEMS: Final = (
    select(Batch.id, Batch.tenant_id, Batch.max_in_flight, Batch.dedupe)
    .where(
        Batch.finished_at.is_(None),
        Batch.status == BatchStatus.IN_PROGRESS,
        exists().where(Job.batch_id == Batch.id, *_IS_HELD),
    )
    .order_by(Batch.id)
)
# Twice, and so in the index of such items: else SQLite reads all that batches ever had.
_OPEN_ITEMS: Final = (Job.batch_id.is_not(None), has_status(*UNFINISHED))
_QUEUED_IN_FLIGHT: Final = (
    select(Job.batch_id, Job.tenant_id, func.count())
    .where(*_OPEN_ITEMS, has_status(JobStatus.QUEUED), Job.publish_at.is_not(None))
    .group_by(Job.batch_id, Job.tenant_id)
)
_RUNNING: Final = (
    select(Job.batch_id, Job.tenant_id, func.count())
    .where(*_OPEN_ITEMS, has_status(JobStatus.RUNNING))
    .group_by(Job.batch_id, Job.tenant_id)
)
_NEXT_HELD: Final = (
    select(Job.id)
    .where(Job.batch_id == bindparam("batch_id"), *_IS_HELD)
    .order_by(Job.dispatch_order, Job.position)
    .limit(bindparam("free"))
    .with_for_update(skip_locked=True)  # an item that ends just now waits for the batch
)
_earlier, _answered = aliased(Job), aliased(Job)
_NEXT_HELD_ONCE: Final = _NEXT_HELD.where(
    or_(
        ~exists().where(
            _earlier.batch_id == Job.batch_id,
            _earlier.dedupe_key == Job.dedupe_key,
            _earlier.position < Job.position,
            has_status(*UNFINISHED, of=_earlier),
        ),
        exists().where(
            _answered.batch_id == Job.batch_id,
            _answered.dedupe_key == Job.dedupe_key,
            has_status(JobStatus.SUCCEEDED, of=_answered),
        ),
    )
)
"""What asks for the same as an item that has not ended waits for that answer."""

_LET_GO: Final = (
    update(Job)
    .where(Job.id.in_(bindparam("job_ids", expanding=True)))
    .values(publish_at=db_now())
    .execution_options(synchronize_session=False)
)


def fill_windows(session: Session, most: int, weights: Mapping[str, float] | None = None) -> int:
    """Let held items into the broker, until `most` are in flight.

    :param weights: by the id of the tenant; 1 for those that are not in it.

    Returns the number of items that are now due for publishing (`models.dispatch`).
    """
    if not _alone(session):
        return 0
    batches = session.execute(_BATCHES_WITH_HELD_ITEMS).all()
    if not batches:
        return 0
    in_flight: dict[str, int] = {}
    of_tenants: dict[str, int] = {}
    for counted in (_QUEUED_IN_FLIGHT, _RUNNING):
        for batch_id, tenant_id, count in session.execute(counted):
            assert batch_id is not None
            in_flight[batch_id] = in_flight.get(batch_id, 0) + count
            of_tenants[tenant_id] = of_tenants.get(tenant_id, 0) + count
    turns = _Turns(of_tenants, weights or {})
    for batch_id, tenant_id, max_in_flight, _ in batches:
        turns.add(tenant_id, batch_id, in_flight.get(batch_id, 0), max_in_flight)
    by_id = {batch.id: batch for batch in batches}
    let_go = 0
    free = most - sum(of_tenants.values())
    # A batch may have fewer held items than turns: what is left goes to the others.
    while free > 0 and (shares := turns.take(free)):
        for batch_id, share in sorted(shares.items()):
            batch = by_id[batch_id]
            found = _let_go(session, batch_id, share, once=batch.dedupe)
            if found < share:
                turns.exhausted(batch.tenant_id, batch_id, share - found)
            free -= found
            let_go += found
    return let_go


def _let_go(session: Session, batch_id: str, count: int, *, once: bool) -> int:
    statement = _NEXT_HELD_ONCE if once else _NEXT_HELD
    following = session.scalars(statement, {"batch_id": batch_id, "free": count}).all()
    if following:
        session.execute(_LET_GO, {"job_ids": list(following)})
    return len(following)


def _alone(session: Session) -> bool:
    """Keep two loops from filling the same window twice, until the end of the transaction. (On
    SQLite there is one writer.)"""
    if session.get_bind().dialect.name != "postgresql":
        return True
    return bool(session.scalar(_TRY_LOCK, {"id": _LOCK_ID}))


class _Turns:
    """Whose turn it is: heaps of the tenants, and of each tenant's batches, by what they have in
    flight."""

    def __init__(self, of_tenants: dict[str, int], weights: Mapping[str, float]) -> None:
        self._of_tenants = dict(of_tenants)
        self._weights = weights
        self._batches: dict[str, list[tuple[int, str]]] = {}
        self._most: dict[str, int | None] = {}

    def add(self, tenant_id: str, batch_id: str, in_flight: int, most: int | None) -> None:
        self._most[batch_id] = most
        heapq.heappush(self._batches.setdefault(tenant_id, []), (in_flight, batch_id))

    def take(self, count: int) -> dict[str, int]:
        """The batches that get the next `count` turns, and how many each."""
        shares: dict[str, int] = {}
        tenants = [(self._load(tenant_id), tenant_id) for tenant_id in self._batches]
        heapq.heapify(tenants)
        while tenants and count > 0:
            _, tenant_id = heapq.heappop(tenants)
            batches = self._batches[tenant_id]
            if not batches:
                continue
            in_flight, batch_id = heapq.heappop(batches)
            most = self._most[batch_id]
            if most is None or in_flight < most:
                heapq.heappush(batches, (in_flight + 1, batch_id))
                self._count(tenant_id, 1)
                shares[batch_id] = shares.get(batch_id, 0) + 1
                count -= 1
            heapq.heappush(tenants, (self._load(tenant_id), tenant_id))
        return shares

    def exhausted(self, tenant_id: str, batch_id: str, unused: int) -> None:
        """It had no held items for the last `unused` of its turns, and has none for others."""
        self._count(tenant_id, -unused)
        left = [each for each in self._batches[tenant_id] if each[1] != batch_id]
        heapq.heapify(left)
        self._batches[tenant_id] = left

    def _count(self, tenant_id: str, more: int) -> None:
        self._of_tenants[tenant_id] = self._of_tenants.get(tenant_id, 0) + more

    def _load(self, tenant_id: str) -> float:
        return self._of_tenants.get(tenant_id, 0) / self._weights.get(tenant_id, 1.0)
