"""Back-pressure: a Celery worker takes from the broker no more messages than it runs jobs (on
RabbitMQ: no more of each lane)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from kombu import Connection

from tests.waiting import until
from visq.embedded.processes import end, start_tethered
from visq.settings import Settings
from visq.types import Lane
from worker.queue.app import RUN_TASK, is_redis, make_app, queue_name

ROOT = Path(__file__).parents[3]

WORKER = """
import sys, threading, time
from pathlib import Path
from visq.settings import Settings
from worker.queue import broker_guard
from worker.queue.app import RUN_TASK, make_app

broker_guard.install()
folder = Path(sys.argv[1])
app = make_app(Settings())

@app.task(name=RUN_TASK)
def run_jobs(job_ids):
    (folder / job_ids[0]).touch()
    while not (folder / "go on").exists():
        time.sleep(0.05)

app.Worker(pool="threads", concurrency=2, quiet=True, without_gossip=True, without_mingle=True,
           without_heartbeat=True, loglevel="INFO").start()
"""


@pytest.mark.timeout(120)
def test_messages_beyond_the_running_jobs_stay_in_the_broker_for_other_workers(
    tmp_path: Path, broker_url: str, redis_url: str
) -> None:
    if is_redis(broker_url):
        # What other tests have started may still publish to the first database of this server.
        broker_url = broker_url.removesuffix("/0") + "/9"
    settings = Settings.model_validate({"broker_url": broker_url, "redis_url": redis_url})
    app = make_app(settings)
    lanes = [Lane.STANDARD, Lane.BATCH]
    with Connection(broker_url) as connection:
        for lane in lanes:
            app.amqp.queues[queue_name(lane)](connection.default_channel).declare()
            connection.default_channel.queue_purge(queue_name(lane))
    for lane in lanes:
        for number in range(6):
            app.send_task(RUN_TASK, [[f"{lane.value} {number}"]], queue=queue_name(lane))
    script, started = tmp_path / "bare_worker.py", tmp_path / "started"
    script.write_text(WORKER)
    started.mkdir()
    process = start_tethered(
        [sys.executable, str(script), str(started)],
        log=tmp_path / "worker.log",
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "VISQ_BROKER_URL": broker_url,
            "VISQ_REDIS_URL": redis_url,
        },
    )
    try:
        until(lambda: len(list(started.iterdir())) == 2, 60, "two running tasks")
        with Connection(broker_url) as connection:
            ready = {
                lane: connection.default_channel.queue_declare(
                    queue_name(lane), passive=True
                ).message_count
                for lane in lanes
            }
        if is_redis(broker_url):
            assert sum(ready.values()) == 10, ready
        else:  # quorum queues limit each consumer, and each lane has one
            assert list(ready.values()) == [4, 4], ready
        (started / "go on").touch()
        until(lambda: len(list(started.iterdir())) == 13, 60, "all tasks")
    finally:
        end(process, 20)
