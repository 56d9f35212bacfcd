"""Upgrade, downgrade and inspect a database, without an ``alembic.ini``."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from models.database import Database


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to `revision`; a database that is there already is left alone."""
    command.upgrade(_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Bring the database back to `revision`; ``base`` drops everything."""
    command.downgrade(_config(url), revision)


def current(url: str) -> str | None:
    """The database's revision; ``None`` before the first migration."""
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        database.close()


def head() -> str | None:
    """The newest revision that this version of visq knows."""
    return ScriptDirectory.from_config(_config("")).get_current_head()


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    return config
