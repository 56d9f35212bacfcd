"""A round that is played without processes, for the tests of the checker: clean, and quick."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import text

from migrations import run as migrations
from models import batch_holds, batches, jobs, outbox, reading, submit
from models.batch_holds import place_of
from models.batch_items import ImageOrder
from models.database import Database
from models.outbox import OutboxEntry
from models.outcomes import Failed, Succeeded, Transition, Work
from tests.faults.checker import check
from tests.faults.evidence import Evidence, Rows
from tests.faults.ledger import Asked, AskedFile, Ledger
from tests.faults.load_files import file_of
from tests.faults.pictures import FILES, Pictures
from tests.faults.played_engine import KILLS_ENGINE, answer_to
from tests.waiting import until
from visq.batch_files import output_names
from visq.errors import EngineCrashed, ImageNotFound
from visq.objects import ObjectStore, open_store, parse_uri
from visq.settings import Settings
from visq.types import BatchRequest, ImagePart, JobRequest, JobResult, Message, Usage
from worker.queue.batch_reading import BatchReader
from worker.queue.batch_writing import BatchWriter

PICTURE = "s3://pictures/1.png"
WORKER_PID = 4711
WORKER = f"host:{WORKER_PID}:abc"


@dataclass
class Played:
    """A round that was played without processes: jobs, turns, a batch, a poison."""

    database: Database
    ledger: Ledger
    evidence: Evidence
    single: str
    turns: list[str]
    items: list[str]
    poison: str
    doomed: list[str]
    """Items of a batch that was cancelled: one succeeded, one did not."""
    expired: str
    retried: str
    """It failed, was retried by a call, and failed again."""
    gone: str
    """The session that was deleted."""
    gone_turns: list[str]
    file: AskedFile
    """The batch from a file,"""
    lines: list[str]
    """and its items, by position."""

    def kinds(self) -> set[str]:
        """Of the violations that the checker finds now."""
        rows = self.database.read(lambda session: Rows.read(session.connection(), "job_"))
        return {violation.kind for violation in check(self.ledger, rows, self.evidence)}

    def sql(self, statement: str, **values: Any) -> None:
        self.database.run(lambda session: session.execute(text(statement), values))


class _Player:
    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._store = store
        self._tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
        self.ledger = Ledger(pictures=Pictures({PICTURE: ["ab" * 32]}, names=[PICTURE]))
        self.evidence = Evidence(values={}, objects=[PICTURE])

    def ask(self, asked: Asked, **fields: Any) -> str:
        request = JobRequest.model_validate(
            {"prompt": asked.prompt, "images": list(asked.pictures)} | fields
        )
        job = self._database.run(submit.submit_job, self._tenant, request, max_attempts=1).job
        self.ledger.jobs[job.id] = asked
        if job.session_id is not None:
            self.ledger.turns.setdefault(job.session_id, []).append(job.id)
        return job.id

    def ask_file(self, file: AskedFile, data: bytes, settings: Settings) -> list[str]:
        """A batch from a file, which is read."""
        self._store.put(parse_uri(file.input_uri), data, "application/jsonl")
        self.ledger.objects.add(file.input_uri)
        request = BatchRequest(
            input_uri=file.input_uri, output_uri=file.output_uri, dedupe=True, result_queue="all"
        )
        batch = self._database.run(submit.submit_batch, self._tenant, request, max_attempts=1).batch
        self.ledger.files[batch.id] = file
        hold = self._database.run(batch_holds.take, seconds=30.0)
        assert hold is not None
        reader = BatchReader(settings, self._database, self._store, lambda: None)
        for chunk in reader.chunks(hold.batch, hold.tenant, place_of(hold.batch)):
            events = self._database.run(
                batch_holds.add_chunk,
                hold,
                chunk.items,
                ImageOrder(),
                place=chunk.place,
                is_last=chunk.is_last,
                seconds=30.0,
            )
            self._tell_events(events)
        rows = self._database.read(reading.list_jobs, batch_id=batch.id, limit=100)
        return [job.id for job in sorted(rows, key=lambda job: job.position or 0)]

    def write_output(self, settings: Settings) -> None:
        """Of the batch whose items have all ended."""
        hold = self._database.run(batch_holds.take, seconds=30.0)
        assert hold is not None
        writer = BatchWriter(settings, self._database, self._store)
        written = writer.write(hold.batch, hold.tenant, lambda: None)
        self._tell_events(self._database.run(batch_holds.close, hold, *written))
        file = self.ledger.files[hold.batch.id]
        names = [file.input_uri, *astuple(output_names(file.output_uri))]
        for name in names:
            with self._store.open(parse_uri(name)) as read:
                self.evidence.files[name] = read.read()
        self.evidence.objects += names

    def ask_batch(self, items: dict[str, Asked]) -> list[str]:
        request = BatchRequest.model_validate(
            {"items": [{"custom_id": id_, "prompt": each.prompt} for id_, each in items.items()]}
        )
        batch = self._database.run(submit.submit_batch, self._tenant, request, max_attempts=1).batch
        self.ledger.batches[batch.id] = items
        rows = self._database.read(reading.list_jobs, batch_id=batch.id, limit=100)
        return [job.id for job in rows]

    def fail(self, job_id: str) -> None:
        self._finish(self._claim(job_id), Failed(ImageNotFound("there is none"), 0.0))

    def retry(self, job_id: str) -> None:
        self._database.run(jobs.retry, job_id)
        self.ledger.retries[job_id] += 1

    def cancel_batch(self, job_id: str, rest: Sequence[str]) -> None:
        batch_id = self._database.read(jobs.get, job_id).batch_id
        assert batch_id is not None
        self._database.run(batches.request_cancel, batch_id)
        self.ledger.cancelled.add(batch_id)
        self._tell(*(self._database.run(jobs.cancel, each) for each in rest))

    def delete_session(self, session_id: str) -> None:
        self.ledger.deleted.add(session_id)
        self._tell(*self._database.run(jobs.delete_session, session_id))

    def expire(self, job_id: str) -> None:
        until(lambda: job_id in self._database.read(jobs.past_deadline, 9), 5, "the deadline")
        transition = self._database.run(jobs.expire, job_id)
        assert transition is not None
        self._tell(transition)

    def run(self, job_id: str) -> None:
        work = self._claim(job_id)
        if (found := self._answered_before(work)) is not None:
            self._finish(work, Succeeded(found, []))
            return
        history = [remembered.message for remembered in work.history]
        request = work.prompt.as_messages()
        shown = [
            self.ledger.pictures.versions[part.image_url.url][-1]
            for message in [*history, *request]
            for part in message.parts()
            if isinstance(part, ImagePart)
        ]
        answer = answer_to([*history, *request], shown, WORKER_PID)
        result = JobResult(text=answer, finish_reason="stop", usage=Usage(), model="played")
        end = Succeeded(result, [*request, Message(role="assistant", content=answer)])
        self._finish(work, end)

    def _answered_before(self, work: Work) -> JobResult | None:
        if work.batch_id is None or work.dedupe_key is None:
            return None
        return self._database.read(
            reading.answered_before, work.batch_id, work.dedupe_key, work.claim.job_id
        )

    def die(self, job_id: str) -> None:
        """As a poison does, until it is a dead letter."""
        for alone in (False, False, True):
            self._finish(self._claim(job_id, alone), Failed(EngineCrashed("dead"), 0.0))

    def _claim(self, job_id: str, alone: bool = False) -> Work:
        work = self._database.run(
            jobs.claim, job_id, worker=WORKER, lease_seconds=30.0, alone=alone
        )
        assert work is not None
        return work

    def _finish(self, work: Work, end: Succeeded | Failed) -> None:
        transition = self._database.run(jobs.finish, work.claim, end)
        assert transition is not None
        self._tell(transition)

    def _tell(self, *transitions: Transition) -> None:
        self._tell_events([event for each in transitions for event in each.events])

    def _tell_events(self, events: Sequence[OutboxEntry]) -> None:
        for event in events:
            about = event.payload["data"]["id"]
            self.evidence.events[about].append(json.loads(json.dumps(event.payload)))
            if event.kind == "result":
                self.evidence.values[about] = copy.deepcopy(event.payload["data"])
            self._database.run(outbox.done, [event.id])


def play(path: Path) -> Played:
    """Play a round in the SQLite file `path`; its database is closed."""
    migrations.upgrade(f"sqlite:///{path}")
    database = Database(f"sqlite:///{path}")
    settings = Settings(data=path.parent / "data", object_store=f"file://{path.parent}/objects")
    store = open_store(settings)
    player = _Player(database, store)
    single = player.ask(Asked("one", (PICTURE,)))
    first = player.ask(Asked("turn 1", (PICTURE,)), session={})
    session_id = database.read(jobs.get, first).session_id
    turns = [first] + [player.ask(Asked(f"turn {n}"), session_id=session_id) for n in (2, 3)]
    items = player.ask_batch({f"item-{n}": Asked(f"item {n}") for n in range(3)})
    poison = player.ask(Asked(KILLS_ENGINE, poison=True))
    for job_id in (single, *turns, *items):
        player.run(job_id)
    player.die(poison)
    doomed = player.ask_batch(
        {f"item-{n}": Asked(f"doomed {n}", may_be_cancelled=True) for n in range(2)}
    )
    player.run(doomed[0])
    player.cancel_batch(doomed[0], doomed[1:])
    expired = player.ask(Asked("late", may_expire=True), expires_in=0.01)
    player.expire(expired)
    retried = player.ask(Asked("bad", (PICTURE,), missing=True))
    player.fail(retried)
    player.retry(retried)
    player.fail(retried)
    gone_turns = [player.ask(Asked("gone 1", may_be_cancelled=True), session={})]
    gone = database.read(jobs.get, gone_turns[0]).session_id
    assert gone is not None
    gone_turns.append(player.ask(Asked("gone 2", may_be_cancelled=True), session_id=gone))
    player.run(gone_turns[0])
    player.delete_session(gone)
    data, file = file_of(Random(1), f"s3://{FILES}/a", 30, lambda _, words: Asked(words), 4)
    lines = player.ask_file(file, data, settings)
    for job_id, line in zip(lines, file.lines, strict=True):
        if not line.asked.wrong:
            player.run(job_id)
    player.write_output(settings)
    store.close()
    database.close()  # all of it is in the one file now
    return Played(
        database,
        player.ledger,
        player.evidence,
        single,
        turns,
        items,
        poison,
        doomed,
        expired,
        retried,
        gone,
        gone_turns,
        file,
        lines,
    )
