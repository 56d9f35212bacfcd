"""The real API in a thread of the test process, and a worker that the test plays."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import httpx2

from api.main import make_server
from models import jobs
from models.database import Database
from models.outcomes import Claim, Failed, Succeeded
from tests.waiting import until
from visq import types
from visq.errors import EngineCrashed, EngineError
from visq.settings import Settings
from visq.streams import WorkerInfo, announce_worker, withdraw_worker
from visq.types import Choice, JobResult, Usage
from worker.queue import Courier


class RunningApi:
    """``with RunningApi(settings) as api: api.url``; the database must have its tables."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._server = make_server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = ""

    def __enter__(self) -> RunningApi:
        self._thread.start()
        until(lambda: self._server.started or not self._thread.is_alive(), 30, "the API to start")
        [listener] = self._server.servers[0].sockets
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the API did not stop"

    def client(self, secret: str, **options: Any) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {secret}"}, timeout=30, **options
        )


class PlayedWorker:
    """Does what a worker does with a job, step by step."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database)
        self.courier = Courier(settings, self.database)

    def close(self) -> None:
        self.courier.close()
        self.database.close()

    def announce(self, model: str = "small", worker_id: str = "w1") -> None:
        info = WorkerInfo(
            id=worker_id,
            model=model,
            engine="generate",
            device="cpu",
            dtype="float32",
            concurrency=4,
            in_flight=0,
            started_at=datetime.now(UTC),
        )
        announce_worker(self.courier.redis, info, ttl_seconds=60)

    def leave(self, worker_id: str = "w1") -> None:
        withdraw_worker(self.courier.redis, worker_id)

    def claim(self, job_id: str, *, lease_seconds: float = 300) -> Claim:
        work = self.database.run(jobs.claim, job_id, worker="w1", lease_seconds=lease_seconds)
        assert work is not None, f"{job_id} cannot be claimed"
        self.claimed = work
        return work.claim

    def begin(self, job_id: str) -> Claim:
        """Claim, and open the token stream."""
        claim = self.claim(job_id)
        self.courier.events.attempt(job_id, claim.attempt)
        return claim

    def say(self, claim: Claim, text: str, index: int = 0) -> None:
        self.courier.events.token(claim.job_id, claim.attempt, text, index)

    def succeed(
        self,
        claim: Claim,
        text: str = "Three.",
        *others: str,
        token_ids: list[int] | None = None,
        publish: bool = True,
    ) -> None:
        """
        :param others: texts of further choices.
        :param token_ids: exact tokens of the answer.
        """
        choices = [Choice(text=said, finish_reason="stop") for said in (text, *others)]
        result = JobResult(
            text=text,
            finish_reason="stop",
            usage=Usage(prompt_tokens=7, completion_tokens=2, images=0),
            model="small",
            choices=choices if others else None,
        )
        prompt = self.claimed.prompt.as_messages() if claim.session_id else []
        answer = types.Message(role="assistant", content=text)
        self._finish(claim, Succeeded(result, [*prompt, answer], token_ids), publish)

    def fail(self, claim: Claim, *, retryable: bool = False) -> None:
        error = EngineCrashed("the engine crashed") if retryable else EngineError("it cannot")
        self._finish(claim, Failed(error, backoff_seconds=60), True)

    def hand_back(self, claim: Claim) -> None:
        """The job is queued again, as when a worker shuts down."""
        self._finish(claim, jobs.HandedBack("the worker shut down"), True)

    def stop(self, claim: Claim) -> None:
        self._finish(claim, jobs.Cancelled(), True)

    def answer(self, job_id: str, text: str = "Three.") -> None:
        """The whole of it."""
        claim = self.begin(job_id)
        self.say(claim, text)
        self.succeed(claim, text)

    def _finish(self, claim: Claim, outcome: jobs.Outcome, publish: bool) -> None:
        transition = self.database.run(jobs.finish, claim, outcome)
        assert transition is not None, f"the claim on {claim.job_id} is lost"
        if publish:
            self.courier.deliver_all([transition])


@dataclass(frozen=True)
class Sent:
    """One Server-Sent Event."""

    id: str | None
    event: str
    data: Any


def events_of(response: httpx2.Response) -> Iterator[Sent]:
    """Parse an event stream as it comes; comments are left out."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Sent(fields.get("id"), fields["event"], json.loads(fields["data"]))
            fields = {}
