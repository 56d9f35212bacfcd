"""Migrations go up and down, and leave exactly the tables that the models describe."""

from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import inspect

from migrations import run as migrations
from models import revision
from models.database import Database
from visq.errors import ConfigurationError


def test_up_down_and_up_again(database_url: str) -> None:
    migrations.upgrade(database_url)
    assert migrations.current(database_url) == migrations.head()
    migrations.downgrade(database_url, "base")
    database = Database(database_url)
    assert set(inspect(database.engine).get_table_names()) <= {"alembic_version"}
    database.close()
    migrations.upgrade(database_url)
    migrations.upgrade(database_url)


def test_the_migrated_tables_are_those_of_the_models(database_url: str) -> None:
    migrations.upgrade(database_url)
    command.check(migrations._config(database_url))


def test_the_models_name_the_newest_revision() -> None:
    assert migrations.head() == revision.REVISION


def test_a_database_without_tables_is_refused_with_what_to_do(database_url: str) -> None:
    database = Database(database_url)
    with pytest.raises(ConfigurationError, match="visq migrate"):
        database.read(revision.check)
    migrations.upgrade(database_url)
    database.read(revision.check)
    database.close()
