"""The guard against the exit of Celery 5.7.0: with a real worker and a real restart of Redis.

tests/faults/test_restarts.py shows that the guarded worker lives. Here a bare Celery worker shows
that the guard is still needed: when this test fails, delete `worker.queue.broker_guard` and this.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tests.servers import Valkey
from tests.waiting import until
from visq.embedded.processes import end, start_tethered

BARE_WORKER = """
import sys, time
import redis
from celery import Celery

url = sys.argv[1]
if sys.argv[2] == "guarded":
    from worker.queue import broker_guard
    broker_guard.install()
app = Celery("probe", broker=url)
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, task_ignore_result=True)

@app.task(name="probe.hold")
def hold():
    redis.Redis.from_url(url).set("holding", "yes")
    time.sleep(4)
    while True:
        try:
            redis.Redis.from_url(url).set("held", "yes")
            return
        except redis.RedisError:
            time.sleep(0.1)

app.send_task("probe.hold")
app.Worker(pool="threads", concurrency=1, quiet=True, loglevel="INFO").start()
"""


def run_through_a_restart(tmp_path: Path, mode: str) -> subprocess.Popen[bytes]:
    """A worker that held a message while Redis was killed and restarted, after its task ended."""
    with Valkey(tmp_path / "valkey") as valkey:
        script = tmp_path / "bare_worker.py"
        script.write_text(BARE_WORKER)
        process = start_tethered(
            [sys.executable, script, valkey.url, mode],
            log=tmp_path / "worker.log",
            env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        )
        try:
            client = redis.Redis.from_url(valkey.url)
            until(lambda: client.get("holding"), 60, "the task to start")
            valkey.kill()
            valkey.restart(keep_data=True)

            def over() -> bool:
                return process.poll() is not None or bool(client.get("held"))

            until(over, 60, "the end of the task or of the worker")
            if process.poll() is None and mode == "bare":
                until(lambda: process.poll() is not None, 20, "the exit of the bare worker")
            if process.poll() is None:
                client.lpush("celery-probe", "still there")
                until(
                    lambda: b"ready" in (tmp_path / "worker.log").read_bytes(), 10, "a live worker"
                )
        finally:
            alive = process.poll() is None
            end(process, 20)
            process.returncode = None if alive else process.returncode
        return process


@pytest.mark.timeout(180)
def test_a_guarded_worker_outlives_a_restart_of_redis(tmp_path: Path) -> None:
    assert run_through_a_restart(tmp_path, "guarded").returncode is None


@pytest.mark.timeout(180)
def test_the_guard_is_still_needed(tmp_path: Path) -> None:
    assert run_through_a_restart(tmp_path, "bare").returncode is not None
