"""A steady load from several clients, and a ledger of all that was accepted.

A client that gets no answer asks again, at the other API, with the same ``Idempotency-Key``, until
it is accepted: so all that it asked for is in the ledger, once.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar
from uuid import uuid4

from PIL import Image

from tests.deployment import API_KEY
from tests.faults.played_engine import KILLS_ENGINE, KILLS_WORKER
from tests.faults.system import BUCKET, System
from visq import Client
from visq.errors import Unavailable

QUEUE: Final = "all"
"""The result queue of all jobs."""
PICTURES: Final = 12
PATIENCE_SECONDS: Final = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class Amounts:
    """How much of each kind one round submits."""

    jobs: int = 100
    sessions: int = 8
    turns: int = 5
    batches: int = 3
    items: int = 120
    cancels: int = 6
    """Of `jobs`: how many are cancelled a moment later."""
    steps: int = 4
    """Of the engine for a short answer."""
    long: int = 20
    """How much longer every fifth answer takes: it may be met by any fault."""
    seconds: float = 3.0
    """Over which all that is spread."""

    @property
    def total(self) -> int:
        return self.jobs + self.sessions * self.turns + self.batches * self.items


@dataclass(frozen=True)
class Asked:
    """What a job was asked."""

    prompt: str
    pictures: tuple[str, ...] = ()
    """Their names, ``s3://``."""
    poison: bool = False
    may_be_cancelled: bool = False


@dataclass
class Ledger:
    """All that was accepted in one round. Filled by many threads."""

    jobs: dict[str, Asked] = field(default_factory=dict)
    """By job id: single jobs and turns."""
    turns: dict[str, list[str]] = field(default_factory=dict)
    """By session id: the job ids of its turns, in the order in which they were accepted."""
    batches: dict[str, dict[str, Asked]] = field(default_factory=dict)
    """By batch id: its items by ``custom_id``."""
    pictures: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the file of each picture, by its name."""
    problems: list[str] = field(default_factory=list)
    """What a client met that it must not meet."""

    @property
    def total(self) -> int:
        return len(self.jobs) + sum(len(items) for items in self.batches.values())


def put_pictures(system: System) -> dict[str, str]:
    """Small pictures in the bucket: SHA-256 by name."""
    client = system.s3.client()
    found = {}
    for number in range(PICTURES):
        buffer = io.BytesIO()
        colour = tuple(random.Random(number).randrange(256) for _ in range(3))
        Image.new("RGB", (32, 24), colour).save(buffer, "PNG")
        key = f"{number}.png"
        client.put_object(Bucket=BUCKET, Key=key, Body=buffer.getvalue())
        found[f"s3://{BUCKET}/{key}"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return found


class Load:
    """The clients of one round: threads, from `start` until `done`."""

    def __init__(
        self,
        system: System,
        seed: int,
        amounts: Amounts,
        pictures: dict[str, str],
        *,
        poison: Sequence[str] = (),
    ) -> None:
        """:param poison: prompts (`KILLS_ENGINE`, `KILLS_WORKER`) of jobs among the others."""
        self.ledger = Ledger(pictures=pictures)
        self._urls = system.urls
        self._amounts = amounts
        self._seed = seed
        self._poison = list(poison)
        self._spread = amounts.seconds
        self._names = list(pictures)
        self._threads = [
            threading.Thread(target=self._guarded, args=(number, work), daemon=True)
            for number, work in enumerate(self._works())
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _works(self) -> list[Callable[[random.Random], None]]:
        jobs = [self._some_jobs] * 2
        sessions = [self._some_sessions] * 2
        return [*jobs, *sessions, self._some_batches]

    def _guarded(self, number: int, work: Callable[[random.Random], None]) -> None:
        try:
            work(random.Random(f"{self._seed}-{number}"))
        except Exception as error:  # noqa: BLE001 (whatever it is, the round has failed)
            self.ledger.problems.append(f"a client failed: {type(error).__name__}: {error}")

    def _some_jobs(self, chance: random.Random) -> None:
        count = self._amounts.jobs // 2
        with _Clients(self._urls, chance) as clients:
            for number in range(count):
                self._pause(chance, count)
                asked = self._asked(chance, number, "job")
                cancels = number < self._amounts.cancels // 2
                asked = replace(asked, may_be_cancelled=cancels)
                if not cancels:
                    with suppress(IndexError):
                        asked = Asked(f"{asked.prompt}, {self._poison.pop()}", poison=True)
                lane = chance.choice(["interactive", "standard"])
                options = self._options(chance, asked) | {"lane": lane, "result_queue": QUEUE}
                job = clients.patiently(
                    lambda client, key, o=options: client.jobs.submit(**o, idempotency_key=key)
                )
                self.ledger.jobs[job.id] = asked
                if cancels:
                    clients.patiently(lambda client, _, job=job: client.jobs.cancel(job.id))

    def _some_sessions(self, chance: random.Random) -> None:
        count = self._amounts.sessions // 2
        with _Clients(self._urls, chance) as clients:
            for number in range(count):
                session = clients.patiently(lambda client, _: client.sessions.create())
                turns = self.ledger.turns.setdefault(session.id, [])
                for turn in range(self._amounts.turns):
                    self._pause(chance, count * self._amounts.turns)
                    asked = self._asked(chance, turn, f"session {number} turn")
                    more = {"session_id": session.id, "result_queue": QUEUE}
                    options = self._options(chance, asked) | more
                    job = clients.patiently(
                        lambda client, key, o=options: client.jobs.submit(**o, idempotency_key=key)
                    )
                    self.ledger.jobs[job.id] = asked
                    turns.append(job.id)

    def _some_batches(self, chance: random.Random) -> None:
        with _Clients(self._urls, chance) as clients:
            for number in range(self._amounts.batches):
                self._pause(chance, self._amounts.batches)
                items = {
                    f"item-{n}": self._asked(chance, n, f"batch {number} item")
                    for n in range(self._amounts.items)
                }
                bodies = [
                    {"custom_id": id_, **self._options(chance, asked)}
                    for id_, asked in items.items()
                ]
                options: dict[str, Any] = {"result_queue": QUEUE}
                batch = clients.patiently(
                    lambda client, key, b=bodies, o=options: client.batches.submit(
                        b, **o, idempotency_key=key
                    )
                )
                self.ledger.batches[batch.id] = items

    def _asked(self, chance: random.Random, number: int, what: str) -> Asked:
        prompt = f"{what} {number}: {uuid4().hex[:12]}"
        if chance.random() > 0.1:
            return Asked(prompt)
        return Asked(prompt, tuple(chance.sample(self._names, chance.randint(1, 2))))

    def _options(self, chance: random.Random, asked: Asked) -> dict[str, Any]:
        """Of a prompt."""
        steps = self._amounts.steps * (1 if chance.random() < 0.8 else self._amounts.long)
        return {
            "prompt": asked.prompt,
            "images": list(asked.pictures),
            "gen_config": {"max_new_tokens": steps},
        }

    def _pause(self, chance: random.Random, of: int) -> None:
        time.sleep(chance.uniform(0, 2 * self._spread / of))


class _Clients:
    """A client of each API; one call goes to either of them until it is answered."""

    def __init__(self, urls: Sequence[str], chance: random.Random) -> None:
        self._clients = [Client(url, API_KEY, timeout=10, max_retries=0) for url in urls]
        self._chance = chance

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()

    def patiently(self, call: Callable[[Client, str], T]) -> T:
        """Call with a client and an idempotency key of this call."""
        key = uuid4().hex
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return call(self._chance.choice(self._clients), key)
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(self._chance.uniform(0.05, 0.3))


__all__ = ["KILLS_ENGINE", "KILLS_WORKER", "Amounts", "Asked", "Ledger", "Load", "put_pictures"]
