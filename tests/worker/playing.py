"""A worker whose engine the test plays: all of it but the model, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from models import jobs, reading, submit
from models.database import Database
from models.outcomes import Claim, Remembered, Work
from models.tables import Job
from visq.pixels import PixelBuffer
from visq.settings import Settings
from visq.streams import StreamEvent, WorkerInfo, events_key
from visq.types import JobRequest, Lane, Prompt
from worker.engine.face import (
    Choice,
    EngineInfo,
    EngineRequest,
    Event,
    Finished,
    Handle,
    TokenEvent,
)
from worker.executor import Executor
from worker.media import LoadedImage, Media
from worker.queue import Courier, Maintenance
from worker.runs import Runs


@dataclass
class PlayedEngine:
    text: str = "a cat"
    outcome: Finished | None = None
    """In place of `text`, said whole."""
    alive: bool = True
    requests: list[EngineRequest] = field(default_factory=list)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            "small", "played", "cpu", "float32", 0.0, 1000, tokenizer="words-1"
        )
    )

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        self.requests.append(request)
        handle = Handle(lambda: None, sink)
        outcome = self.outcome or Finished((Choice(self.text, "stop", [1]),), 3)
        for index, choice in enumerate(outcome.choices):
            handle.publish(TokenEvent(choice.text, choice.token_ids, index))
        handle.publish(outcome)
        return handle

    def with_tokenizer(self, tokenizer: str) -> None:
        self.info = replace(self.info, tokenizer=tokenizer)

    def close(self) -> None:
        self.alive = False


class SlowMedia:
    """Takes a while for an image that it then has."""

    def load(self, url: str, tenant: str) -> LoadedImage:
        time.sleep(0.3)
        return LoadedImage(PixelBuffer("/visq-none", 60, 90, "0" * 64), '"1"')

    def load_if_changed(self, url: str, tenant: str, etag: str) -> LoadedImage | None:
        return None if etag == '"1"' else self.load(url, tenant)


@dataclass
class World:
    """The parts of a worker, and short ways to give it jobs of one tenant."""

    database: Database
    engine: PlayedEngine
    runs: Runs
    executor: Executor
    courier: Courier
    maintenance: Maintenance
    tenant_id: str

    def submit(self, **fields: Any) -> str:
        request = JobRequest.model_validate({"prompt": "what is this?"} | fields)
        submitted = self.database.run(submit.submit_job, self.tenant_id, request, max_attempts=3)
        return submitted.job.id

    def run(self, **fields: Any) -> Job:
        """A job that has been run."""
        job_id = self.submit(**fields)
        self.executor.run(job_id)
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        return self.database.read(jobs.get, job_id)

    def streamed(self, job_id: str) -> list[StreamEvent]:
        entries: Any = self.courier.redis.xrange(events_key(job_id))
        return [StreamEvent.from_fields(fields) for _, fields in entries]


@contextmanager
def played_worker(settings: Settings) -> Iterator[World]:
    """A worker on the servers of `settings`; its database is migrated."""
    database = Database(settings.database)
    courier = Courier(settings, database)
    maintenance = Maintenance(settings, database, courier)
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
        maintenance=maintenance,
    )
    tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
    yield World(database, engine, runs, executor, courier, maintenance, tenant)
    executor.close()
    courier.close()
    database.close()


def claimed_work(*urls: str, history: list[Remembered] | None = None, accept: bool = False) -> Work:
    """A claimed turn that shows the pictures `urls`."""
    return Work(
        claim=Claim("job_1", 1, "ses_1"),
        tenant_id="ten_1",
        tenant="acme",
        lane=Lane.INTERACTIVE,
        batch_id=None,
        dedupe_key=None,
        prompt=Prompt(prompt="what is this?", images=list(urls)),
        accept_changed_images=accept,
        history=history or [],
        expires_in=None,
    )
