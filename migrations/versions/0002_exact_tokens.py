"""The exact tokens of answers

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable and without a default: no database rewrites the table for them.
    op.add_column("messages", sa.Column("token_ids", sa.LargeBinary(), nullable=True))
    op.add_column("messages", sa.Column("token_model", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("messages", "token_model")
    op.drop_column("messages", "token_ids")
