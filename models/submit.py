"""Acceptance of jobs and batches: one transaction each, idempotent by key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models import sessions
from models.batch_items import ImageOrder, NewItem, add_items, stored_request
from models.database import as_tenant, db_now
from models.moves import PUBLISH_GRACE_SECONDS, record
from models.outcomes import QueuedJob
from models.tables import Batch, Job
from visq.errors import IdempotencyConflict
from visq.ids import new_id
from visq.types import BatchRequest, BatchStatus, JobRequest, JobStatus

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
        request=stored_request(request) | {"on_image_change": request.on_image_change},
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
    input_uri: str | None = None,
) -> SubmittedBatch:
    """Accept a batch. Its items, if they are in the request, are held until they are let into the
    broker (`models.batch_windows`); a file of items is read later (`models.batch_holds`).

    :param input_uri: of an uploaded file.

    :raises IdempotencyConflict: the key was used with another body.
    """

    as_tenant(session, tenant_id)

    def create() -> Batch:
        return _create_batch(
            session, tenant_id, request, max_attempts, idempotency_key, fingerprint, input_uri
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
    input_uri: str | None,
) -> Batch:
    is_inline = request.items is not None
    batch = Batch(
        id=new_id("bat"),
        tenant_id=tenant_id,
        status=BatchStatus.IN_PROGRESS if is_inline else BatchStatus.VALIDATING,
        lane=request.lane,
        total=len(request.items or ()),
        meta=request.metadata,
        result_queue=request.result_queue,
        endpoint=request.endpoint,
        completion_window=request.completion_window,
        input_file_id=request.input_file_id,
        input_uri=input_uri or request.input_uri,
        output_uri=request.output_uri,
        options=_options(request),
        max_attempts=max_attempts,
        max_in_flight=request.max_in_flight,
        on_item_error=request.on_item_error,
        dedupe=request.dedupe,
        intake_done=is_inline,
        idempotency_key=idempotency_key,
        idempotency_hash=fingerprint,
        in_progress_at=db_now() if is_inline else None,
        expires_at=None if request.seconds is None else db_now(request.seconds),
    )
    session.add(batch)
    session.flush()
    session.refresh(batch)  # times that the database computed
    items = [NewItem(position, item) for position, item in enumerate(request.items or ())]
    if items:
        add_items(session, batch, items, ImageOrder()).count_failed()
        session.refresh(batch)  # some may have failed, and have stopped or ended it
    return batch


def _options(request: BatchRequest) -> dict[str, object]:
    """What is needed of the request when its input is read and its output written."""
    options: dict[str, object] = {}
    if request.gen_config is not None:
        options["gen_config"] = request.gen_config.model_dump(mode="json", exclude_defaults=True)
    if request.prompt is not None:
        options["prompt"] = request.prompt
    if request.output_expires_after is not None:
        options["output_seconds"] = request.output_expires_after.seconds
    return options


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


def body_fingerprint(request: BaseModel) -> str:
    """SHA-256 of a request as it was understood: two spellings of the same body are equal."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()
