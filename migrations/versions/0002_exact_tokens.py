"""The exact tokens of answers, and what the next turn must know of pictures

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    # Nullable and without a default: no database rewrites the table for them.
    op.add_column("messages", sa.Column("token_ids", sa.LargeBinary(), nullable=True))
    op.add_column("messages", sa.Column("tokenizer", sa.Text(), nullable=True))
    op.add_column("messages", sa.Column("pictures", JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("messages", "pictures")
    op.drop_column("messages", "tokenizer")
    op.drop_column("messages", "token_ids")
