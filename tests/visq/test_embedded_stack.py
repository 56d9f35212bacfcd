"""`visq up`: everything on one machine, one clean stop, nothing left behind, nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.waiting import until
from visq.embedded.connection import ConnectionInfo
from visq.embedded.stack import Stack, environment_of
from visq.errors import ConfigurationError, Unavailable
from visq.settings import Settings

pytestmark = pytest.mark.timeout(300)

START_SECONDS = 120


def ask(connection: ConnectionInfo, prompt: str) -> dict[str, Any]:
    """Submit one job, wait for its end, and return it."""
    body = {"kind": "generate", "prompt": prompt, "gen_config": {"max_new_tokens": 4}}
    with api(connection) as client:
        answer = client.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"})
        assert answer.status_code in (200, 202), answer.text
        job: dict[str, Any] = answer.json()
        return job


def api(connection: ConnectionInfo) -> httpx2.Client:
    return httpx2.Client(
        base_url=connection.url,
        headers={"Authorization": f"Bearer {connection.api_key}"},
        timeout=90,
        trust_env=False,
    )


@contextmanager
def up(data: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``visq up`` as a person would, and wait until it says where it is."""
    environment = {name: value for name, value in os.environ.items() if "VISQ_" not in name}
    process = subprocess.Popen(
        [sys.executable, "-m", "visq", "up", "--data", str(data), "--port", "0"],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(
            lambda: ConnectionInfo.read(data) or process.poll() is not None,
            START_SECONDS,
            "the stack to start",
        )
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != "zombie"]


def connection_of(data: Path) -> ConnectionInfo:
    connection = ConnectionInfo.read(data)
    assert connection is not None
    return connection


def test_a_stop_and_a_kill_leave_no_process_behind_and_no_job_is_lost(tmp_path: Path) -> None:
    with up(tmp_path) as process:
        connection = connection_of(tmp_path)
        job = ask(connection, "Hello!")
        assert job["status"] == "succeeded"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 4  # Valkey, the API, the worker and its engine

        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert connection.url in output
        assert connection.api_key not in output
        assert still_running(children) == []
        assert not ConnectionInfo.path(tmp_path).exists()

    with up(tmp_path) as process:
        connection = connection_of(tmp_path)
        with api(connection) as client:
            assert client.get(f"/v1/jobs/{job['id']}").json()["result"] == job["result"]
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        until(lambda: not still_running(children), 30, "every process to end with its owner")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    data = tmp_path_factory.mktemp("stack") / "data"
    said: list[str] = []
    with Stack(Settings(data=data, port=0), said.append) as running:
        yield running


def test_a_second_stack_on_the_same_folder_is_told_who_has_it(stack: Stack) -> None:
    with pytest.raises(ConfigurationError, match=rf"process {os.getpid()}, {stack.url}"):
        Stack(Settings(data=stack.settings.data, port=0)).__enter__()


def test_a_worker_that_dies_is_started_again_and_answers(stack: Stack) -> None:
    worker = next(each for each in stack.services if each.name == "the worker")
    first = worker.process
    assert first is not None
    first.kill()
    until(lambda: worker.process not in (None, first), 30, "another worker")
    assert ask(stack.connection, "Hello!")["status"] == "succeeded"


def test_what_is_kept_is_private_to_its_owner(stack: Stack) -> None:
    data = stack.settings.data
    assert data.stat().st_mode & 0o077 == 0
    for secret in ("api-key", "connection.json"):
        assert (data / secret).stat().st_mode & 0o077 == 0


def test_a_taken_port_that_was_asked_for_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} on 127.0.0.1 is taken"):
            Stack(Settings(data=tmp_path, port=port)).__enter__()


def test_a_database_that_does_not_answer_stops_the_start_and_every_process(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2"
    settings = Settings.model_validate({"data": tmp_path, "port": 0, "database_url": url})
    with pytest.raises(Unavailable, match="database"):
        Stack(settings).__enter__()
    assert set(still_running(psutil.Process().children(recursive=True))) <= set(before)


def test_settings_travel_to_another_process_by_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings.model_validate(
        {"data": "/somewhere", "api_keys": "alice:secret", "port": 1234, "s3_region": None}
    )
    environment = environment_of(settings)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings.model_copy()
    assert "VISQ_S3_REGION" not in environment
