"""The guard against the exit of Celery 5.7.0, with a real Celery worker and a real Redis that is
killed and restarted while a message is unacknowledged. (tests/faults/test_restarts.py shows the
same of the whole worker.)"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import redis

from tests.servers import Valkey
from tests.waiting import until
from visq.embedded.processes import end, start_tethered

WORKER = """
import sys, threading, time
import redis
from celery import Celery
from worker.queue import broker_guard

broker_guard.install()
url = sys.argv[1]
app = Celery("probe", broker=url)
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, task_ignore_result=True)
client = redis.Redis.from_url(url)

def insist(call, *args):
    while True:
        try:
            return call(*args)
        except redis.RedisError:
            time.sleep(0.1)

@app.task(name="probe.hold")
def hold():
    client.incr("started")
    time.sleep(4)
    insist(client.incr, "ended")

def send_the_next():
    while insist(client.get, "next") is None:
        time.sleep(0.1)
    app.send_task("probe.hold")

app.send_task("probe.hold")
threading.Thread(target=send_the_next, daemon=True).start()
app.Worker(pool="threads", concurrency=2, quiet=True, loglevel="INFO").start()
"""


@pytest.mark.timeout(180)
def test_a_guarded_worker_outlives_a_restart_of_redis_and_takes_the_next_message(
    tmp_path: Path,
) -> None:
    script = tmp_path / "bare_worker.py"
    script.write_text(WORKER)
    with Valkey(tmp_path / "valkey") as valkey:
        process = start_tethered(
            [sys.executable, script, valkey.url],
            log=tmp_path / "worker.log",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            client = redis.Redis.from_url(valkey.url)
            until(lambda: client.get("started") == b"1", 60, "the first task to start")
            valkey.kill()
            valkey.restart(keep_data=True)
            until(lambda: client.get("ended") == b"1", 60, "the first task to end")
            client.set("next", "now")
            until(lambda: client.get("started") == b"2", 60, "the next task to start")
            assert process.poll() is None
        finally:
            end(process, 20)
