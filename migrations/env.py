"""Alembic's entry: runs the migrations on the URL that `migrations.run` was given."""

from __future__ import annotations

from alembic import context

from models import tables
from models.connections import MIGRATING
from models.database import Database


def run() -> None:
    database = Database(context.config.attributes["url"], limits=MIGRATING)
    try:
        with database.engine.connect() as connection:
            context.configure(
                connection=connection,
                target_metadata=tables.Tenant.metadata,
                render_as_batch=connection.dialect.name == "sqlite",
                transaction_per_migration=True,
            )
            with context.begin_transaction():
                context.run_migrations()
            connection.commit()
    finally:
        database.close()


run()
