"""Acceptance of jobs and batches: one transaction each, idempotent by key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models import sessions
from models.database import db_now
from models.moves import PUBLISH_GRACE_SECONDS, record
from models.outcomes import QueuedJob
from models.tables import Batch, Job, JobEvent
from visq.errors import IdempotencyConflict
from visq.ids import new_id
from visq.types import BatchRequest, JobKind, JobRequest, JobStatus, Prompt

RowT = TypeVar("RowT", Job, Batch)


@dataclass(frozen=True)
class SubmittedJob:
    """`created` is false for a repeat by ``Idempotency-Key``; `queued` is to be published now."""

    job: Job
    created: bool
    queued: list[QueuedJob]


@dataclass(frozen=True)
class SubmittedBatch:
    batch: Batch
    created: bool


def submit_job(
    session: Session,
    tenant_id: str,
    request: JobRequest,
    *,
    max_attempts: int,
    idempotency_key: str | None = None,
    fingerprint: str = "",
) -> SubmittedJob:
    """Accept a job: its row, its turn in the session, its first event.

    `fingerprint` is of the body as the client sent it; a repeat of the key must have the same.

    :raises NotFound: the session does not exist.
    :raises IdempotencyConflict: the key was used with another body.
    """

    def create() -> Job:
        return _create_job(session, tenant_id, request, max_attempts, idempotency_key, fingerprint)

    job, created = _once(session, Job, tenant_id, idempotency_key, fingerprint, create)
    queued = [QueuedJob(job.id, job.lane)] if created and job.status is JobStatus.QUEUED else []
    return SubmittedJob(job, created, queued)


def _create_job(
    session: Session,
    tenant_id: str,
    request: JobRequest,
    max_attempts: int,
    idempotency_key: str | None,
    fingerprint: str,
) -> Job:
    session_id, turn, must_wait = request.session_id, None, False
    if request.session is not None:
        session_id = sessions.open_session(session, tenant_id, request.session.metadata).id
    if session_id is not None:
        turn, must_wait = sessions.next_turn(session, session_id)
    job = Job(
        id=new_id("job"),
        tenant_id=tenant_id,
        kind=request.kind,
        status=JobStatus.WAITING if must_wait else JobStatus.QUEUED,
        lane=request.lane,
        session_id=session_id,
        turn=turn,
        request=_stored(request) | {"on_image_change": request.on_image_change},
        meta=request.metadata,
        result_queue=request.result_queue,
        idempotency_key=idempotency_key,
        idempotency_hash=fingerprint,
        max_attempts=max_attempts,
        publish_at=None if must_wait else db_now(PUBLISH_GRACE_SECONDS),
        expires_at=None if request.expires_in is None else db_now(request.expires_in),
    )
    session.add(job)
    session.flush()
    session.refresh(job)  # times that the database computed
    record(session, job, None, "submitted")
    return job


def submit_batch(
    session: Session,
    tenant_id: str,
    request: BatchRequest,
    *,
    max_attempts: int,
    idempotency_key: str | None = None,
    fingerprint: str = "",
) -> SubmittedBatch:
    """Accept a batch; its items are held until the dispatcher lets them into the broker.

    :raises IdempotencyConflict: the key was used with another body.
    """

    def create() -> Batch:
        return _create_batch(
            session, tenant_id, request, max_attempts, idempotency_key, fingerprint
        )

    batch, created = _once(session, Batch, tenant_id, idempotency_key, fingerprint, create)
    return SubmittedBatch(batch, created)


def _create_batch(
    session: Session,
    tenant_id: str,
    request: BatchRequest,
    max_attempts: int,
    idempotency_key: str | None,
    fingerprint: str,
) -> Batch:
    batch = Batch(
        id=new_id("bat"),
        tenant_id=tenant_id,
        lane=request.lane,
        total=len(request.items),
        meta=request.metadata,
        result_queue=request.result_queue,
        idempotency_key=idempotency_key,
        idempotency_hash=fingerprint,
    )
    session.add(batch)
    session.flush()
    now = session.scalar(select(db_now()))
    expires_at = (
        None if request.expires_in is None else session.scalar(select(db_now(request.expires_in)))
    )
    job_ids = [new_id("job") for _ in request.items]
    session.execute(
        insert(Job),
        [
            {
                "id": job_id,
                "tenant_id": tenant_id,
                "kind": JobKind.GENERATE,
                "status": JobStatus.QUEUED,
                "lane": request.lane,
                "batch_id": batch.id,
                "custom_id": item.custom_id,
                "position": position,
                "request": _stored(item, request),
                "meta": item.metadata,
                "result_queue": request.result_queue,
                "max_attempts": max_attempts,
                "attempt": 0,
                "failures": 0,
                "publishes": 0,
                "expires_at": expires_at,
                "created_at": now,
            }
            for position, (job_id, item) in enumerate(zip(job_ids, request.items, strict=True))
        ],
    )
    session.execute(
        insert(JobEvent),
        [
            {
                "tenant_id": tenant_id,
                "job_id": job_id,
                "at": now,
                "to_status": JobStatus.QUEUED,
                "attempt": 0,
                "reason": "submitted",
            }
            for job_id in job_ids
        ],
    )
    return batch


def _once(
    session: Session,
    table: type[RowT],
    tenant_id: str,
    key: str | None,
    fingerprint: str,
    create: Callable[[], RowT],
) -> tuple[RowT, bool]:
    """Create the row unless `key` has made it before; two at the same time make one."""
    if key is None:
        return create(), True
    row = _by_key(session, table, tenant_id, key)
    if row is None:
        try:
            with session.begin_nested():
                return create(), True
        except IntegrityError:
            row = _by_key(session, table, tenant_id, key)
            if row is None:
                raise
    if row.idempotency_hash != fingerprint:
        raise IdempotencyConflict(
            f"Idempotency-Key {key!r} was used before with another body; use a new key",
            param="Idempotency-Key",
        )
    return row, False


def _by_key(session: Session, table: type[RowT], tenant_id: str, key: str) -> RowT | None:
    return session.scalars(
        select(table).where(table.tenant_id == tenant_id, table.idempotency_key == key)
    ).one_or_none()


def _stored(prompt: Prompt, batch: BatchRequest | None = None) -> dict[str, object]:
    """The part of a request that a run needs, as `Prompt` reads it back."""
    gen_config = prompt.gen_config
    if batch is not None and batch.gen_config and "gen_config" not in prompt.model_fields_set:
        gen_config = batch.gen_config
    stored = prompt.model_dump(
        mode="json", include={"messages", "prompt", "images", "do_preprocess", "adapter_name"}
    )
    return stored | {"gen_config": gen_config.model_dump(mode="json", exclude_defaults=True)}


def body_fingerprint(request: BaseModel) -> str:
    """SHA-256 of a request as it was understood: two spellings of the same body are equal."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
