"""Fixtures: one running API for each kind of database, and a tenant for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from migrations.run import upgrade
from tests.api.running import PlayedWorker, RunningApi
from tests.servers import Valkey
from visq.settings import Settings

TENANTS: Final = 1500

_numbers = itertools.count()


def settings_for(database_url: str, redis_url: str, folder: Path, **more: Any) -> Settings:
    """Settings of an API on private servers, with many tenants."""
    keys = ",".join(f"tenant-{number}:secret-{number}" for number in range(TENANTS))
    values = {
        "data": folder,
        "database_url": database_url,
        "broker_url": redis_url,
        "redis_url": redis_url,
        "api_keys": keys,
        "port": 0,
    }
    return Settings(**{**values, **more})


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def api(
    request: pytest.FixtureRequest, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningApi]:
    folder = tmp_path_factory.mktemp("api")
    url = f"sqlite:///{folder / 'visq.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database()
    upgrade(url)
    with RunningApi(settings_for(url, valkey.url, folder)) as running:
        yield running


@pytest.fixture
def worker(api: RunningApi) -> Iterator[PlayedWorker]:
    played = PlayedWorker(api.settings)
    yield played
    played.leave()
    played.close()


def fresh_secret() -> str:
    """The key of a tenant that no test has used."""
    number = next(_numbers)
    assert number < TENANTS, "more tests than tenants"
    return f"secret-{number}"


@pytest.fixture
def secret() -> str:
    return fresh_secret()


@pytest.fixture
def client(api: RunningApi, secret: str) -> Iterator[httpx2.Client]:
    """A client of a tenant that has nothing yet."""
    with api.client(secret) as made:
        yield made


@pytest.fixture
def stranger(api: RunningApi) -> Iterator[httpx2.Client]:
    """A client of another tenant."""
    with api.client(fresh_secret()) as made:
        yield made
