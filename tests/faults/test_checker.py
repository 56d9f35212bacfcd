"""The checker itself: a round without a fault is clean, and each planted violation is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from migrations import run as migrations
from models import jobs, outbox, reading, submit
from models.database import Database
from models.outcomes import Failed, Succeeded, Work
from tests.faults.checker import Evidence, Rows, check
from tests.faults.load import Asked, Ledger
from tests.faults.played_engine import KILLS_ENGINE, answer_to
from visq.errors import EngineCrashed
from visq.types import BatchRequest, ImagePart, JobRequest, JobResult, JobStatus, Message, Usage

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

    def kinds(self) -> set[str]:
        """Of the violations that the checker finds now."""
        rows = self.database.read(lambda session: Rows.read(session.connection(), "job_"))
        return {violation.kind for violation in check(self.ledger, rows, self.evidence)}

    def sql(self, statement: str, **values: Any) -> None:
        self.database.run(lambda session: session.execute(text(statement), values))


class _Player:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
        self.ledger = Ledger(pictures={PICTURE: "ab" * 32})
        self.evidence = Evidence(values={})

    def ask(self, asked: Asked, **fields: Any) -> str:
        request = JobRequest.model_validate(
            {"prompt": asked.prompt, "images": list(asked.pictures)} | fields
        )
        job = self._database.run(submit.submit_job, self._tenant, request, max_attempts=1).job
        self.ledger.jobs[job.id] = asked
        if job.session_id is not None:
            self.ledger.turns.setdefault(job.session_id, []).append(job.id)
        return job.id

    def ask_batch(self, items: dict[str, Asked]) -> list[str]:
        request = BatchRequest.model_validate(
            {"items": [{"custom_id": id_, "prompt": each.prompt} for id_, each in items.items()]}
        )
        batch = self._database.run(submit.submit_batch, self._tenant, request, max_attempts=1).batch
        self.ledger.batches[batch.id] = items
        rows = self._database.read(reading.list_jobs, batch_id=batch.id, limit=100)
        return [job.id for job in rows]

    def run(self, job_id: str) -> None:
        work = self._claim(job_id)
        history = [remembered.message for remembered in work.history]
        request = work.prompt.as_messages()
        shown = [
            self.ledger.pictures[part.image_url.url]
            for message in [*history, *request]
            for part in message.parts()
            if isinstance(part, ImagePart)
        ]
        answer = answer_to([*history, *request], shown, WORKER_PID)
        result = JobResult(text=answer, finish_reason="stop", usage=Usage(), model="played")
        end = Succeeded(result, [*request, Message(role="assistant", content=answer)])
        self._finish(work, end)

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
        for event in transition.events:
            self.evidence.events[work.claim.job_id].append(json.loads(json.dumps(event.payload)))
            values: Any = self.evidence.values
            values[work.claim.job_id] = copy.deepcopy(event.payload["data"])
        self._database.run(outbox.done, [event.id for event in transition.events])


@pytest.fixture(scope="module")
def played_database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Played]:
    path = tmp_path_factory.mktemp("played") / "visq.db"
    migrations.upgrade(f"sqlite:///{path}")
    database = Database(f"sqlite:///{path}")
    player = _Player(database)
    single = player.ask(Asked("one", (PICTURE,)))
    first = player.ask(Asked("turn 1", (PICTURE,)), session={})
    session_id = database.read(jobs.get, first).session_id
    turns = [first] + [player.ask(Asked(f"turn {n}"), session_id=session_id) for n in (2, 3)]
    items = player.ask_batch({f"item-{n}": Asked(f"item {n}") for n in range(3)})
    poison = player.ask(Asked(KILLS_ENGINE, poison=True))
    for job_id in (single, *turns, *items):
        player.run(job_id)
    player.die(poison)
    database.close()  # all of it is in the one file now
    return path, Played(database, player.ledger, player.evidence, single, turns, items, poison)


@pytest.fixture
def played(played_database: tuple[Path, Played], tmp_path: Path) -> Iterator[Played]:
    """A copy that a test may spoil."""
    path, origin = played_database
    database = Database(f"sqlite:///{tmp_path / 'visq.db'}")
    (tmp_path / "visq.db").write_bytes(path.read_bytes())
    yield Played(
        database,
        copy.deepcopy(origin.ledger),
        copy.deepcopy(origin.evidence),
        origin.single,
        origin.turns,
        origin.items,
        origin.poison,
    )
    database.close()


def test_a_round_in_which_nothing_went_wrong_has_no_violation(played: Played) -> None:
    assert played.kinds() == set()


def job_is_gone(played: Played) -> None:
    played.sql("DELETE FROM job_events WHERE job_id = :id", id=played.single)
    played.sql("DELETE FROM jobs WHERE id = :id", id=played.single)


def item_is_gone(played: Played) -> None:
    played.sql("DELETE FROM job_events WHERE job_id = :id", id=played.items[0])
    played.sql("DELETE FROM jobs WHERE id = :id", id=played.items[0])


def job_never_ends(played: Played) -> None:
    played.sql("UPDATE jobs SET status = 'queued' WHERE id = :id", id=played.single)


def job_was_accepted_twice(played: Played) -> None:
    del played.ledger.jobs[played.single]


def job_failed(played: Played) -> None:
    played.sql("UPDATE jobs SET status = 'failed' WHERE id = :id", id=played.single)


def poison_succeeded(played: Played) -> None:
    played.ledger.jobs[played.single] = Asked("one", (PICTURE,), poison=True)


def neighbour_was_blamed(played: Played) -> None:
    played.sql("UPDATE jobs SET failures = 1 WHERE id = :id", id=played.single)


def ended_twice(played: Played) -> None:
    played.sql(
        "INSERT INTO job_events (tenant_id, job_id, at, from_status, to_status, attempt) SELECT "
        "tenant_id, job_id, at, from_status, to_status, attempt FROM job_events "
        "WHERE job_id = :id AND to_status = 'succeeded'",
        id=played.single,
    )


def never_claimed(played: Played) -> None:
    played.sql(
        "UPDATE job_events SET from_status = 'queued' "
        "WHERE job_id = :id AND to_status = 'succeeded'",
        id=played.single,
    )
    played.sql(
        "DELETE FROM job_events WHERE job_id = :id AND to_status = 'running'", id=played.single
    )


def claim_was_not_counted(played: Played) -> None:
    played.sql("UPDATE jobs SET attempt = 2 WHERE id = :id", id=played.single)


def written_by_a_run_that_had_lost_it(played: Played) -> None:
    played.sql("UPDATE jobs SET worker = 'host:4712:xyz' WHERE id = :id", id=played.single)


def shown_another_picture(played: Played) -> None:
    played.ledger.pictures[PICTURE] = "cd" * 32


def lease_is_left(played: Played) -> None:
    played.sql("UPDATE jobs SET lease_expires_at = created_at WHERE id = :id", id=played.single)


def event_is_missing(played: Played) -> None:
    del played.evidence.events[played.single]


def event_has_two_ids(played: Played) -> None:
    [event] = played.evidence.events[played.single]
    played.evidence.events[played.single].append(event | {"id": "evt_other"})


def event_tells_another_result(played: Played) -> None:
    [event] = played.evidence.events[played.single]
    event["data"]["result"]["text"] = "something else"


def redis_tells_another_result(played: Played) -> None:
    value = played.evidence.values[played.single]
    assert value is not None
    value["attempt"] = 9


def redis_has_no_result(played: Played) -> None:
    values: Any = played.evidence.values
    del values[played.single]


def outbox_is_not_empty(played: Played) -> None:
    played.sql(
        "INSERT INTO outbox (id, kind, payload, tries, available_at, created_at) "
        "SELECT 'evt_1', 'result', '{}', 0, created_at, created_at FROM jobs LIMIT 1"
    )


def object_is_left(played: Played) -> None:
    played.evidence.objects = [PICTURE, "s3://visq-uploads/unfinished"]


def turns_ran_in_another_order(played: Played) -> None:
    first, second, _ = played.turns
    turns = next(iter(played.ledger.turns.values()))
    turns[0], turns[1] = second, first


def turn_is_missing_in_the_history(played: Played) -> None:
    played.sql("DELETE FROM messages WHERE job_id = :id", id=played.turns[1])


def turn_is_doubled_in_the_history(played: Played) -> None:
    played.sql(
        "INSERT INTO messages (tenant_id, session_id, turn, position, role, content, job_id, "
        "created_at) SELECT tenant_id, session_id, turn, position + 2, role, content, job_id, "
        "created_at FROM messages WHERE job_id = :id",
        id=played.turns[1],
    )


def turn_is_kept_wrongly(played: Played) -> None:
    played.sql(
        "UPDATE messages SET content = :content WHERE job_id = :id AND role = 'assistant'",
        id=played.turns[2],
        content=json.dumps([{"type": "text", "text": "something else"}]),
    )


def turns_overlapped(played: Played) -> None:
    played.sql(
        "UPDATE jobs SET started_at = '2000-01-01 00:00:00.000000' WHERE id = :id",
        id=played.turns[1],
    )


def counter_is_wrong(played: Played) -> None:
    played.sql("UPDATE batches SET succeeded = succeeded - 1, failed = failed + 1")


def batch_has_not_ended(played: Played) -> None:
    played.sql("UPDATE batches SET status = 'in_progress'")


def client_met_an_error(played: Played) -> None:
    played.ledger.problems.append("a client failed: 500")


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (job_is_gone, "lost"),
        (item_is_gone, "lost"),
        (job_never_ends, "lost"),
        (job_was_accepted_twice, "doubled"),
        (job_failed, "wrong end"),
        (poison_succeeded, "wrong end"),
        (neighbour_was_blamed, "blamed"),
        (ended_twice, "history"),
        (never_claimed, "history"),
        (claim_was_not_counted, "history"),
        (written_by_a_run_that_had_lost_it, "wrong answer"),
        (shown_another_picture, "wrong answer"),
        (lease_is_left, "left behind"),
        (event_is_missing, "untold"),
        (event_has_two_ids, "told twice"),
        (event_tells_another_result, "told wrongly"),
        (redis_tells_another_result, "told wrongly"),
        (redis_has_no_result, "untold"),
        (outbox_is_not_empty, "left behind"),
        (object_is_left, "left behind"),
        (turns_ran_in_another_order, "out of order"),
        (turn_is_missing_in_the_history, "out of order"),
        (turn_is_doubled_in_the_history, "out of order"),
        (turn_is_kept_wrongly, "out of order"),
        (turns_overlapped, "out of order"),
        (counter_is_wrong, "counters"),
        (batch_has_not_ended, "counters"),
        (client_met_an_error, "client"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_violation_is_found(
    played: Played, plant: Callable[[Played], None], kind: str
) -> None:
    plant(played)
    assert kind in played.kinds()


def test_only_what_redis_had_before_it_lost_its_data_may_be_missing(played: Played) -> None:
    job = played.database.read(jobs.get, played.single)
    assert job.status is JobStatus.SUCCEEDED
    event_is_missing(played)
    redis_has_no_result(played)
    played.evidence.lost_before = job.finished_at
    assert played.kinds() == set()
    earlier = played.database.read(jobs.get, played.single).created_at
    played.evidence.lost_before = earlier
    assert played.kinds() == {"untold"}
