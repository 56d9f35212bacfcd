"""The engine process dies, or hangs, with many jobs in it: every one of them succeeds later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.deployment import Deployment, Worker
from tests.waiting import until
from visq.types import JobStatus as S

JOBS = 50

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def deployment(tmp_path: Path, redis_url: str, sqlite_url: str) -> Iterator[Deployment]:
    settings = {
        "database_url": sqlite_url,
        "redis_url": redis_url,
        "broker_url": redis_url,
        "concurrency": "0",
        "engine_hang_seconds": "8",
    }
    with Deployment(tmp_path / "visq", settings) as deployment:
        yield deployment


def engine_of(worker: Worker) -> psutil.Process:
    children = psutil.Process(worker.process.pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)


@pytest.mark.parametrize("fault", ["kill", "suspend"])
def test_fifty_jobs_that_run_when_the_engine_process_is_lost_all_succeed(
    deployment: Deployment, fault: str
) -> None:
    worker = deployment.start_worker()
    engine = engine_of(worker)
    with deployment.client() as client:
        jobs = [
            client.jobs.submit(
                prompt=f"tell me {number}", gen_config={"max_new_tokens": 250, "ignore_eos": True}
            )
            for number in range(JOBS)
        ]
        until(lambda: all(job.refresh().status is S.RUNNING for job in jobs), 60, "50 runs", 0.01)
        getattr(engine, fault)()
        views = [job.wait(200) for job in jobs]
        histories = [job.history() for job in jobs]

    assert [view.status for view in views] == [S.SUCCEEDED] * JOBS
    assert {view.attempt for view in views} == {2}
    for history in histories:
        assert [event.to_status for event in history] == [
            S.QUEUED,
            S.RUNNING,
            S.QUEUED,
            S.RUNNING,
            S.SUCCEEDED,
        ]
    assert worker.alive
    assert not engine.is_running()
    with redis.Redis.from_url(deployment.redis_url) as broker:
        until(lambda: not broker.exists("visq:unacked"), 30, "all messages acknowledged")
