"""Jobs with which engines or workers died, and dead letters

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
    condition = sa.text("dead_at IS NOT NULL")
    op.create_index(
        "ix_jobs_dead",
        "jobs",
        ["dead_at"],
        sqlite_where=condition,
        postgresql_where=condition,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_dead", "jobs")
    op.drop_column("jobs", "dead_at")
    op.drop_column("jobs", "crashes")
