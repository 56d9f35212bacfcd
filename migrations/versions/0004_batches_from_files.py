"""Batches of any size: from files and to files, their ends in order, and files

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.locking import lock

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ID = sa.String(36)
TIME = sa.DateTime(timezone=True)
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def _columns() -> list[sa.Column[Any]]:
    # Constant defaults: neither database rewrites the table for them.
    zero = sa.text("0")
    return [
        sa.Column("ends", sa.Integer(), nullable=False, server_default=zero),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False, server_default=zero),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False, server_default=zero),
        sa.Column("endpoint", sa.String(64)),
        sa.Column("completion_window", sa.String(16)),
        sa.Column("input_file_id", ID),
        sa.Column("input_uri", sa.Text()),
        sa.Column("output_uri", sa.Text()),
        sa.Column("output_file_id", ID),
        sa.Column("error_file_id", ID),
        sa.Column("options", JSON, nullable=False, server_default=sa.text("'{}'")),
        sa.Column("max_attempts", sa.Integer(), nullable=False, server_default=sa.text("3")),
        sa.Column("max_in_flight", sa.Integer()),
        sa.Column(
            "on_item_error", sa.String(16), nullable=False, server_default=sa.text("'continue'")
        ),
        sa.Column("dedupe", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("errors", JSON),
        sa.Column("intake_done", sa.Boolean(), nullable=False, server_default=sa.true()),
        sa.Column("intake_position", sa.Integer(), nullable=False, server_default=zero),
        sa.Column("intake_offset", sa.BigInteger(), nullable=False, server_default=zero),
        sa.Column("intake_after", sa.Text()),
        sa.Column("input_etag", sa.String(255)),
        sa.Column("held_until", TIME),
        sa.Column("hold", sa.Integer(), nullable=False, server_default=zero),
        sa.Column("hold_failures", sa.Integer(), nullable=False, server_default=zero),
        sa.Column("in_progress_at", TIME),
        sa.Column("cancelling_at", TIME),
        sa.Column("finalizing_at", TIME),
        sa.Column("expires_at", TIME),
    ]


JOB_COLUMNS: dict[str, sa.types.TypeEngine[Any]] = {
    "dispatch_order": sa.Integer(),
    "dedupe_key": sa.String(64),
}

UNFINISHED = "status IN ('waiting', 'queued', 'running')"
PARTIAL = (
    ("ix_batches_open", "batches", ["id"], "finished_at IS NULL"),
    (
        "ix_jobs_held",
        "jobs",
        ["batch_id", "dispatch_order", "position"],
        "status = 'queued' AND publish_at IS NULL",
    ),
    (
        "ix_jobs_open_items",
        "jobs",
        ["batch_id", "id"],
        f"batch_id IS NOT NULL AND {UNFINISHED}",
    ),
    (
        "ix_jobs_dedupe_open",
        "jobs",
        ["batch_id", "dedupe_key", "position"],
        f"dedupe_key IS NOT NULL AND {UNFINISHED}",
    ),
    (
        "ix_jobs_dedupe_answered",
        "jobs",
        ["batch_id", "dedupe_key", "position"],
        "dedupe_key IS NOT NULL AND status = 'succeeded'",
    ),
)


def upgrade() -> None:
    lock("tenants", "batches", "jobs")
    for column in _columns():
        op.add_column("batches", column)
    for name, kind in JOB_COLUMNS.items():
        op.add_column("jobs", sa.Column(name, kind, nullable=True))
    for name, table, columns, where in PARTIAL:
        condition = sa.text(where)
        op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)
    op.create_table(
        "batch_ends",
        sa.Column("batch_id", ID, sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("job_id", ID, sa.ForeignKey("jobs.id"), nullable=False),
    )
    op.create_table(
        "files",
        sa.Column("id", ID, primary_key=True),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("tenant_id", ID, sa.ForeignKey("tenants.id"), nullable=False),
    )
    op.create_index("ix_files_tenant_id_id", "files", ["tenant_id", "id"])
    condition = sa.text("expires_at IS NOT NULL")
    op.create_index(
        "ix_files_expiring",
        "files",
        ["expires_at"],
        sqlite_where=condition,
        postgresql_where=condition,
    )

    _keep_what_was()


def _keep_what_was() -> None:
    """Batches that are there: as what those being cancelled end, and which items have ended."""
    op.execute("UPDATE batches SET cancelling_at = CURRENT_TIMESTAMP WHERE status = 'cancelling'")
    op.execute(
        "INSERT INTO batch_ends (batch_id, number, job_id) "
        "SELECT batch_id, ROW_NUMBER() OVER (PARTITION BY batch_id ORDER BY finished_at, id), id "
        "FROM jobs WHERE batch_id IS NOT NULL AND finished_at IS NOT NULL"
    )
    op.execute(
        "UPDATE batches SET ends = "
        "(SELECT COUNT(*) FROM batch_ends WHERE batch_ends.batch_id = batches.id)"
    )


def downgrade() -> None:
    lock("tenants", "batches", "jobs")
    op.drop_table("files")
    op.drop_table("batch_ends")
    for name, table, _, _ in PARTIAL:
        op.drop_index(name, table)
    for name in JOB_COLUMNS:
        op.drop_column("jobs", name)
    for column in reversed(_columns()):
        op.drop_column("batches", column.name)
