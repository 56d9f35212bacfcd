"""Claims and successes of several jobs in one transaction: as if each had been done alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from models import batches, groups, jobs, reading
from models.database import Database
from models.outcomes import Claim, Succeeded, Transition, Work
from models.tables import Job, Outbox
from tests.models.conftest import TRANSIENT, World, answered
from visq.types import BatchStatus, Message
from visq.types import JobStatus as S


def claim_all(world: World, *job_ids: str) -> dict[str, Work | None]:
    return world.database.run(groups.claim_all, job_ids, worker="worker-1", lease_seconds=30.0)


def succeed_all(world: World, *works: Work) -> dict[Claim, Transition | None]:
    ends = [(work.claim, answered(work, f"answer to {work.claim.job_id}")) for work in works]
    return world.database.run(groups.succeed_all, ends)


def outbox_of(world: World) -> set[str]:
    """Ids of the jobs whose end is to be published."""
    payloads = world.database.read(lambda session: session.scalars(select(Outbox.payload)).all())
    return {payload["subject"] for payload in payloads}


def holding(world: World, statement: str, job_id: str) -> tuple[threading.Thread, threading.Event]:
    """Another transaction that has locked a row; it ends when the event is set."""
    locked, leave = threading.Event(), threading.Event()

    def hold(session: Session) -> None:
        session.execute(text(statement), {"id": job_id})
        locked.set()
        leave.wait(30)

    thread = threading.Thread(target=world.database.run, args=(hold,))
    thread.start()
    locked.wait(30)
    return thread, leave


def test_a_group_of_claims_is_as_the_claims_alone(world: World) -> None:
    first = world.submit(session={})
    world.succeed(first.id, "a dog")
    group = [world.submit(), world.submit(session_id=first.session_id), world.submit(lane="batch")]
    alone = [world.submit(), world.submit(session={}), world.submit(lane="batch")]
    works = claim_all(world, *(job.id for job in group))
    for job, other in zip(group, alone, strict=True):
        work, expected = works[job.id], world.claimed(other.id)
        assert work is not None
        assert work.claim == Claim(job.id, 1, job.session_id)
        assert (work.tenant, work.lane, work.prompt) == ("acme", other.lane, expected.prompt)
        row, as_expected = world.job(job.id), world.job(other.id)
        assert (row.status, row.attempt, row.worker) == (S.RUNNING, 1, "worker-1")
        assert row.started_at is not None
        assert row.lease_expires_at is not None
        assert as_expected.lease_expires_at is not None
        assert row.publish_at is None
        assert world.history(job.id) == world.history(other.id)
    turn = works[group[1].id]
    assert turn is not None
    assert [remembered.message.role for remembered in turn.history] == ["user", "assistant"]


def test_of_a_group_only_what_is_there_is_claimed(world: World) -> None:
    queued, running, ended, cancelled = (world.submit().id for _ in range(4))
    world.claimed(running)
    world.succeed(ended)
    world.database.run(jobs.cancel, cancelled)
    late = world.submit(expires_in=0.001).id
    works = claim_all(world, queued, running, ended, cancelled, late, "job_that_is_none")
    assert [id_ for id_, work in works.items() if work is not None] == [queued]
    assert works[late] is None
    assert world.job(running).attempt == 1


def test_a_group_of_successes_is_as_the_successes_alone(world: World) -> None:
    batch_id = world.submit_batch(3)
    items = world.database.read(reading.list_jobs, batch_id=batch_id, limit=3)
    turn = world.submit(session={})
    following = world.submit(session_id=turn.session_id)
    single = world.submit()
    group = [turn.id, single.id, *(item.id for item in items)]
    works = [world.claimed(job_id) for job_id in group]
    transitions = succeed_all(world, *works)

    assert outbox_of(world) == {*group, batch_id}
    told: list[str] = []
    for work in works:
        transition = transitions[work.claim]
        assert transition is not None
        row = world.job(work.claim.job_id)
        assert row.status is S.SUCCEEDED
        assert row.result is not None
        assert row.result["text"] == f"answer to {row.id}"
        assert row.lease_expires_at is None
        entry, *ends = transition.events
        told += [end.payload["type"] for end in ends]
        assert entry.payload["subject"] == row.id
        assert entry.payload["data"]["result"]["text"] == row.result["text"]
        assert world.history(row.id)[-1] == (S.RUNNING, S.SUCCEEDED, 1)
    assert told == ["visq.batch.completed"]
    released = transitions[works[0].claim]
    assert released is not None
    assert [job.id for job in released.queued] == [following.id]
    assert world.job(following.id).status is S.QUEUED
    history = world.claimed(following.id).history
    assert [r.message.parts()[0].model_dump()["text"] for r in history] == [
        "what is this?",
        f"answer to {turn.id}",
    ]
    batch = world.database.read(batches.get, batch_id)
    assert (batch.status, batch.succeeded) == (BatchStatus.COMPLETED, 3)


def test_a_run_of_a_group_that_has_lost_its_job_writes_nothing_and_harms_no_other(
    world: World,
) -> None:
    lost, kept = world.claimed(world.submit().id), world.claimed(world.submit().id)
    requeued = world.finish(lost, TRANSIENT)
    assert requeued is not None
    again = world.claimed(lost.claim.job_id)
    assert again.claim.attempt == 2
    transitions = succeed_all(world, lost, kept)
    assert transitions.get(lost.claim) is None
    assert transitions[kept.claim] is not None
    assert world.job(lost.claim.job_id).status is S.RUNNING
    assert outbox_of(world) == {kept.claim.job_id}


def test_the_old_and_the_new_run_of_a_job_may_end_in_one_group(world: World) -> None:
    old = world.claimed(world.submit().id)
    world.finish(old, TRANSIENT)
    new = world.claimed(old.claim.job_id)
    for order in ([old, new], [new, old]):
        with pytest.raises(RuntimeError, match="roll back"):
            world.database.run(_ended_and_rolled_back, order, old, new)
    assert world.job(old.claim.job_id).status is S.RUNNING


def _ended_and_rolled_back(session: Session, order: list[Work], old: Work, new: Work) -> None:
    ends = [(work.claim, answered(work, f"of attempt {work.claim.attempt}")) for work in order]
    transitions = groups.succeed_all(session, ends)
    assert transitions[old.claim] is None
    kept = transitions[new.claim]
    assert kept is not None
    assert kept.job.result is not None
    assert kept.job.result["text"] == "of attempt 2"
    raise RuntimeError("roll back")


def test_a_group_that_fails_has_changed_nothing(world: World) -> None:
    works = [world.claimed(world.submit().id) for _ in range(3)]
    ends = [(work.claim, answered(work, "a cat")) for work in works]
    ends[1] = (ends[1][0], _unstorable(ends[1][1]))
    with pytest.raises(Exception, match="serializ"):
        world.database.run(groups.succeed_all, ends)
    assert [world.job(work.claim.job_id).status for work in works] == [S.RUNNING] * 3
    assert outbox_of(world) == set()


def _unstorable(end: Succeeded) -> Succeeded:
    class Odd:
        def model_dump(self, mode: str) -> object:
            return {"text": object()}

        finish_reason = "stop"

    return replace(end, result=Odd())  # type: ignore[arg-type]


def test_a_deleted_session_gets_no_history(world: World) -> None:
    turn = world.submit(session={})
    work = world.claimed(turn.id)
    assert turn.session_id is not None
    world.database.run(jobs.delete_session, turn.session_id)
    transitions = succeed_all(world, work, world.claimed(world.submit().id))
    assert transitions[work.claim] is not None
    messages = world.database.read(
        reading.session_messages, turn.session_id, after=(0, -1), limit=10
    )
    assert messages == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("what", ["job", "session"])
def test_a_group_waits_for_nobody(world: World, what: str) -> None:
    """SQLite has one writer: there nobody can be in the way."""
    busy, free = world.submit(session={}), world.submit()
    works = [world.claimed(busy.id), world.claimed(free.id)]
    row = {"job": ("jobs", busy.id), "session": ("sessions", busy.session_id)}[what]
    assert row[1] is not None
    thread, leave = holding(world, f"SELECT 1 FROM {row[0]} WHERE id = :id FOR UPDATE", row[1])
    try:
        transitions = succeed_all(world, *works)
    finally:
        leave.set()
        thread.join()
    assert list(transitions) == [works[1].claim]
    assert world.job(busy.id).status is S.RUNNING


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_job_that_another_transaction_has_is_left_out_of_the_claims(world: World) -> None:
    busy, free = world.submit(), world.submit()
    thread, leave = holding(world, "SELECT 1 FROM jobs WHERE id = :id FOR UPDATE", busy.id)
    try:
        works = claim_all(world, busy.id, free.id)
    finally:
        leave.set()
        thread.join()
    assert list(works) == [free.id]
    assert works[free.id] is not None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_groups_on_the_same_batches_do_not_lock_each_other_out(
    world: World, database: Database
) -> None:
    """Ends of two batches in either order, at the same time, again and again."""
    first, second = (world.submit_batch(40) for _ in range(2))
    items = {
        batch: [job.id for job in database.read(reading.list_jobs, batch_id=batch, limit=40)]
        for batch in (first, second)
    }
    works = {id_: world.claimed(id_) for ids in items.values() for id_ in ids}
    pairs = [
        [works[one], works[other]] if n % 2 else [works[other], works[one]]
        for n, (one, other) in enumerate(zip(items[first], items[second], strict=True))
    ]
    ended: list[Transition | None] = []

    def end(mine: list[list[Work]]) -> None:
        for pair in mine:
            ended.extend(succeed_all(world, *pair).values())

    threads = [threading.Thread(target=end, args=(pairs[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([each for each in ended if each is not None]) == 80
    for batch_id in (first, second):
        batch = database.read(batches.get, batch_id)
        assert (batch.status, batch.succeeded) == (BatchStatus.COMPLETED, 40)
    unfinished = database.read(
        lambda session: session.scalars(select(Job.id).where(Job.status == S.RUNNING)).all()
    )
    assert list(unfinished) == []


def test_messages_of_a_group_keep_their_own_exact_tokens(world: World) -> None:
    turns = [world.submit(session={}) for _ in range(2)]
    works = [world.claimed(turn.id) for turn in turns]
    ends = [(w.claim, answered(w, "a cat", [n, n + 1])) for n, w in enumerate(works)]
    world.database.run(groups.succeed_all, ends)
    for number, turn in enumerate(turns):
        following = world.claimed(world.submit(session_id=turn.session_id).id)
        answer = following.history[-1]
        assert answer.message.content == Message(role="assistant", content="a cat").parts()
        assert answer.token_ids == [number, number + 1]
