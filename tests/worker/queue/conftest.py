"""A world with an object store, and the loop that reads and writes there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from migrations import run as migrations
from models import batches, reading, submit
from models.database import Database, db_now
from models.tables import Batch, Job
from tests.models.conftest import World
from visq.objects import ObjectStore, open_store, parse_uri
from visq.settings import Settings
from visq.types import BatchRequest
from visq.types import JobStatus as S
from worker.queue import BatchLoop, Courier


@dataclass
class Files:
    """A world with an object store, and the loop that reads and writes there."""

    world: World
    settings: Settings
    store: ObjectStore
    courier: Courier

    def loop(self) -> BatchLoop:
        return BatchLoop(self.settings, self.world.database, self.store, self.courier, lambda: None)

    def put(self, uri: str, data: bytes) -> None:
        self.store.put(parse_uri(uri), data, "application/octet-stream")

    def get(self, uri: str) -> bytes:
        with self.store.open(parse_uri(uri)) as file:
            return file.read()

    def lines(self, uri: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.get(uri).splitlines()]

    def submit(self, **fields: Any) -> str:
        body = {"input_uri": "s3://data/in.jsonl", "output_uri": "s3://data/out.jsonl"}
        request = BatchRequest.model_validate(body | fields)
        return self.world.database.run(
            submit.submit_batch, self.world.tenant_id, request, max_attempts=3
        ).batch.id

    def run(self) -> None:
        """Everything that is to be done."""
        loop = self.loop()
        while loop.round():
            pass

    def batch(self, batch_id: str) -> Batch:
        return self.world.database.read(batches.get, batch_id)

    def items(self, batch_id: str) -> list[Job]:
        rows = self.world.database.read(reading.list_jobs, batch_id=batch_id, limit=10_000)
        return sorted(rows, key=lambda job: job.position or 0)

    def succeed_all(self, batch_id: str) -> None:
        """As workers would: what is queued, until nothing is."""
        while queued := [job for job in self.items(batch_id) if job.status is S.QUEUED]:
            for job in queued:
                self.world.succeed(job.id)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrations.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def world(database: Database) -> World:
    return World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])


@pytest.fixture
def files(database: Database, world: World, redis_url: str, tmp_path: Path) -> Iterator[Files]:
    settings = Settings(data=tmp_path, broker_url=redis_url, redis_url=redis_url)
    courier = Courier(settings, database)
    store = open_store(settings)
    yield Files(world, settings, store, courier)
    store.close()
    courier.close()


def jsonl(count: int, **more: Any) -> bytes:
    return b"".join(
        json.dumps({"custom_id": f"item-{n}", "prompt": f"picture {n}", **more}).encode() + b"\n"
        for n in range(count)
    )


def let_holds_run_out(session: Session) -> None:
    session.execute(update(Batch).values(held_until=db_now(-1.0)))
