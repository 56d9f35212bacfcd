"""A model that does not load: the worker takes no job, and everybody who should know is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

import worker
from tests.deployment import Deployment
from tests.waiting import until
from visq.types import JobStatus as S

SMALL = Path(worker.__file__).parent / "small_model"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def deployment(tmp_path: Path, redis_url: str, sqlite_url: str) -> Iterator[Deployment]:
    settings = {"database_url": sqlite_url, "redis_url": redis_url, "broker_url": redis_url}
    with Deployment(tmp_path / "visq", settings) as deployment:
        yield deployment


@pytest.fixture
def torn_model(tmp_path: Path) -> Path:
    """The small model, but its copy broke off in the middle of the weights."""
    folder = tmp_path / "torn"
    shutil.copytree(SMALL, folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


def visq(deployment: Deployment, *command: str, **environment: str) -> tuple[int, str]:
    """Run a command to its end; its status and all that it said."""
    done = subprocess.run(
        [sys.executable, "-m", "visq", *command],
        env={**deployment.environment, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def ready(deployment: Deployment) -> dict[str, Any]:
    answer = httpx2.get(f"{deployment.url}/readyz", timeout=10, trust_env=False)
    assert answer.status_code == 200
    return answer.json()


def test_a_model_that_does_not_load_is_told_everywhere_and_jobs_wait_unharmed_for_a_good_worker(
    deployment: Deployment, tmp_path: Path, torn_model: Path
) -> None:
    with deployment.client() as client:
        job = client.jobs.submit(prompt="hello", gen_config={"max_new_tokens": 8})
        folders = (tmp_path / "no-such-folder", torn_model)
        with ThreadPoolExecutor() as threads:
            ends = threads.map(
                lambda folder: visq(deployment, "worker", VISQ_MODEL=str(folder)), folders
            )
            ended = dict(zip(folders, ends, strict=True))
        for folder, (status, said) in ended.items():
            assert status == 2
            assert "error (configuration_error): " in said
            assert "Traceback" not in said

            def told(folder: Path = folder) -> dict[str, Any]:
                failures = {each["model"]: each for each in ready(deployment)["failed_workers"]}
                return failures.get(str(folder), {})

            failure = until(told, 10, "the failure in /readyz")
            assert str(folder) in failure["reason"]
        assert ready(deployment)["workers"] == 0

        status, said = visq(deployment, "health", "worker")
        assert status == 1
        assert f"could not load {torn_model}" in said
        status, said = visq(deployment, "doctor", "--json")
        assert status == 1
        problems = [each for each in json.loads(said)["findings"] if each["level"] == "problem"]
        assert {each["check"] for each in problems} == {"workers"}
        assert any("no-such-folder" in each["message"] for each in problems)

        waiting = job.refresh()
        assert (waiting.status, waiting.attempt) == (S.QUEUED, 0)
        assert [event.to_status for event in job.history()] == [S.QUEUED]

        deployment.start_worker()
        view = job.wait(60)
        assert (view.status, view.attempt) == (S.SUCCEEDED, 1)
        until(lambda: not ready(deployment)["failed_workers"], 10, "the failures to be withdrawn")
        assert ready(deployment)["workers"] == 1
        status, said = visq(deployment, "doctor")
        assert status == 0, said


def test_without_redis_the_worker_still_ends_and_says_why(
    deployment: Deployment, tmp_path: Path
) -> None:
    status, said = visq(
        deployment,
        "worker",
        VISQ_MODEL=str(tmp_path / "none"),
        VISQ_REDIS_URL="redis://127.0.0.1:1/0",
    )
    assert status == 2
    assert "the failure is not announced" in said
    assert "holds no model" in said
    assert "Traceback" not in said
