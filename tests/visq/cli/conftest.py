"""For the client's commands the API and the answering worker of the client's tests; for the
operators' a database with jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrations import run as migrations
from models import reading
from models.database import Database
from tests.visq.cli.operators import Jobs, Run, runner
from tests.visq.client.conftest import (  # noqa: F401  # fixtures
    answering,
    api,
    client,
    secret,
    worker,
)


@pytest.fixture
def migrated_url(database_url: str) -> str:
    """URL of a database with tables, of each kind."""
    migrations.upgrade(database_url)
    return database_url


@pytest.fixture
def jobs(migrated_url: str) -> Iterator[Jobs]:
    database = Database(migrated_url)
    tenants = database.run(reading.ensure_tenants, ["acme"])
    yield Jobs(database, tenants["acme"])
    database.close()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)
