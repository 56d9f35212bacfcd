"""The checker itself: a round without a fault is clean, and each planted violation is found."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from migrations import run as migrations
from models import batches, jobs, outbox, reading, submit
from models.database import Database
from models.outcomes import Failed, Succeeded, Transition, Work
from tests.faults.checker import Evidence, Rows, check
from tests.faults.load import Asked, Ledger
from tests.faults.pictures import Pictures
from tests.faults.played_engine import KILLS_ENGINE, answer_to
from tests.faults.process import CONTROL
from tests.faults.process_handle import Process
from tests.faults.system import SHARED_MEMORY, System
from tests.waiting import until
from visq.embedded.processes import end, start_tethered
from visq.errors import EngineCrashed, ImageNotFound
from visq.pixels import NAME_PREFIX
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
    doomed: list[str]
    """Items of a batch that was cancelled: one succeeded, one did not."""
    expired: str
    retried: str
    """It failed, was retried by a call, and failed again."""
    gone: str
    """The session that was deleted."""
    gone_turns: list[str]

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
        for event in (event for each in transitions for event in each.events):
            job_id = event.payload["data"]["id"]
            self.evidence.events[job_id].append(json.loads(json.dumps(event.payload)))
            values: Any = self.evidence.values
            values[job_id] = copy.deepcopy(event.payload["data"])
            self._database.run(outbox.done, [event.id])


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
    database.close()  # all of it is in the one file now
    return path, Played(
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
    )


@pytest.fixture
def played(played_database: tuple[Path, Played], tmp_path: Path) -> Iterator[Played]:
    """A copy that a test may spoil."""
    path, origin = played_database
    database = Database(f"sqlite:///{tmp_path / 'visq.db'}")
    (tmp_path / "visq.db").write_bytes(path.read_bytes())
    yield replace(
        origin,
        database=database,
        ledger=copy.deepcopy(origin.ledger),
        evidence=copy.deepcopy(origin.evidence),
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
    played.ledger.pictures.versions[PICTURE] = ["cd" * 32]


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


def upload_is_gone(played: Played) -> None:
    played.ledger.pictures.uploaded("s3://visq-uploads/acme/1", "ab" * 32)


def expired_without_a_deadline(played: Played) -> None:
    played.ledger.jobs[played.expired] = Asked("late")


def expired_too_early(played: Played) -> None:
    played.sql(
        "UPDATE jobs SET expires_at = '2100-01-01 00:00:00.000000' WHERE id = :id",
        id=played.expired,
    )


def expired_after_its_end(played: Played) -> None:
    played.sql(
        "UPDATE job_events SET from_status = 'succeeded' "
        "WHERE job_id = :id AND to_status = 'expired'",
        id=played.expired,
    )


def queued_again_though_nobody_retried_it(played: Played) -> None:
    played.ledger.retries.clear()


def was_not_retried(played: Played) -> None:
    played.ledger.retries[played.poison] += 1


def first_life_is_untold(played: Played) -> None:
    del played.evidence.events[played.retried][0]


def second_life_is_untold(played: Played) -> None:
    del played.evidence.events[played.retried][1]


def a_life_is_told_twice(played: Played) -> None:
    events = played.evidence.events[played.retried]
    events.append(events[0] | {"id": "evt_other"})


def redis_tells_of_the_first_life(played: Played) -> None:
    values: Any = played.evidence.values
    values[played.retried] = played.evidence.events[played.retried][0]["data"]


def failed_for_another_reason(played: Played) -> None:
    played.sql("UPDATE jobs SET error_code = 'internal' WHERE id = :id", id=played.retried)


def item_is_cancelled_in_a_batch_that_is_not(played: Played) -> None:
    batch_id = next(iter(played.ledger.cancelled))
    played.ledger.batches[batch_id] = {
        name: Asked(asked.prompt) for name, asked in played.ledger.batches[batch_id].items()
    }


def batch_was_cancelled_unasked(played: Played) -> None:
    played.ledger.cancelled.clear()


def batch_is_cancelling_for_ever(played: Played) -> None:
    played.sql("UPDATE batches SET status = 'cancelling' WHERE status = 'cancelled'")


def session_was_not_deleted(played: Played) -> None:
    played.sql("UPDATE sessions SET deleted_at = NULL")


def session_was_deleted_unasked(played: Played) -> None:
    played.sql("UPDATE sessions SET deleted_at = updated_at")


def deleted_session_has_a_history(played: Played) -> None:
    played.sql(
        "INSERT INTO messages (tenant_id, session_id, turn, position, role, content, job_id, "
        "created_at) SELECT tenant_id, :session, 1, 0, role, content, :job, created_at "
        "FROM messages LIMIT 1",
        session=played.gone,
        job=played.gone_turns[0],
    )


def turn_of_a_deleted_session_is_by_another(played: Played) -> None:
    played.sql("UPDATE jobs SET worker = 'host:4712:xyz' WHERE id = :id", id=played.gone_turns[0])


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
        (upload_is_gone, "lost"),
        (expired_without_a_deadline, "wrong end"),
        (expired_without_a_deadline, "history"),
        (expired_too_early, "wrong end"),
        (expired_after_its_end, "history"),
        (queued_again_though_nobody_retried_it, "history"),
        (was_not_retried, "history"),
        (first_life_is_untold, "untold"),
        (second_life_is_untold, "untold"),
        (a_life_is_told_twice, "told twice"),
        (redis_tells_of_the_first_life, "told wrongly"),
        (failed_for_another_reason, "wrong end"),
        (item_is_cancelled_in_a_batch_that_is_not, "wrong end"),
        (batch_was_cancelled_unasked, "counters"),
        (batch_is_cancelling_for_ever, "counters"),
        (session_was_not_deleted, "left behind"),
        (session_was_deleted_unasked, "left behind"),
        (deleted_session_has_a_history, "left behind"),
        (turn_of_a_deleted_session_is_by_another, "wrong answer"),
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
    assert job.finished_at is not None
    event_is_missing(played)
    redis_has_no_result(played)
    played.evidence.lost_before = job.finished_at + timedelta(seconds=1)
    assert played.kinds() == set()
    played.evidence.lost_before = job.created_at
    assert played.kinds() == {"untold"}


def test_a_loss_of_redis_excuses_no_event_that_rabbitmq_has(played: Played) -> None:
    job = played.database.read(jobs.get, played.single)
    assert job.finished_at is not None
    played.evidence.lost_before = job.finished_at + timedelta(seconds=1)
    played.evidence.events_in_redis = False
    redis_has_no_result(played)
    assert played.kinds() == set()
    event_is_missing(played)
    assert played.kinds() == {"untold"}


def test_each_file_that_a_picture_was_may_have_been_shown_but_nothing_else(played: Played) -> None:
    versions = played.ledger.pictures.versions
    versions[PICTURE] = ["cd" * 32, versions[PICTURE][0]]
    assert played.kinds() == set()
    versions[PICTURE] = ["cd" * 32, "ef" * 32]
    assert "wrong answer" in played.kinds()


def test_a_job_may_miss_a_picture_only_if_it_was_deleted(played: Played) -> None:
    played.ledger.jobs[played.retried] = Asked("bad", (PICTURE,))
    assert "wrong end" in played.kinds()
    played.ledger.pictures.gone.add(PICTURE)
    assert played.kinds() == set()


def test_jobs_of_earlier_rounds_that_have_not_ended_are_found(played: Played) -> None:
    newest = max(played.ledger.jobs)

    def kinds() -> set[str]:
        rows = played.database.read(lambda session: Rows.read(session.connection(), newest))
        return {each.kind for each in check(Ledger(), rows, Evidence())}

    assert kinds() == set()
    played.sql("UPDATE jobs SET status = 'queued', finished_at = NULL WHERE id = :id", id=newest)
    assert kinds() == {"left behind"}


def test_processes_and_shared_memory_that_a_system_leaves_behind_are_found(tmp_path: Path) -> None:
    system = System(tmp_path, "sqlite")
    assert system.left_behind() == []
    environment = os.environ | {CONTROL: str(tmp_path / "control")}
    left = start_tethered(["sleep", "60"], env=environment)
    worker = Process("worker-0", "worker", tmp_path, environment, tmp_path)
    worker.pids.append(left.pid)
    system.processes.append(worker)
    segment = SHARED_MEMORY / f"{NAME_PREFIX.lstrip('/')}{left.pid}-test"
    segment.touch()
    try:
        until(lambda: len(system.left_behind()) == 2, 5, "the two")
        assert system.left_behind() == [f"sleep 60 ({left.pid})", str(segment)]
    finally:
        segment.unlink()
        end(left, 0)
    assert system.left_behind() == []
