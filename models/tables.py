"""The tables. Ids are UUIDv7 with a prefix (`visq.ids`); times are UTC, of the database's clock."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
    false,
    literal_column,
    text,
    true,
)
from sqlalchemy.orm import Mapped, mapped_column

from models.base import (
    Base,
    Id,
    JsonColumn,
    NullableJson,
    RowNumber,
    TenantOwned,
    partial_index,
)
from models.database import PackedInts, db_now
from visq.types import BatchStatus, JobKind, JobStatus, Lane


class Tenant(Base):
    """Whoever holds a key; everything else belongs to one."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class ChatSession(TenantOwned, Base):
    """A conversation. Its row is the lock that puts its turns in order."""

    __tablename__ = "sessions"
    __table_args__ = (Index(None, "tenant_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    turns: Mapped[int] = mapped_column(default=0)
    """Number of the last turn that was submitted; turns count from 1."""
    meta: Mapped[dict[str, str]] = mapped_column("metadata", default=dict)
    forked_from: Mapped[str | None] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    updated_at: Mapped[datetime] = mapped_column(default=db_now())
    deleted_at: Mapped[datetime | None] = mapped_column()


class Message(TenantOwned, Base):
    """One message of a session's history: only turns that succeeded are in it."""

    __tablename__ = "messages"
    __table_args__ = (UniqueConstraint("session_id", "turn", "position"),)

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    session_id: Mapped[str] = mapped_column(Id, ForeignKey("sessions.id"))
    turn: Mapped[int] = mapped_column()
    position: Mapped[int] = mapped_column()
    """Place inside the turn, from 0."""
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[list[dict[str, Any]]] = mapped_column()
    """Parts as in `visq.types`; image parts carry the SHA-256 of the bytes that were shown."""
    token_ids: Mapped[list[int] | None] = mapped_column(PackedInts)
    """Of an answer: the exact tokens that were generated, as numbers of `tokenizer`."""
    tokenizer: Mapped[str | None] = mapped_column(Text)
    pictures: Mapped[list[Any] | None] = mapped_column(NullableJson)
    """By image part: `models.outcomes.ShownPicture`, or null if nothing is known of it."""
    job_id: Mapped[str | None] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class Batch(TenantOwned, Base):
    """A group of jobs; the counters equal its rows at every commit.

    ::

        (from a file) validating ──► in_progress ──► [finalizing] ──► completed | expired | failed
        (its items inline) ────────────┘   └──► cancelling ──► [finalizing] ──► cancelled | failed
    """

    __tablename__ = "batches"
    __table_args__ = (
        Index(None, "tenant_id", "id"),
        UniqueConstraint("tenant_id", "idempotency_key"),
        partial_index("ix_batches_open", "id", where="finished_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    status: Mapped[BatchStatus] = mapped_column(default=BatchStatus.IN_PROGRESS)
    lane: Mapped[Lane] = mapped_column()
    total: Mapped[int] = mapped_column()
    """Items so far; more may come until `intake_done`."""
    succeeded: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    cancelled: Mapped[int] = mapped_column(default=0)
    expired: Mapped[int] = mapped_column(default=0)
    ends: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Ends of its items so far, one more for each item that is retried: numbers `BatchEnd`."""
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    """Of the items that succeeded."""
    meta: Mapped[dict[str, str]] = mapped_column("metadata", default=dict)
    result_queue: Mapped[str | None] = mapped_column(String(64))

    endpoint: Mapped[str | None] = mapped_column(String(64))
    """Of a batch in OpenAI's form: whose answers its output holds."""
    completion_window: Mapped[str | None] = mapped_column(String(16))
    input_file_id: Mapped[str | None] = mapped_column(Id)
    input_uri: Mapped[str | None] = mapped_column(Text)
    """A file of items, or a prefix of images; NULL: they came with the request."""
    output_uri: Mapped[str | None] = mapped_column(Text)
    output_file_id: Mapped[str | None] = mapped_column(Id)
    error_file_id: Mapped[str | None] = mapped_column(Id)
    options: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    """`models.outcomes.BatchOptions`."""
    max_attempts: Mapped[int] = mapped_column(default=3, server_default=text("3"))
    """Of items that are still to be read."""
    max_in_flight: Mapped[int | None] = mapped_column()
    on_item_error: Mapped[str] = mapped_column(
        String(16), default="continue", server_default=text("'continue'")
    )
    dedupe: Mapped[bool] = mapped_column(default=False, server_default=false())
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(NullableJson)
    """Why it failed as a whole: `code`, `message`, `param`, `line`."""

    intake_done: Mapped[bool] = mapped_column(default=True, server_default=true())
    """Whether all items are rows."""
    intake_position: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Lines (or images) that were read."""
    intake_offset: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    """Bytes (of what a packed file holds) that were read."""
    intake_after: Mapped[str | None] = mapped_column(Text)
    """Of a prefix: the last key that was read."""
    input_etag: Mapped[str | None] = mapped_column(String(255))
    """Of the file, when its reading began: another one is another file."""
    held_until: Mapped[datetime | None] = mapped_column()
    """Until then a process reads its input or writes its output; others leave it alone."""
    hold: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Counts those processes: the fencing token of the present one."""
    hold_failures: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Times in a row that reading or writing failed."""

    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    idempotency_hash: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    in_progress_at: Mapped[datetime | None] = mapped_column()
    cancelling_at: Mapped[datetime | None] = mapped_column()
    finalizing_at: Mapped[datetime | None] = mapped_column()
    finished_at: Mapped[datetime | None] = mapped_column()
    expires_at: Mapped[datetime | None] = mapped_column()


class BatchEnd(Base):
    """One end of an item, numbered in the order in which ends were committed: who has read up to a
    number has missed nothing before it. (Numbers are given under the lock of the batch's row.)"""

    __tablename__ = "batch_ends"

    batch_id: Mapped[str] = mapped_column(Id, ForeignKey("batches.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """From 1, without gaps."""
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))


class StoredFile(TenantOwned, Base):
    """A file that was uploaded, or that holds the output of a batch; its bytes are in the store."""

    __tablename__ = "files"
    __table_args__ = (
        Index(None, "tenant_id", "id"),
        partial_index("ix_files_expiring", "expires_at", where="expires_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    """``fil_...``"""
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    uri: Mapped[str] = mapped_column(Text)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    expires_at: Mapped[datetime | None] = mapped_column()


class Job(TenantOwned, Base):
    """A job: the truth about it. `models.jobs` holds all transitions of ``status``."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "idempotency_key"),
        UniqueConstraint("session_id", "turn"),
        UniqueConstraint("batch_id", "custom_id"),
        Index(None, "tenant_id", "id"),
        Index(None, "batch_id", "position"),
        # What claim, dispatch and maintenance look at; finished rows are in none of these.
        partial_index("ix_jobs_queued", "lane", "id", where="status = 'queued'"),
        partial_index("ix_jobs_to_publish", "publish_at", where="status = 'queued'"),
        partial_index(
            "ix_jobs_unpublished", "publish_at", where="status = 'queued' AND publishes = 0"
        ),
        partial_index("ix_jobs_leases", "lease_expires_at", where="status = 'running'"),
        partial_index("ix_jobs_deadlines", "expires_at", where="status IN ('waiting', 'queued')"),
        partial_index("ix_jobs_dead", "dead_at", where="dead_at IS NOT NULL"),
        partial_index(
            "ix_jobs_held",
            "batch_id",
            "dispatch_order",
            "position",
            where="status = 'queued' AND publish_at IS NULL",
        ),
        # Of a batch that has 50,000 ended items, those that are to be cancelled.
        partial_index(
            "ix_jobs_open_items",
            "batch_id",
            "id",
            where="batch_id IS NOT NULL AND status IN ('waiting', 'queued', 'running')",
        ),
        # Of equal items: those that may be waited for, and those that were answered.
        partial_index(
            "ix_jobs_dedupe_open",
            "batch_id",
            "dedupe_key",
            "position",
            where="dedupe_key IS NOT NULL AND status IN ('waiting', 'queued', 'running')",
        ),
        partial_index(
            "ix_jobs_dedupe_answered",
            "batch_id",
            "dedupe_key",
            "position",
            where="dedupe_key IS NOT NULL AND status = 'succeeded'",
        ),
        # A session runs one turn at a time, whatever goes wrong elsewhere.
        partial_index(
            "uq_jobs_running_turn", "session_id", where="status = 'running'", unique=True
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    kind: Mapped[JobKind] = mapped_column()
    status: Mapped[JobStatus] = mapped_column()
    lane: Mapped[Lane] = mapped_column()

    session_id: Mapped[str | None] = mapped_column(Id, ForeignKey("sessions.id"))
    turn: Mapped[int | None] = mapped_column()
    batch_id: Mapped[str | None] = mapped_column(Id, ForeignKey("batches.id"))
    custom_id: Mapped[str | None] = mapped_column(String(128))
    position: Mapped[int | None] = mapped_column()
    """Place in the batch, from 0; of a file, the number of the line less one."""
    dispatch_order: Mapped[int | None] = mapped_column()
    """`position` of the first item with the same images: those run together."""
    dedupe_key: Mapped[str | None] = mapped_column(String(64))
    """Equal in the items of a batch that ask for the same, if it is to be done once."""

    request: Mapped[dict[str, Any]] = mapped_column()
    """`messages`, `gen_config`, `do_preprocess`, `adapter_name`, `on_image_change`."""
    meta: Mapped[dict[str, str]] = mapped_column("metadata", default=dict)
    result_queue: Mapped[str | None] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    idempotency_hash: Mapped[str | None] = mapped_column(String(64))

    attempt: Mapped[int] = mapped_column(default=0)
    """Number of claims so far: the fencing token of the current run."""
    failures: Mapped[int] = mapped_column(default=0)
    """Attempts that counted: a job that was handed back at a shutdown lost none."""
    max_attempts: Mapped[int] = mapped_column()
    crashes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Times that an engine or a worker died with it: `models.moves.SHARED_CRASHES`."""
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None] = mapped_column()
    cancel_requested_at: Mapped[datetime | None] = mapped_column()
    run_after: Mapped[datetime | None] = mapped_column()
    """Not before this time: the back-off of a retry."""
    publish_at: Mapped[datetime | None] = mapped_column()
    """When this queued job is next published to the broker; NULL: held back by its batch."""
    publishes: Mapped[int] = mapped_column(default=0)
    """Times that it was published since it was last queued."""
    expires_at: Mapped[datetime | None] = mapped_column()

    result: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    error_param: Mapped[str | None] = mapped_column(String(256))
    dead_at: Mapped[datetime | None] = mapped_column()
    """When it became a dead letter: it failed for a reason that may pass, but its attempts are used
    up."""

    created_at: Mapped[datetime] = mapped_column(default=db_now())
    started_at: Mapped[datetime | None] = mapped_column()
    finished_at: Mapped[datetime | None] = mapped_column()


class JobEvent(TenantOwned, Base):
    """One transition of a job, so that its whole life can be read back."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    at: Mapped[datetime] = mapped_column(default=db_now())
    from_status: Mapped[JobStatus | None] = mapped_column()
    to_status: Mapped[JobStatus] = mapped_column()
    attempt: Mapped[int] = mapped_column()
    worker: Mapped[str | None] = mapped_column(String(128))
    reason: Mapped[str | None] = mapped_column(Text)


class Image(TenantOwned, Base):
    """An upload."""

    __tablename__ = "images"
    __table_args__ = (UniqueConstraint("tenant_id", "sha256"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    uri: Mapped[str] = mapped_column(String(1200))
    sha256: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class Outbox(Base):
    """What must still be told to the world; written in the transaction that it tells of."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "available_at"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    """Also the id of the event, so that a repeat can be recognised."""
    kind: Mapped[str] = mapped_column(String(16))
    """``result`` (of a job) or ``batch`` (its end)."""
    payload: Mapped[dict[str, Any]] = mapped_column()
    tries: Mapped[int] = mapped_column(default=0)
    available_at: Mapped[datetime] = mapped_column(default=db_now())
    created_at: Mapped[datetime] = mapped_column(default=db_now())


def has_status(*statuses: JobStatus, of: type[Job] = Job) -> ColumnElement[bool]:
    """Whether a job is in one of these states, written out and not as parameters: an index that is
    for such rows only must be known to fit."""
    written = [literal_column(f"'{status.value}'", Job.status.type) for status in statuses]
    return of.status == written[0] if len(written) == 1 else of.status.in_(written)
