"""``visq doctor`` about workers: none, one without its model, one whose engine is down."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import redis as redis_client

from tests.visq.cli.operators import Jobs, Run, announce, settings_for, wrong
from visq.settings import Settings
from visq.streams import announce_failure

# The kind of database has no part in it.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def settings(migrated_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return settings_for(migrated_url, redis_url, tmp_path)


def test_jobs_that_wait_for_a_worker_that_is_not_there_are_a_problem(
    settings: Settings, jobs: Jobs
) -> None:
    assert wrong(settings)["workers"].level == "warning"
    jobs.submit()
    assert wrong(settings)["workers"].level == "problem"
    announce(settings.redis)
    assert not wrong(settings)


def test_a_worker_that_could_not_load_its_model_is_told_with_the_reason(
    settings: Settings,
) -> None:
    with redis_client.Redis.from_url(settings.redis) as client:
        announce_failure(client, "gpu-1", "/models/mine", "its weights are torn")
    told = wrong(settings)["workers"]
    assert told.level == "problem"
    assert "gpu-1 could not load /models/mine" in told.message
    assert "torn" in told.message
    announce(settings.redis)
    assert wrong(settings)["workers"].level == "warning"  # jobs run, elsewhere


def test_an_engine_that_is_down_is_told_and_not_the_broker_blamed(
    settings: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    announce(settings.redis, engine_down="it was killed")
    jobs.submit()
    jobs.sql("UPDATE job_events SET at = AGO")
    told = wrong(settings)
    assert told.keys() == {"workers"}
    assert told["workers"].level == "problem"
    assert told["workers"].message == "the engine of here:1:a is down: it was killed"
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setenv("VISQ_REDIS_URL", settings.redis)
    assert run("health", "worker").status == 1
    announce(settings.redis)
    assert run("health", "worker").status == 0
