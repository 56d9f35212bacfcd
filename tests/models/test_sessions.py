"""Sessions: turns in order, history of what succeeded, forks, deletion."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from models import jobs, sessions
from models.outcomes import ShownPicture, Work
from tests.models.conftest import PERMANENT, World, answered
from visq.errors import InvalidRequest, NotFound, NotRetriable
from visq.types import JobStatus as S
from visq.types import TextPart


def texts(work: Work) -> list[str]:
    """The history that a run sees, as plain texts."""
    return [
        part.text
        for remembered in work.history
        for part in remembered.message.parts()
        if isinstance(part, TextPart)
    ]


def opened(world: World, turns: int) -> list[str]:
    """Ids of the jobs of `turns` turns of one new session, submitted at once."""
    first = world.submit(prompt="turn 1", session={})
    later = [
        world.submit(prompt=f"turn {n}", session_id=first.session_id) for n in range(2, turns + 1)
    ]
    return [first.id, *(job.id for job in later)]


def test_a_turn_waits_for_the_earlier_one_and_is_then_released(world: World) -> None:
    first, second, third = opened(world, 3)
    assert world.statuses() == [S.QUEUED, S.WAITING, S.WAITING]

    transition = world.succeed(first)
    assert [queued.id for queued in transition.queued] == [second]
    assert world.statuses() == [S.SUCCEEDED, S.QUEUED, S.WAITING]
    assert world.claim(third) is None


def test_a_turn_sees_the_history_of_the_turns_before_it(world: World) -> None:
    first, second, third = opened(world, 3)
    world.succeed(first, "answer 1")
    world.succeed(second, "answer 2")
    assert texts(world.claimed(third)) == ["turn 1", "answer 1", "turn 2", "answer 2"]


def exact(work: Work) -> list[tuple[list[int] | None, str | None]]:
    """Of each message of the history that a run sees: its exact tokens, and whose they are."""
    return [(remembered.token_ids, remembered.tokenizer) for remembered in work.history]


TOKENS = [0, 7, 2**31 - 1]


def test_an_answer_is_remembered_with_its_exact_tokens_and_their_tokenizer(world: World) -> None:
    first, second, third = opened(world, 3)
    world.succeed(first, "answer 1", TOKENS)
    world.succeed(second, "answer 2")
    assert exact(world.claimed(third)) == [
        (None, None),
        (TOKENS, "tokenizer-1"),
        (None, None),
        (None, None),
    ]


def test_a_fork_remembers_the_exact_tokens_too(world: World) -> None:
    [first] = opened(world, 1)
    world.succeed(first, "answer 1", TOKENS)
    session_id = world.job(first).session_id
    assert session_id is not None
    fork = world.database.run(sessions.fork, session_id, 1)
    other = world.submit(session_id=fork.id)
    assert exact(world.claimed(other.id)) == [(None, None), (TOKENS, "tokenizer-1")]


RED = ShownPicture(height=60, width=90, etag='"1-2"')


def pictures(work: Work) -> list[list[ShownPicture | None]]:
    """Of each message of the history that a run sees: what is known of its pictures."""
    return [remembered.pictures for remembered in work.history]


def test_what_is_known_of_a_picture_is_remembered_by_its_place_also_in_a_fork(world: World) -> None:
    shown = ["s3://photos/new.png", "s3://photos/red.png", "s3://photos/red.png"]
    first = world.submit(prompt="which is red?", images=shown, session={})
    work = world.claimed(first.id)
    world.finish(work, replace(answered(work, "the first"), pictures={"s3://photos/red.png": RED}))
    second = world.submit(session_id=first.session_id)
    assert pictures(world.claimed(second.id)) == [[None, RED, RED], []]
    assert first.session_id is not None
    fork = world.database.run(sessions.fork, first.session_id, 1)
    other = world.submit(session_id=fork.id)
    assert pictures(world.claimed(other.id)) == [[None, RED, RED], []]


def test_a_failed_turn_leaves_no_trace_in_the_history(world: World) -> None:
    first, second, third = opened(world, 3)
    world.succeed(first, "answer 1")
    world.finish(world.claimed(second), PERMANENT)
    assert texts(world.claimed(third)) == ["turn 1", "answer 1"]


def test_a_cancelled_turn_releases_the_next_one(world: World) -> None:
    first, second, third = opened(world, 3)
    world.database.run(jobs.cancel, second)
    assert world.statuses() == [S.QUEUED, S.CANCELLED, S.WAITING]
    transition = world.database.run(jobs.cancel, first)
    assert [queued.id for queued in transition.queued] == [third]


def test_turns_submitted_by_many_clients_at_once_get_distinct_numbers(world: World) -> None:
    [first] = opened(world, 1)
    session_id = world.job(first).session_id
    start = threading.Barrier(6)

    def submit() -> None:
        start.wait()
        world.submit(session_id=session_id)

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = world.statuses(session_id=session_id)
    assert sorted(statuses) == sorted([S.QUEUED] + 6 * [S.WAITING])


def test_no_turn_is_left_waiting_when_an_end_meets_a_submit(world: World) -> None:
    for _ in range(20):
        [first] = opened(world, 1)
        session_id = world.job(first).session_id
        work = world.claimed(first)
        start = threading.Barrier(2)

        def finish(work: Work = work, start: threading.Barrier = start) -> None:
            start.wait()
            world.finish(work, answered(work, "a"))

        def submit(session_id: str | None = session_id, start: threading.Barrier = start) -> None:
            start.wait()
            world.submit(session_id=session_id)

        threads = [threading.Thread(target=finish), threading.Thread(target=submit)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert world.statuses(session_id=session_id) == [S.SUCCEEDED, S.QUEUED]


def test_a_failed_turn_is_retried_only_while_it_is_the_last(world: World) -> None:
    first, second = opened(world, 2)
    world.finish(world.claimed(first), PERMANENT)
    with pytest.raises(NotRetriable, match="later turns"):
        world.database.run(jobs.retry, first)
    world.finish(world.claimed(second), PERMANENT)
    assert world.database.run(jobs.retry, second).job.status is S.QUEUED


def test_a_fork_continues_from_the_turn_it_was_taken_at(world: World) -> None:
    first, second = opened(world, 2)
    world.succeed(first, "answer 1")
    world.succeed(second, "answer 2")
    session_id = world.job(first).session_id
    assert session_id is not None
    fork = world.database.run(sessions.fork, session_id, 1)

    other = world.submit(prompt="another way", session_id=fork.id)
    assert (other.turn, fork.forked_from) == (2, session_id)
    assert texts(world.claimed(other.id)) == ["turn 1", "answer 1"]
    with pytest.raises(InvalidRequest, match="no turn 9"):
        world.database.run(sessions.fork, session_id, 9)


def test_a_deleted_session_is_gone_and_its_turns_end(world: World) -> None:
    first, second, third = opened(world, 3)
    session_id = world.job(first).session_id
    assert session_id is not None
    work = world.claimed(first)
    transitions = world.database.run(jobs.delete_session, session_id)

    assert not any(transition.queued for transition in transitions)
    assert world.statuses() == [S.RUNNING, S.CANCELLED, S.CANCELLED]
    with pytest.raises(NotFound):
        world.submit(session_id=session_id)
    assert world.finish(work, answered(work, "too late")) is not None
    assert world.database.read(sessions.history, session_id, before_turn=99) == []
    assert second != third
