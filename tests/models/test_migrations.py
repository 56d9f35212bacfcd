"""Migrations go up and down, and leave exactly the tables that the models describe."""

from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import inspect, text

from migrations import run as migrations
from models import revision, sessions
from models.database import Database
from visq.errors import ConfigurationError
from visq.types import TextPart

NOW = "'2026-01-05 09:30:00'"
PICTURE = '{"type": "image_url", "image_url": {"url": "s3://photos/a.png"}}'
A_TURN_OF_0001 = (
    f"INSERT INTO tenants (id, name, created_at) VALUES ('ten_1', 'acme', {NOW})",
    "INSERT INTO sessions (id, tenant_id, turns, metadata, created_at, updated_at) "
    f"VALUES ('ses_1', 'ten_1', 1, '{{}}', {NOW}, {NOW})",
    "INSERT INTO messages (tenant_id, session_id, turn, position, role, content, created_at) "
    "VALUES ('ten_1', 'ses_1', 1, 0, 'user', "
    f'\'[{PICTURE}, {{"type": "text", "text": "a cat"}}]\', {NOW})',
)


def test_up_down_and_up_again(database_url: str) -> None:
    migrations.upgrade(database_url)
    assert migrations.current(database_url) == migrations.head()
    migrations.downgrade(database_url, "base")
    database = Database(database_url)
    assert set(inspect(database.engine).get_table_names()) <= {"alembic_version"}
    database.close()
    migrations.upgrade(database_url)
    migrations.upgrade(database_url)


def test_a_history_from_before_exact_tokens_is_kept_up_and_down(database_url: str) -> None:
    migrations.upgrade(database_url, "0001")
    database = Database(database_url)
    with database.engine.begin() as connection:
        for statement in A_TURN_OF_0001:
            connection.execute(text(statement))
    migrations.upgrade(database_url)
    [remembered] = database.read(sessions.history, "ses_1", before_turn=2)
    assert remembered.message.parts()[1] == TextPart(text="a cat")
    assert (remembered.token_ids, remembered.tokenizer) == (None, None)
    assert remembered.pictures == [None]

    migrations.downgrade(database_url, "0001")
    with database.engine.connect() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("messages")}
        roles = connection.execute(text("SELECT role FROM messages")).scalars().all()
    database.close()
    assert columns.isdisjoint({"token_ids", "tokenizer", "pictures"})
    assert roles == ["user"]


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
