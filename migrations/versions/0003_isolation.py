"""Jobs with which engines or workers died, dead letters, and jobs the broker was not told of

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A constant default: neither database rewrites the table for it.
    op.add_column(
        "jobs", sa.Column("crashes", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    op.add_column("jobs", sa.Column("dead_at", sa.DateTime(timezone=True), nullable=True))
    for name, column, condition in (
        ("ix_jobs_dead", "dead_at", sa.text("dead_at IS NOT NULL")),
        ("ix_jobs_unpublished", "publish_at", sa.text("status = 'queued' AND publishes = 0")),
    ):
        op.create_index(name, "jobs", [column], sqlite_where=condition, postgresql_where=condition)


def downgrade() -> None:
    op.drop_index("ix_jobs_unpublished", "jobs")
    op.drop_index("ix_jobs_dead", "jobs")
    op.drop_column("jobs", "dead_at")
    op.drop_column("jobs", "crashes")
