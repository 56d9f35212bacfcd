"""Claims and successes of several jobs in one transaction: the same transitions as in
`models.jobs`, at a third of the cost.

Single transactions take their locks in one order (session, job, the session's next job, batch). A
group would hold one job while it waits for another, and two groups could wait for each other. So
**a group waits for nothing**: what another transaction has locked is left out, and the caller does
it alone. Only the batches' rows are waited for, last of all and in the order of their ids, and who
holds one of them waits for nothing else.

A group is all or nothing, as any transaction: if one job's part of it fails, the caller does each
job of it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from models import batches, outbox, sessions
from models.database import db_now, fetch
from models.jobs import CLAIM_GUARDS, CLAIM_VALUES, SUCCEED, work_of
from models.moves import moved, moving, record_all, release_next_turn, to_publish
from models.outcomes import Claim, QueuedJob, Succeeded, Transition, Work
from models.tables import ChatSession, Job, Tenant
from visq.types import JobStatus

_FREE: Final = (
    select(Job.id)
    .where(Job.id.in_(bindparam("job_ids", expanding=True)), Job.status == bindparam("from_status"))
    .with_for_update(skip_locked=True)
)
"""Of `job_ids`: locked for us from now on."""

_FREE_SESSIONS: Final = (
    select(ChatSession.id, ChatSession.deleted_at)
    .where(ChatSession.id.in_(bindparam("session_ids", expanding=True)))
    .with_for_update(skip_locked=True)
)

_CLAIM_ALL: Final = moving(
    *CLAIM_GUARDS, which=Job.id.in_(bindparam("job_ids", expanding=True)), **CLAIM_VALUES
)

_TENANTS_AND_TIME: Final = select(Tenant.id, Tenant.name, db_now()).where(
    Tenant.id.in_(bindparam("tenant_ids", expanding=True))
)


def claim_all(
    session: Session, job_ids: Sequence[str], *, worker: str, lease_seconds: float
) -> dict[str, Work | None]:
    """`models.jobs.claim` for several jobs. Those that are not in the answer are to be claimed
    alone: another transaction has them just now, or they are not queued."""
    free = _free(session, job_ids, JobStatus.QUEUED)
    if not free:
        return {}
    claimed = moved(
        session,
        _CLAIM_ALL,
        JobStatus.QUEUED,
        JobStatus.RUNNING,
        job_ids=free,
        claimed_by=worker,
        lease_seconds=lease_seconds,
    )
    works: dict[str, Work | None] = dict.fromkeys(free)
    if not claimed:
        return works
    record_all(session, [(job, JobStatus.QUEUED, None) for job in claimed])
    tenant_ids = list({job.tenant_id for job in claimed})
    rows = fetch(session, _TENANTS_AND_TIME, {"tenant_ids": tenant_ids}).all()
    names = {tenant_id: name for tenant_id, name, _ in rows}
    now = rows[0][2]
    for job in claimed:
        works[job.id] = work_of(session, job, names[job.tenant_id], now)
    return works


def succeed_all(
    session: Session, ends: Sequence[tuple[Claim, Succeeded]]
) -> dict[Claim, Transition | None]:
    """`models.jobs.finish` for several runs that have succeeded: ``None`` if the claim is lost.
    Those that are not in the answer are to be ended alone."""
    deleted = _lock_sessions(session, [claim.session_id for claim, _ in ends if claim.session_id])
    open_to_us = [end for end in ends if end[0].session_id is None or end[0].session_id in deleted]
    free = set(_free(session, [claim.job_id for claim, _ in open_to_us], JobStatus.RUNNING))
    ended: list[tuple[Claim, Job, str]] = []
    transitions: dict[Claim, Transition | None] = {}
    queued: dict[Claim, list[QueuedJob]] = {}
    for claim, end in open_to_us:
        if claim.job_id not in free:
            continue
        transitions[claim] = None
        for job in moved(
            session,
            SUCCEED,
            JobStatus.RUNNING,
            JobStatus.SUCCEEDED,
            job_id=claim.job_id,
            held_attempt=claim.attempt,
            answer=end.result.model_dump(mode="json"),
        ):
            ended.append((claim, job, end.result.finish_reason))
            if claim.session_id is None:
                continue
            if not deleted[claim.session_id]:
                sessions.append(session, claim.session_id, job, end)
            following = release_next_turn(session, claim.session_id)
            if following is not None:
                queued[claim] = [to_publish(following)]
    if not ended:
        return transitions
    record_all(session, [(job, JobStatus.RUNNING, reason) for _, job, reason in ended])
    events = outbox.add_results(session, [job for _, job, _ in ended])
    for (claim, job, _), event in zip(ended, events, strict=True):
        transitions[claim] = Transition(job, queued=queued.get(claim, []), events=[event])
    by_batch: dict[str, list[tuple[Claim, Job]]] = {}
    for claim, job, _ in ended:
        if job.batch_id is not None:
            by_batch.setdefault(job.batch_id, []).append((claim, job))
    for batch_id in sorted(by_batch):
        events = batches.count_ends(session, batch_id, [job for _, job in by_batch[batch_id]])
        last, _ = by_batch[batch_id][-1]
        if events and (transition := transitions[last]) is not None:
            transition.events.extend(events)
    return transitions


def _free(session: Session, job_ids: Sequence[str], status: JobStatus) -> list[str]:
    rows = fetch(session, _FREE, {"job_ids": list(job_ids), "from_status": status})
    return [job_id for (job_id,) in rows]


def _lock_sessions(session: Session, session_ids: Sequence[str]) -> Mapping[str, bool]:
    """The sessions that are ours now, and whether they were deleted."""
    if not session_ids:
        return {}
    rows = fetch(session, _FREE_SESSIONS, {"session_ids": list(session_ids)})
    return {session_id: deleted_at is not None for session_id, deleted_at in rows}
