"""One run of a job, with an engine that the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from migrations import run as migrations
from models import jobs, reading, submit
from models.database import Database
from models.outcomes import Claim, Outcome, Succeeded, Transition
from models.tables import Job
from tests.waiting import until
from visq.pixels import PixelBuffer
from visq.settings import Settings
from visq.streams import WorkerInfo
from visq.types import JobRequest, JobStatus
from worker.engine.face import Choice, EngineInfo, EngineRequest, Finished, Handle, TokenEvent
from worker.executor import Executor
from worker.media import Media
from worker.queue import Courier, Maintenance
from worker.runs import Runs


@dataclass
class PlayedEngine:
    text: str = "a cat"
    alive: bool = True
    requests: list[EngineRequest] = field(default_factory=list)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo("small", "played", "cpu", "float32", 0.0, 1000)
    )

    def submit(self, request: EngineRequest) -> Handle:
        self.requests.append(request)
        handle = Handle(lambda: None)
        handle.publish(TokenEvent(self.text, [1]))
        handle.publish(Finished((Choice(self.text, "stop", [1]),), 3))
        return handle

    def close(self) -> None:
        self.alive = False


class SlowMedia:
    """Takes a while for an image that it then has."""

    def load(self, url: str, tenant: str) -> PixelBuffer:
        time.sleep(0.3)
        return cast("PixelBuffer", self)

    sha256 = "0" * 64

    def release(self) -> None:
        pass


@dataclass
class World:
    database: Database
    engine: PlayedEngine
    runs: Runs
    executor: Executor
    tenant_id: str

    def submit(self, **fields: Any) -> str:
        request = JobRequest.model_validate({"prompt": "what is this?"} | fields)
        submitted = self.database.run(submit.submit_job, self.tenant_id, request, max_attempts=3)
        return submitted.job.id

    def job(self, job_id: str) -> Job:
        return self.database.read(jobs.get, job_id)


@pytest.fixture
def world(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[World]:
    migrations.upgrade(database_url)
    settings = Settings(
        data=tmp_path, database_url=database_url, broker_url=redis_url, redis_url=redis_url
    )
    database = Database(database_url)
    courier = Courier(settings, database)
    info = WorkerInfo(
        id="w1", model="small", engine="played", device="cpu", dtype="-", concurrency=1, in_flight=0
    )
    runs = Runs(settings, database, courier.redis, lambda in_flight: info)
    engine = PlayedEngine()
    executor = Executor(
        settings,
        worker_id="w1",
        database=database,
        engine=engine,
        media=cast("Media", SlowMedia()),
        runs=runs,
        courier=courier,
        maintenance=Maintenance(settings, database, courier),
    )
    tenants = database.run(reading.ensure_tenants, ["acme"])
    yield World(database, engine, runs, executor, tenants["acme"])
    executor.close()
    courier.close()
    database.close()


def test_an_answer_with_a_character_that_no_database_takes_is_kept_without_it(
    world: World,
) -> None:
    world.engine.text = "a\0cat"
    job_id = world.submit(session={})
    world.executor.run(job_id)
    job = world.job(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.result is not None
    assert job.result["text"] == "a\ufffdcat"


def test_an_end_that_cannot_be_stored_fails_the_job_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = jobs.finish

    def refuse_success(session: Any, claim: Claim, outcome: Outcome) -> Transition | None:
        if isinstance(outcome, Succeeded):
            raise ValueError("this cannot be stored")
        return finish(session, claim, outcome)

    monkeypatch.setattr(jobs, "finish", refuse_success)
    job_id = world.submit()
    world.executor.run(job_id)
    job = world.job(job_id)
    assert (job.status, job.error_code, job.attempt) == (JobStatus.FAILED, "internal_error", 1)


def test_the_deadline_counts_from_the_claim_and_not_from_the_engine(world: World) -> None:
    world.executor.run(world.submit(images=["s3://a-bucket/cat.png"], expires_in=60))
    [request] = world.engine.requests
    assert request.deadline_seconds is not None
    assert request.deadline_seconds < 59.75


def test_while_the_engine_is_down_no_job_is_claimed(world: World) -> None:
    world.engine.alive = False
    job_id = world.submit()
    thread = threading.Thread(target=world.executor.run, args=(job_id,))
    thread.start()
    time.sleep(0.5)
    assert world.job(job_id).status is JobStatus.QUEUED
    world.engine.alive = True
    until(lambda: world.job(job_id).status is JobStatus.SUCCEEDED, 10, "the answer")
    thread.join()

    world.engine.alive = False
    world.runs.hand_back_all()
    job_id = world.submit()
    world.executor.run(job_id)
    assert world.job(job_id).status is JobStatus.QUEUED
