"""The demo's flow on the servers of production, by settings alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.deployment import Deployment
from tests.servers import S3Endpoint
from visq.cli.demo import run_flow
from visq.objects import open_store
from visq.settings import Settings


@pytest.mark.timeout(300)
def test_the_demo_flow_on_postgresql_s3_and_each_broker(
    tmp_path: Path,
    postgres_url: str,
    s3: S3Endpoint,
    redis_url: str,
    broker_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "database_url": postgres_url,
        "redis_url": redis_url,
        "broker_url": broker_url,
        **{name.removeprefix("VISQ_").lower(): value for name, value in s3.environment.items()},
    }
    with Deployment(tmp_path / "visq", settings) as deployment:
        deployment.start_worker()
        for name, value in deployment.environment.items():
            if name.startswith("VISQ_"):
                monkeypatch.setenv(name, value)
        printed = Console(file=io.StringIO(), width=120)
        in_effect = Settings()
        store = open_store(in_effect)
        with deployment.client() as client:
            report = run_flow(client, store, in_effect, printed)
        store.close()
        assert report.missing == 0
        assert report.worked, printed.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.timeout(300)
def test_visq_demo_ends_with_status_0(tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("VISQ_")},
        "VISQ_ENGINE_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "visq", "demo", "--data", str(tmp_path / "data")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 by the queue, 26 by Redis" in done.stdout
