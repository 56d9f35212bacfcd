"""A steady load from several clients, and a ledger of all that was accepted.

A client that gets no answer asks again, at the other API, with the same ``Idempotency-Key``, until
it is accepted: so all that it asked for is in the ledger, once.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from uuid import uuid4

from tests.deployment import API_KEY
from tests.faults.ledger import Asked, Ledger
from tests.faults.load_files import file_of
from tests.faults.pictures import FILES, MISSING, Pictures, picture
from visq import Client
from visq.errors import NotFound, NotRetriable, Unavailable

QUEUE: Final = "all"
"""The result queue of all jobs."""
PATIENCE_SECONDS: Final = 120.0
SECONDS_BETWEEN_FILES: Final = 2.0

T = TypeVar("T")


@dataclass(frozen=True)
class Amounts:
    """How much of each kind one round submits."""

    jobs: int = 110
    sessions: int = 8
    turns: int = 5
    deleted: int = 2
    """More sessions, which are deleted while their turns run."""
    batches: int = 3
    items: int = 125
    doomed: int = 20
    """Items of one more batch, which is cancelled."""
    files: int = 2
    """More batches, whose items are lines of a file; if there are any, another one each two seconds
    as long as the trickle runs, for who strikes late."""
    lines: int = 60
    cancels: int = 6
    """Of `jobs`: how many are cancelled a moment later,"""
    expiring: int = 6
    """how many may expire,"""
    missing: int = 2
    """how many have a picture that does not exist, and are retried by a call,"""
    uploads: int = 4
    """and how many have a picture that is uploaded before."""
    trickle: float = 12.0
    """Jobs in a second on top of all that, from the beginning until the fault is over: it must
    find a load, however late it strikes."""
    steps: int = 4
    """Of the engine for a short answer."""
    long: int = 20
    """How much longer every fifth answer takes: it may be met by any fault."""
    seconds: float = 3.0
    """Over which all but the trickle is spread."""

    @property
    def total(self) -> int:
        """Without the trickle."""
        turns = (self.sessions + self.deleted) * self.turns
        items = self.batches * self.items + self.doomed + self.files * self.lines
        return self.jobs + turns + items


class Load:
    """The clients of one round: threads, from `start` until `done`."""

    def __init__(
        self,
        urls: Sequence[str],
        seed: int,
        amounts: Amounts,
        pictures: Pictures,
        put: Callable[[str, bytes], None],
        *,
        poison: Sequence[str] = (),
    ) -> None:
        """
        :param put: puts a file into the store, by its name.
        :param poison: prompts of `played_engine` that kill: each is a job and a batch's item.
        """
        self.ledger = Ledger(pictures=pictures)
        self._urls = urls
        self._amounts = amounts
        self._seed = seed
        self._put = put
        self._poison = poison
        self._names = list(pictures.names)
        self._over = threading.Event()
        works = [
            *(lambda chance, part=part: self._some_jobs(chance, part) for part in range(2)),
            *(lambda chance, part=part: self._some_sessions(chance, part) for part in range(2)),
            self._some_batches,
            self._some_files,
            self._some_that_end_badly,
            self._trickle,
        ]
        self._threads = [
            threading.Thread(target=self._guarded, args=(number, work), daemon=True)
            for number, work in enumerate(works)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """End the trickle."""
        self._over.set()

    @property
    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _guarded(self, number: int, work: Callable[[random.Random], None]) -> None:
        try:
            work(random.Random(f"{self._seed}-{number}"))
        except Exception as error:  # noqa: BLE001 (whatever it is, the round has failed)
            self.ledger.problems.append(f"a client failed: {type(error).__name__}: {error}")

    def _some_jobs(self, chance: random.Random, part: int) -> None:
        amounts = self._amounts
        numbers = range(part, amounts.jobs - amounts.missing, 2)
        poison = list(self._poison)[part::2]
        with _Clients(self._urls, chance) as clients:
            for number in numbers:
                self._pause(chance, len(numbers))
                asked = self._asked(chance, f"job {number}")
                more: dict[str, Any] = {"lane": chance.choice(["interactive", "standard"])}
                cancels = number < amounts.cancels
                if cancels:
                    asked = replace(asked, may_be_cancelled=True)
                elif number < amounts.cancels + amounts.expiring:
                    asked = replace(asked, may_expire=True)
                    more["expires_in"] = chance.choice([0.05, 0.3, 1.0])
                elif number < amounts.cancels + amounts.expiring + amounts.uploads:
                    asked = replace(asked, pictures=(self._upload(clients, number),))
                elif poison:
                    asked = Asked(f"{asked.prompt}, {poison.pop()}", poison=True)
                job_id = self._submit(clients, chance, asked, **more)
                if cancels:
                    clients.patiently(lambda client, _, id_=job_id: client.jobs.cancel(id_))

    def _some_sessions(self, chance: random.Random, part: int) -> None:
        count = len(range(part, self._amounts.sessions, 2))
        doomed = len(range(part, self._amounts.deleted, 2))
        with _Clients(self._urls, chance) as clients:
            for number in range(count):
                self._session(clients, chance, f"session {number}", self._amounts.turns)
            for number in range(doomed):
                self._session(clients, chance, f"gone {number}", self._amounts.turns, deleted=True)

    def _session(
        self,
        clients: _Clients,
        chance: random.Random,
        what: str,
        count: int,
        *,
        deleted: bool = False,
    ) -> None:
        session = clients.patiently(lambda client, _: client.sessions.create())
        turns = self.ledger.turns.setdefault(session.id, [])
        for turn in range(count):
            if not deleted:  # else most of its turns wait when it is deleted
                self._pause(chance, self._amounts.sessions * self._amounts.turns // 2)
            asked = replace(self._asked(chance, f"{what} turn {turn}"), may_be_cancelled=deleted)
            turns.append(self._submit(clients, chance, asked, session_id=session.id))
        if deleted:
            self.ledger.deleted.add(session.id)
            calls = Counter[str]()

            def delete(client: Client, _: str) -> None:
                calls["delete"] += 1
                try:
                    client.sessions.delete(session.id)
                except NotFound:
                    if calls["delete"] == 1:
                        raise  # else the call before got through, and its answer did not

            clients.patiently(delete)

    def _some_batches(self, chance: random.Random) -> None:
        amounts = self._amounts
        sizes = [amounts.items] * amounts.batches
        with _Clients(self._urls, chance) as clients:
            for number, size in enumerate(sizes):
                self._pause(chance, len(sizes))
                items = {
                    f"item-{n}": self._asked(chance, f"{number} item {n}") for n in range(size)
                }
                for n, words in enumerate(self._poison if number == 0 else ()):
                    items[f"item-{n}"] = Asked(f"{uuid4().hex[:12]}, {words}", poison=True)
                self._batch(clients, chance, items)
            if amounts.doomed:
                items = {
                    f"item-{n}": replace(self._asked(chance, f"gone {n}"), may_be_cancelled=True)
                    for n in range(amounts.doomed)
                }
                batch_id = self._batch(clients, chance, items)
                self.ledger.cancelled.add(batch_id)
                clients.patiently(lambda client, _: client.batches.cancel(batch_id))

    def _batch(self, clients: _Clients, chance: random.Random, items: dict[str, Asked]) -> str:
        bodies = [{"custom_id": n, **self._options(chance, each)} for n, each in items.items()]
        options: dict[str, Any] = {"result_queue": QUEUE}
        batch = clients.patiently(
            lambda client, key: client.batches.submit(bodies, **options, idempotency_key=key)
        )
        self.ledger.batches[batch.id] = items
        return batch.id

    def _some_files(self, chance: random.Random) -> None:
        """Batches from files."""
        number = 0
        if not self._amounts.files:
            return
        with _Clients(self._urls, chance) as clients:
            while number < self._amounts.files or not self._over.is_set():
                if number < self._amounts.files:
                    self._pause(chance, self._amounts.files)
                elif not self._amounts.trickle or self._over.wait(SECONDS_BETWEEN_FILES):
                    return
                name = f"s3://{FILES}/{uuid4().hex[:12]}"
                data, file = file_of(
                    chance, name, self._amounts.lines, self._asked, self._amounts.steps
                )
                self._put(file.input_uri, data)
                self.ledger.objects.add(file.input_uri)
                options: dict[str, Any] = {
                    "input_uri": file.input_uri,
                    "output_uri": file.output_uri,
                    "dedupe": True,
                    "result_queue": QUEUE,
                }
                batch = clients.patiently(
                    lambda client, key, options=options: client.batches.submit(
                        **options, idempotency_key=key
                    )
                )
                self.ledger.files[batch.id] = file
                number += 1

    def _some_that_end_badly(self, chance: random.Random) -> None:
        """Jobs that fail, and fail again when they are retried."""
        with _Clients(self._urls, chance) as clients:
            for number in range(self._amounts.missing):
                self._pause(chance, self._amounts.missing)
                asked = Asked(f"bad {number}: {uuid4().hex[:12]}", (MISSING,), missing=True)
                job_id = self._submit(clients, chance, asked)
                deadline = time.monotonic() + PATIENCE_SECONDS
                while not clients.patiently(
                    lambda c, _, i=job_id: c.jobs.get(i)
                ).status.is_terminal:
                    if time.monotonic() > deadline:
                        return  # the checker says that it was lost
                    time.sleep(0.1)

                def retry(client: Client, _: str, job_id: str = job_id) -> None:
                    self.ledger.retries[job_id] += 1
                    with suppress(NotRetriable):  # a call got through whose answer did not
                        client.jobs.retry(job_id)

                clients.patiently(retry)

    def _trickle(self, chance: random.Random) -> None:
        """Single jobs, many of them with pictures, and sessions that are soon deleted."""
        number = 0
        with _Clients(self._urls, chance) as clients:
            while self._amounts.trickle and not self._over.is_set():
                self._over.wait(chance.uniform(0, 2 / self._amounts.trickle))
                number += 1
                if number % 8 == 0:
                    self._session(clients, chance, f"trickle {number}", 2, deleted=True)
                else:
                    asked = self._asked(chance, f"trickle {number}", share_of_pictures=0.4)
                    self._submit(clients, chance, asked)

    def _submit(self, clients: _Clients, chance: random.Random, asked: Asked, **more: Any) -> str:
        options = self._options(chance, asked) | {"result_queue": QUEUE} | more
        job = clients.patiently(
            lambda client, key: client.jobs.submit(**options, idempotency_key=key)
        )
        self.ledger.jobs[job.id] = asked
        return job.id

    def _upload(self, clients: _Clients, number: int) -> str:
        """Upload a picture; its name in the store."""
        file = picture(f"upload {self._seed}-{number}")
        view = clients.patiently(lambda client, _: client.images.upload(file))
        self.ledger.pictures.uploaded(view.uri, hashlib.sha256(file).hexdigest())
        return view.uri

    def _asked(self, chance: random.Random, what: str, *, share_of_pictures: float = 0.1) -> Asked:
        prompt = f"{what}: {uuid4().hex[:12]}"
        if chance.random() > share_of_pictures:
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
        time.sleep(chance.uniform(0, 2 * self._amounts.seconds / max(of, 1)))


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
