"""A running API for the client's tests, and a worker that answers by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

import visq
from migrations.run import upgrade
from models import jobs
from models.outcomes import Succeeded
from models.tables import Job
from tests.api.conftest import fresh_secret, settings_for
from tests.api.running import PlayedWorker, RunningApi
from tests.servers import Valkey
from tests.visq.client.faulty import FaultyServer
from visq import types
from visq.types import JobResult, JobStatus, TextPart, Usage


@pytest.fixture(scope="session")
def api(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    folder = tmp_path_factory.mktemp("client-api")
    url = f"sqlite:///{folder / 'visq.db'}"
    upgrade(url)
    with RunningApi(settings_for(url, valkey.url, folder)) as running:
        yield running


@pytest.fixture
def worker(api: RunningApi) -> Iterator[PlayedWorker]:
    """A worker that a test plays by hand."""
    played = PlayedWorker(api.settings)
    yield played
    played.leave()
    played.close()


@pytest.fixture
def secret() -> str:
    return fresh_secret()


@pytest.fixture
def client(api: RunningApi, secret: str) -> Iterator[visq.Client]:
    with visq.Client(api.url, secret) as made:
        yield made


@pytest.fixture
def faulty(api: RunningApi) -> Iterator[FaultyServer]:
    with FaultyServer(api.url) as server:
        yield server


@pytest.fixture
def answering(worker: PlayedWorker) -> Iterator[None]:
    """A worker that answers every job with what it was asked."""
    stop = threading.Event()
    thread = threading.Thread(target=_answer_all, args=(worker, stop))
    thread.start()
    yield
    stop.set()
    thread.join()


def _answer_all(worker: PlayedWorker, stop: threading.Event) -> None:
    def next_id(session: Session) -> str | None:
        return session.scalar(select(Job.id).where(Job.status == JobStatus.QUEUED).limit(1))

    while not stop.wait(0.02):
        while job_id := worker.database.read(next_id):
            work = worker.database.run(jobs.claim, job_id, worker="echo", lease_seconds=60)
            if work is None:
                continue
            prompt = work.prompt.as_messages()
            said = prompt[-1].parts()
            text = "You asked: " + " ".join(p.text for p in said if isinstance(p, TextPart))
            images = sum(not isinstance(part, TextPart) for part in said)
            result = JobResult(
                text=text, finish_reason="stop", usage=Usage(images=images), model="echo"
            )
            for word in text.split(" "):
                worker.courier.events.token(job_id, work.claim.attempt, word + " ")
            answer = types.Message(role="assistant", content=text)
            history = [*prompt, answer] if work.claim.session_id else []
            ended = worker.database.run(jobs.finish, work.claim, Succeeded(result, history))
            assert ended is not None
            worker.courier.deliver_all([ended])
