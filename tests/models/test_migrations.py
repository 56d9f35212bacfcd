"""Migrations go up and down, and leave exactly the tables that the models describe."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alembic import command
from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from migrations import run as migrations
from models import batches, jobs, revision, sessions
from models.database import Database
from tests.waiting import until
from visq.errors import ConfigurationError
from visq.types import BatchStatus, TextPart

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


def test_batches_of_before_they_came_from_files_go_on_and_end_as_they_would(
    database_url: str,
) -> None:
    """One that has ended, and one that is being cancelled, whose last item is still to end."""
    migrations.upgrade(database_url, "0003")
    database = Database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text(A_TURN_OF_0001[0]))
        for batch_id, status, ended, finished in (
            ("bat_1", "completed", 2, NOW),
            ("bat_2", "cancelling", 1, "NULL"),
        ):
            connection.execute(
                text(
                    "INSERT INTO batches (id, tenant_id, status, lane, total, succeeded, failed, "
                    "cancelled, expired, metadata, created_at, finished_at) VALUES "
                    f"('{batch_id}', 'ten_1', '{status}', 'batch', 2, {ended}, 0, 0, 0, '{{}}', "
                    f"{NOW}, {finished})"
                )
            )
            for position in (0, 1):
                status, finished = ("succeeded", NOW) if position < ended else ("queued", "NULL")
                connection.execute(
                    text(
                        "INSERT INTO jobs (id, tenant_id, kind, status, lane, batch_id, custom_id, "
                        "position, request, metadata, attempt, failures, max_attempts, publishes, "
                        f"created_at, finished_at) VALUES ('{batch_id}_{position}', 'ten_1', "
                        f"'generate', '{status}', 'batch', '{batch_id}', '{position}', {position}, "
                        f"'{{}}', '{{}}', 0, 0, 3, 0, {NOW}, {finished})"
                    )
                )
    migrations.upgrade(database_url)
    ended = database.read(batches.ended_items, "bat_1", after_number=0, limit=10)
    assert [(number, job.id) for number, job in ended] == [(1, "bat_1_0"), (2, "bat_1_1")]
    database.run(jobs.cancel, "bat_2_1")
    assert database.read(batches.get, "bat_2").status is BatchStatus.CANCELLED
    ended = database.read(batches.ended_items, "bat_2", after_number=0, limit=10)
    assert [number for number, _ in ended] == [1, 2]
    database.close()


def test_workers_of_before_can_still_write_when_batches_may_come_from_files(
    database_url: str,
) -> None:
    """They do not know the new columns, and go on until they are replaced."""
    migrations.upgrade(database_url, "0003")
    database = Database(database_url)
    before = columns_of(database)
    migrations.upgrade(database_url)
    after = columns_of(database)
    database.close()
    for table, known in before.items():
        assert after[table].keys() >= known.keys()
        needed = {
            name
            for name in after[table].keys() - known.keys()
            if not after[table][name]["nullable"] and after[table][name]["default"] is None
        }
        assert needed == set(), table


def columns_of(database: Database) -> dict[str, dict[str, Any]]:
    """By table and name."""
    inspector = inspect(database.engine)
    return {
        table: {column["name"]: column for column in inspector.get_columns(table)}
        for table in inspector.get_table_names()
    }


def test_a_migration_does_not_deadlock_with_an_end_of_an_item(postgres_url: str) -> None:
    """Which has locked its job, and then wants its batch."""
    migrations.upgrade(postgres_url, "0003")
    database = Database(postgres_url)
    with ThreadPoolExecutor(1) as pool, database.engine.connect() as end:
        end.execute(text("UPDATE jobs SET attempt = attempt + 1"))
        migration = pool.submit(migrations.upgrade, postgres_url)
        until(lambda: database.read(someone_waits) or migration.done(), 20, "the migration")
        end.execute(text("UPDATE batches SET succeeded = succeeded + 1"))
        end.commit()
        migration.result(30)
    assert migrations.current(postgres_url) == migrations.head()
    database.close()


def someone_waits(session: Session) -> bool:
    """For a lock."""
    return bool(session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")))
