"""The worker process: loads the model, then takes jobs until it is told to stop.

Celery's thread pool holds the jobs (I/O only); the model runs in the engine process, pictures are
decoded in media processes. The model is loaded before the first message is taken.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import threading
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Final

import redis
import structlog
from celery import Celery, Task, signals
from rich.console import Console

from models import revision
from models.database import Database
from visq import logs
from visq.errors import ConfigurationError
from visq.objects import open_store
from visq.pixels import SHARED_MEMORY
from visq.settings import Settings
from visq.streams import WorkerInfo, announce_failure, withdraw_failures
from visq.types import Lane
from worker.engine import start_engine
from worker.engine.face import EngineInfo
from worker.engine.process import ProcessEngine
from worker.executor import Executor
from worker.media import Media
from worker.metrics import Metrics
from worker.queue import BatchLoop, Courier, Maintenance, broker_guard
from worker.queue.app import RUN_TASK, make_app
from worker.queue.courier import connect_redis
from worker.runs import Runs

log = structlog.get_logger(__name__)

DATABASE_CONNECTIONS: Final = 16
"""Of one worker, and as many more for a moment: a job's transactions take milliseconds, and
PostgreSQL allows 100 connections to all."""

PICTURES_OF_A_JOB: Final = 16 * 1024 * 1024
"""Bytes in shared memory that a job is expected to hold: pictures of 5 megapixels together."""


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    :raises ConfigurationError: the database has no tables, or the model cannot be loaded.
    """
    logs.configure(settings.log_level)
    signals.setup_logging.connect(_keep_our_logging, weak=False)
    console = Console(stderr=True)
    broker_guard.install()
    with ExitStack() as stack:
        database = Database(settings.database, pool_size=DATABASE_CONNECTIONS)
        stack.callback(database.close)
        database.read(revision.check)
        console.print(f"loading the model [bold]{settings.model}[/] ...")
        engine = _start_engine(settings)
        stack.callback(engine.close)
        info = engine.info
        console.print(
            f"loaded [bold]{info.model}[/] on {info.device} ({info.dtype}, engine "
            f"{info.engine}) in {info.load_seconds:.1f} s; context {info.max_context} tokens"
        )
        concurrency = useful_concurrency(settings, info)
        metrics = Metrics(engine, concurrency)
        if settings.metrics_port is not None:
            port, stop = metrics.serve(settings.metrics_host, settings.metrics_port)
            stack.callback(stop)
            console.print(f"metrics on http://{settings.metrics_host}:{port}/metrics")
        worker_id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        store = open_store(settings)
        stack.callback(store.close)
        media = Media(settings, store)
        stack.callback(media.close)
        app = make_app(settings)
        courier = Courier(settings, database, app)
        stack.callback(courier.close)
        maintenance = Maintenance(settings, database, courier)
        maintenance.start()
        stack.callback(maintenance.stop)
        batch_loop = BatchLoop(settings, database, store, courier, maintenance.wake_for_windows)
        batch_loop.start()
        stack.callback(batch_loop.stop)

        started_at = datetime.now(UTC)

        def describe(in_flight: int) -> WorkerInfo:
            return WorkerInfo(
                id=worker_id,
                model=info.model,
                engine=info.engine,
                device=info.device,
                dtype=info.dtype,
                concurrency=concurrency,
                in_flight=in_flight,
                started_at=started_at,
                engine_down=engine.down,
            )

        runs = Runs(settings, database, courier.redis, describe)
        metrics.watch(runs)
        stack.callback(runs.close)
        executor = Executor(
            settings,
            worker_id=worker_id,
            database=database,
            engine=engine,
            media=media,
            runs=runs,
            courier=courier,
            maintenance=maintenance,
        )
        stack.callback(executor.close)
        _withdraw_failures(courier.redis)
        runs.start()
        # What was loaded stays: looking at it again in each collection costs every job something.
        gc.collect()
        gc.freeze()
        console.print(f"worker {worker_id} takes up to {concurrency} jobs at a time")
        return serve(app, settings, concurrency, executor, runs)


def _start_engine(settings: Settings) -> ProcessEngine:
    """Load the model. If that fails, say so where operators look (`/readyz`, `visq doctor`,
    `visq health worker`): this process is about to end, and takes no job.

    :raises ConfigurationError: the model cannot be loaded.
    """
    try:
        return start_engine(settings)
    except ConfigurationError as error:
        client = connect_redis(settings)
        try:
            announce_failure(client, socket.gethostname(), settings.model, error.message)
        except (redis.RedisError, OSError) as outage:
            log.warning("the failure is not announced", error=str(outage))
        finally:
            client.close()
        raise


def _withdraw_failures(client: redis.Redis) -> None:
    try:
        withdraw_failures(client, socket.gethostname())
    except (redis.RedisError, OSError) as outage:
        log.warning("earlier failures are left to their time-out", error=str(outage))


def useful_concurrency(settings: Settings, info: EngineInfo) -> int:
    """How many jobs the worker holds: more than its engine can hold would only keep other workers
    from them, and the pictures of all must have room in shared memory."""
    if settings.concurrency > info.capacity:
        log.warning(
            "VISQ_CONCURRENCY is more than the engine can hold, and is cut",
            asked=settings.concurrency,
            concurrency=info.capacity,
        )
    if settings.concurrency:
        return min(settings.concurrency, info.capacity)
    if not SHARED_MEMORY.is_dir():
        return info.capacity
    room = max(1, shutil.disk_usage(SHARED_MEMORY).total // PICTURES_OF_A_JOB)
    if room < info.capacity:
        log.warning(
            "shared memory has no room for the pictures of all jobs that the engine can hold; "
            "give the worker a larger /dev/shm, or set VISQ_CONCURRENCY if its pictures are small",
            capacity=info.capacity,
            concurrency=room,
        )
    return min(room, info.capacity)


def serve(app: Celery, settings: Settings, concurrency: int, executor: Executor, runs: Runs) -> int:
    """Take messages until a signal; then finish the running jobs, or hand them back."""

    @app.task(name=RUN_TASK, bind=True)
    def run_jobs(task: Task[..., None], job_ids: list[str], alone: bool = False) -> None:
        delivery = task.request.delivery_info or {}
        urgent = delivery.get("routing_key") == Lane.INTERACTIVE.value
        for job_id in job_ids:
            executor.run(job_id, alone=alone, urgent=urgent)

    grace = threading.Timer(settings.shutdown_seconds, runs.hand_back_all)
    grace.daemon = True

    def on_shutdown(**_: object) -> None:
        # Celery's thread pool waits for its jobs without a limit; the limit is ours.
        if not grace.is_alive():
            log.info("shutting down", grace_seconds=settings.shutdown_seconds)
            grace.start()

    signals.worker_shutting_down.connect(on_shutdown, weak=False)
    worker = app.Worker(
        pool="threads",
        concurrency=concurrency,
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    grace.cancel()
    return int(worker.exitcode or 0)


def _keep_our_logging(**_: object) -> None:
    """Celery sets logging up anew at its start unless somebody listens to this signal."""
