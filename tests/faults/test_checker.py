"""The checker itself: a round without a fault is clean, and each planted violation is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from models import jobs
from tests.faults.checker import check
from tests.faults.evidence import Evidence, Rows
from tests.faults.ledger import Asked, Ledger
from tests.faults.played_round import PICTURE, Played
from visq.types import JobStatus


def test_a_round_in_which_nothing_went_wrong_has_no_violation(played: Played) -> None:
    assert played.kinds() == set()


def job_is_gone(played: Played) -> None:
    played.sql("DELETE FROM job_events WHERE job_id = :id", id=played.single)
    played.sql("DELETE FROM jobs WHERE id = :id", id=played.single)


def item_is_gone(played: Played) -> None:
    played.sql("DELETE FROM batch_ends WHERE job_id = :id", id=played.items[0])
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
    newest = max([*played.ledger.jobs, *played.lines])

    def kinds() -> set[str]:
        rows = played.database.read(lambda session: Rows.read(session.connection(), newest))
        return {each.kind for each in check(Ledger(), rows, Evidence())}

    assert kinds() == set()
    played.sql("UPDATE jobs SET status = 'queued', finished_at = NULL WHERE id = :id", id=newest)
    assert kinds() == {"left behind"}
