"""``visq doctor``: each thing that can be wrong is found, named, and told apart from the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from pydantic import SecretStr

from migrations import run as migrations
from models.database import Database
from tests.servers import RabbitMQ, S3Endpoint, Valkey, _as_user
from tests.visq.cli.operators import (
    SECONDS,
    Jobs,
    Run,
    announce,
    found,
    settings_for,
    wrong,
)
from visq.cli import checks, findings
from visq.cli.doctor import examine
from visq.embedded.connection import ConnectionInfo
from visq.embedded.processes import free_port
from visq.settings import Settings

JOB_CHECKS = {"queue", "leases", "deadlines", "turns", "results", "dead jobs"}

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what the kind of database has no part in."""


@pytest.fixture
def settings(migrated_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return settings_for(migrated_url, redis_url, tmp_path)


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that the test may set up as it likes."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


# --- all is well -------------------------------------------------------------------------------


def test_of_a_healthy_system_everything_is_ok(settings: Settings, jobs: Jobs) -> None:
    announce(settings.redis)
    jobs.submit()
    jobs.run_once(jobs.submit(session={}).id, None)
    looked_at = found(settings)
    assert {each.level for each in looked_at.values()} == {"ok"}, looked_at
    assert looked_at.keys() > {"database", "broker", "redis", "object store", "clock", "workers"}
    assert looked_at.keys() > JOB_CHECKS


def test_the_command_shows_it_to_people_and_to_programs(
    settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("database", "redis", "broker"):
        monkeypatch.setenv(f"VISQ_{name.upper()}_URL", getattr(settings, name))
    monkeypatch.setenv("VISQ_DATA", str(settings.data))
    announce(settings.redis)
    shown = run("doctor")
    assert (shown.status, shown.stderr) == (0, "")
    assert "database" in shown.stdout
    told = json.loads(run("doctor", "--json").stdout)
    assert told["ok"]
    assert {each["level"] for each in told["findings"]} == {"ok"}
    migrations.downgrade(settings.database, "0002")
    assert run("doctor").status == 1
    assert not json.loads(run("doctor", "--json").stdout)["ok"]


def test_without_settings_it_finds_the_stack_of_the_data_folder(
    run: Run, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.upgrade(f"sqlite:///{tmp_path}/visq.db")
    urls = {"redis_url": redis_url, "broker_url": redis_url}
    ConnectionInfo(url="http://127.0.0.1:1", api_key="k", pid=os.getpid(), **urls).write(tmp_path)
    announce(redis_url)
    monkeypatch.chdir(tmp_path)
    done = run("doctor", "--data", str(tmp_path))
    assert done.status == 0, done.stdout
    assert redis_url in done.stdout
    assert not (tmp_path / "objects").exists()  # looking makes nothing


# --- a server is away --------------------------------------------------------------------------


@on_sqlite
def test_every_server_that_is_away_is_named_and_the_others_are_still_asked(
    settings: Settings, tmp_path: Path
) -> None:
    port = free_port()
    s3 = {
        "object_store": "s3",
        "s3_endpoint_url": f"http://127.0.0.1:{port}",
        "s3_access_key_id": "x",
        "s3_secret_access_key": "hunter2",
    }
    away: dict[str, dict[str, Any]] = {
        "database": {"database_url": f"postgresql+psycopg://me:hunter2@127.0.0.1:{port}/visq"},
        "redis": {"redis_url": f"redis://:hunter2@127.0.0.1:{port}/0"},
        "broker": {"broker_url": f"amqp://me:hunter2@127.0.0.1:{port}//"},
        "object store": s3,
    }
    announce(settings.redis)
    for server, values in away.items():
        urls = {"database_url": settings.database, "redis_url": settings.redis}
        given = {"broker_url": settings.broker, "data": tmp_path, **urls, **values}
        looked_at = wrong(Settings(**given))
        assert {name for name, each in looked_at.items() if each.level == "problem"} == {server}
        assert looked_at[server].advice
        assert "hunter2" not in str(looked_at)


def test_servers_that_take_connections_but_never_answer_hold_up_nothing(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = {
            "VISQ_DATABASE_URL": f"postgresql+psycopg://me@{address}/visq",
            "VISQ_REDIS_URL": f"redis://{address}/0",
            "VISQ_BROKER_URL": f"amqp://me:p@{address}//",
            "VISQ_OBJECT_STORE": "s3",
            "VISQ_S3_ENDPOINT_URL": f"http://{address}",
            "VISQ_S3_ACCESS_KEY_ID": "x",
            "VISQ_S3_SECRET_ACCESS_KEY": "x",
            "VISQ_DATA": str(tmp_path),
        }
        patient = "from visq.cli import doctor, main; doctor.ANSWER_SECONDS = 1; main.main()"
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", patient, "doctor", "--json"],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        took = time.monotonic() - begun
    assert done.returncode == 1, done.stderr
    problems = {
        each["check"] for each in json.loads(done.stdout)["findings"] if each["level"] == "problem"
    }
    assert problems == {"database", "broker", "redis", "object store"}
    assert took < 20


def test_a_database_that_is_empty_old_or_newer_is_told_apart(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = settings_for(sqlite_url, redis_url, tmp_path)
    missing = found(settings)["database"]
    assert "there is no database" in missing.message
    assert not (tmp_path / "visq.db").exists()
    (tmp_path / "visq.db").touch()
    assert "visq migrate" in found(settings)["database"].advice
    migrations.upgrade(sqlite_url, "0002")
    old = found(settings)
    assert "visq migrate" in old["database"].advice
    assert not JOB_CHECKS & old.keys()  # they cannot be asked of it
    database = Database(sqlite_url)
    Jobs(database, "").sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    assert "upgrade" in found(settings)["database"].advice


def test_a_damaged_database_is_a_problem_and_not_a_traceback(
    sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "visq.db").write_bytes(b"no database " * 1000)
    problem = found(settings_for(sqlite_url, redis_url, tmp_path))["database"]
    assert problem.level == "problem"
    assert "not a database" in problem.message


# --- Redis as the broker -----------------------------------------------------------------------


@on_sqlite
def test_a_broker_that_forgets_is_a_warning_that_says_what_it_means(
    settings: Settings, own_valkey: Valkey
) -> None:
    announce(settings.redis)
    broken = settings.model_copy(update={"broker_url": SecretStr(own_valkey.url)})
    assert not wrong(broken)
    with redis_client.Redis.from_url(own_valkey.url) as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")
        warnings = wrong(broken)
        assert {name: each.level for name, each in warnings.items()} == {
            "broker: disk": "warning",
            "broker: memory": "warning",
        }
        assert "restart loses all" in warnings["broker: disk"].message
        assert "jobs are safe" in warnings["broker: disk"].advice
        client.config_set("save", "3600 1")
        assert "save 3600 1" in wrong(broken)["broker: disk"].message

        # The same server for values and streams only may forget.
        swapped = settings.model_copy(update={"redis_url": broken.broker_url})
        announce(swapped.redis)
        assert not wrong(swapped)


@on_sqlite
def test_a_broker_whose_memory_is_nearly_full_is_a_problem(
    settings: Settings, own_valkey: Valkey
) -> None:
    announce(own_valkey.url)
    full = settings_for(settings.database, own_valkey.url, settings.data)
    with redis_client.Redis.from_url(own_valkey.url) as client:
        client.config_set("maxmemory", int(client.info()["used_memory"] * 1.05))
    assert wrong(full)["broker: memory"].level == "problem"


@on_sqlite
def test_a_broker_that_is_a_replica_is_a_problem(settings: Settings, own_valkey: Valkey) -> None:
    announce(own_valkey.url)
    host, port = settings.redis.removeprefix("redis://").split("/")[0].split(":")
    with redis_client.Redis.from_url(own_valkey.url) as client:
        client.replicaof(host, port)
    replica = settings_for(settings.database, own_valkey.url, settings.data)
    assert "replica" in wrong(replica)["broker: disk"].message


@on_sqlite
def test_a_broker_that_does_not_say_how_it_keeps_messages_is_a_warning(
    settings: Settings, own_valkey: Valkey
) -> None:
    announce(own_valkey.url)
    with redis_client.Redis.from_url(own_valkey.url) as client:
        client.execute_command("ACL SETUSER default -info -config")
    managed = settings_for(settings.database, own_valkey.url, settings.data)
    assert {name: each.level for name, each in wrong(managed).items()} == {
        "broker: disk": "warning"
    }


def control(server: RabbitMQ, *command: str) -> None:
    subprocess.run(
        [str(server._program("rabbitmqctl")), *command],
        cwd="/",
        env=server._environment(),
        check=True,
        capture_output=True,
        **_as_user("rabbitmq"),
    )


@pytest.mark.rabbitmq
@on_sqlite
def test_rabbitmq_must_take_messages_and_not_only_connections(
    settings: Settings, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(settings.redis)
    asked = settings.model_copy(update={"broker_url": SecretStr(rabbitmq.url)})
    assert not wrong(asked)
    assert "broker: disk" not in found(asked)
    nowhere = rabbitmq.url.removesuffix("/") + "no-such-host"
    assert wrong(settings.model_copy(update={"broker_url": SecretStr(nowhere)})).keys() == {
        "broker"
    }
    monkeypatch.setattr(checks, "SOCKET_SECONDS", 1.0)
    control(rabbitmq, "set_vm_memory_high_watermark", "0")
    try:
        assert "is its memory or its disk full" in wrong(asked)["broker"].message
    finally:
        control(rabbitmq, "set_vm_memory_high_watermark", "0.6")
    assert not wrong(asked)


@on_sqlite
def test_an_s3_that_answers_is_ok_and_one_that_refuses_the_keys_is_not(
    settings: Settings, s3: S3Endpoint
) -> None:
    values = {
        "object_store": "s3",
        "s3_endpoint_url": s3.url,
        "s3_access_key_id": s3.access_key,
        "s3_secret_access_key": s3.secret_key,
    }
    urls = (settings.database, settings.redis, settings.data)
    assert found(settings_for(*urls, **values))["object store"].level == "ok"
    del values["s3_secret_access_key"]
    half = found(settings_for(*urls, **values))["object store"]
    assert half.level == "problem"
    assert "VISQ_S3_SECRET_ACCESS_KEY" in half.message


# --- clocks and workers ------------------------------------------------------------------------


def test_a_clock_that_is_minutes_off_is_a_warning_with_its_direction(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(settings.redis)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 300)
    said = [each for each in examine(settings, SECONDS) if each.check == "clock"]
    assert [each.level for each in said] == ["warning", "warning"]
    assert said[0].message == "the database is 5 min behind this machine"
    assert said[1].message == "Redis is 5 min behind this machine"
    monkeypatch.setattr(time, "time", lambda: clock() - 300)
    assert "ahead" in wrong(settings)["clock"].message


@on_sqlite
def test_a_disk_that_is_nearly_full_is_a_problem(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(settings.redis)
    assert found(settings)["disk"].level == "ok"
    monkeypatch.setattr(findings, "LEAST_FREE", 2**62)
    problem = wrong(settings)["disk"]
    assert problem.level == "problem"
    assert "the database" in problem.message
    assert "the object store" in problem.message


@pytest.mark.parametrize("url", ["nonsense", "foo://", "sqlite+no:///x", "postgresql://h:port/x"])
def test_a_database_url_that_is_none_is_a_line_and_not_a_traceback(
    url: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISQ_DATABASE_URL", url)
    done = run("dead", "list")
    assert done.status == 2
    assert "VISQ_DATABASE_URL" in done.stderr or "no database" in done.stderr


def test_urls_that_cannot_be_used_and_a_folder_for_a_file_are_named(
    redis_url: str, tmp_path: Path
) -> None:
    given = {"redis_url": "nonsense", "broker_url": "foo://x", "data": tmp_path}
    (tmp_path / "visq.db").mkdir()
    told = wrong(Settings(**given))
    assert "VISQ_REDIS_URL" in told["redis"].message
    assert "VISQ_BROKER_URL" in told["broker"].message
    assert "is no file" in told["database"].message
    assert "not looked at" in told["workers"].message


def test_health_asks_the_api_of_the_running_stack(run: Run, tmp_path: Path, redis_url: str) -> None:
    port = free_port()
    ConnectionInfo(
        url=f"http://127.0.0.1:{port}",
        api_key="k",
        pid=os.getpid(),
        redis_url=redis_url,
        broker_url=redis_url,
    ).write(tmp_path)
    assert f":{port}/readyz" in run("health", "api", "--data", str(tmp_path)).stderr


def test_spans_are_said_in_the_unit_that_fits() -> None:
    spans = [findings._span(seconds) for seconds in (3.2, 119, 300, 7300)]
    assert spans == ["3 s", "119 s", "5 min", "2 h"]
