"""Fixtures for all tests: private servers, started once and only when a test asks for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.servers import PostgreSQL, RabbitMQ, S3Endpoint, Valkey


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """A folder for the servers' data. Not pytest's own: other users must be able to enter it."""
    with tempfile.TemporaryDirectory(prefix="visq-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def valkey(servers_dir: Path) -> Iterator[Valkey]:
    """One Valkey for the whole run. A test that kills its server starts one of its own."""
    with Valkey(servers_dir / "valkey") as server:
        yield server


@pytest.fixture(scope="session")
def postgres(servers_dir: Path) -> Iterator[PostgreSQL]:
    with PostgreSQL(servers_dir / "postgres") as server:
        yield server


@pytest.fixture(scope="session")
def s3(servers_dir: Path) -> Iterator[S3Endpoint]:
    with S3Endpoint(servers_dir / "s3") as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(servers_dir: Path) -> Iterator[RabbitMQ]:
    if reason := RabbitMQ.missing():
        pytest.skip(reason)
    with RabbitMQ(servers_dir / "rabbitmq") as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """URL of an empty Redis."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty broker, of each kind."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    server: RabbitMQ = request.getfixturevalue("rabbitmq")
    return server.create_virtual_host()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of an empty SQLite database."""
    return f"sqlite:///{tmp_path / 'visq.db'}"


@pytest.fixture
def postgres_url(postgres: PostgreSQL) -> str:
    """URL of an empty PostgreSQL database."""
    return postgres.create_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database, of each kind."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    return str(request.getfixturevalue(fixture))


@pytest.fixture
def bucket(s3: S3Endpoint) -> str:
    """Name of an empty bucket."""
    return s3.create_bucket()
