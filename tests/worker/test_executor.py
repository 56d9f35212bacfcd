"""One run of a job, with an engine that the test plays."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrations import run as migrations
from models import jobs
from models.outcomes import Claim, Outcome, Succeeded, Transition
from models.views import job_view
from tests.waiting import until
from tests.worker.playing import World, played_worker
from visq.settings import Settings
from visq.streams import events_key
from visq.types import JobStatus, TextPart
from worker.engine.face import (
    Choice,
    Finished,
    Handle,
    KnownImage,
)


@pytest.fixture
def world(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[World]:
    migrations.upgrade(database_url)
    settings = Settings(
        data=tmp_path, database_url=database_url, broker_url=redis_url, redis_url=redis_url
    )
    with played_worker(settings) as world:
        yield world


def test_an_answer_with_a_character_that_no_database_takes_is_kept_without_it(
    world: World,
) -> None:
    world.engine.text = "a\0cat"
    job_id = world.submit(session={})
    world.executor.run(job_id)
    job = world.job(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.result is not None
    assert job.result["text"] == "a\ufffdcat"


def test_an_end_that_cannot_be_stored_fails_the_job_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = jobs.finish

    def refuse_success(session: Any, claim: Claim, outcome: Outcome) -> Transition | None:
        if isinstance(outcome, Succeeded):
            raise ValueError("this cannot be stored")
        return finish(session, claim, outcome)

    monkeypatch.setattr(jobs, "finish", refuse_success)
    job_id = world.submit()
    world.executor.run(job_id)
    job = world.job(job_id)
    assert (job.status, job.error_code, job.attempt) == (JobStatus.FAILED, "internal_error", 1)


def test_the_deadline_counts_from_the_claim_and_not_from_the_engine(world: World) -> None:
    world.executor.run(world.submit(images=["s3://a-bucket/cat.png"], expires_in=60))
    [request] = world.engine.requests
    assert request.deadline_seconds is not None
    assert request.deadline_seconds < 59.75


def test_while_the_engine_is_down_no_job_is_claimed(world: World) -> None:
    world.engine.alive = False
    job_id = world.submit()
    thread = threading.Thread(target=world.executor.run, args=(job_id,))
    thread.start()
    time.sleep(0.5)
    assert world.job(job_id).status is JobStatus.QUEUED
    world.engine.alive = True
    until(lambda: world.job(job_id).status is JobStatus.SUCCEEDED, 10, "the answer")
    thread.join()

    world.engine.alive = False
    world.runs.hand_back_all()
    job_id = world.submit()
    world.executor.run(job_id)
    assert world.job(job_id).status is JobStatus.QUEUED


def test_the_engine_is_told_the_tenant_so_that_tenants_share_no_cache(world: World) -> None:
    world.run()
    [request] = world.engine.requests
    assert request.cache_salt == "acme"


def test_the_next_turn_goes_on_from_the_exact_tokens_of_the_answers(world: World) -> None:
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "what is this?"},
    ]
    world.engine.outcome = Finished((Choice("a cat", "stop", [5, 6]),), 3)
    first = world.run(prompt=None, messages=messages, session={})
    world.engine.outcome = Finished((Choice("black", "length", [7]),), 3)
    world.run(session_id=first.session_id)
    world.run(session_id=first.session_id)
    asked = world.engine.requests
    assert [request.answer_ids for request in asked] == [{}, {2: [5, 6]}, {2: [5, 6], 4: [7]}]
    roles = [message.role for message in asked[-1].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_another_tokenizer_gets_the_text_of_an_answer_and_not_its_tokens(world: World) -> None:
    first = world.run(session={})
    world.engine.with_tokenizer("words-2")
    world.run(session_id=first.session_id)
    world.run(session_id=first.session_id)
    world.engine.with_tokenizer("words-1")
    world.run(session_id=first.session_id)
    [_, second, third, fourth] = world.engine.requests
    assert second.answer_ids == {}
    assert list(third.answer_ids) == [3]
    assert list(fourth.answer_ids) == [1]


def test_an_engine_without_a_known_tokenizer_gets_the_text_of_its_own_answers(
    world: World,
) -> None:
    world.engine.with_tokenizer("")
    first = world.run(session={})
    world.run(session_id=first.session_id)
    assert world.engine.requests[-1].answer_ids == {}


def test_the_next_turn_names_a_picture_of_the_history_that_need_not_be_read_again(
    world: World,
) -> None:
    first = world.run(images=["s3://a-bucket/cat.png"], session={})
    second = world.run(session_id=first.session_id)
    [_, request] = world.engine.requests
    [image] = request.images
    assert isinstance(image, KnownImage)
    assert (image.sha256, image.height, image.width) == ("0" * 64, 60, 90)
    result = job_view(second).result
    assert result is not None
    assert result.usage.images == 1


def test_an_answer_that_a_stop_word_ended_is_remembered_by_its_text(world: World) -> None:
    first = world.run(session={}, gen_config={"stop_words": ["."]})
    world.run(session_id=first.session_id)
    assert world.engine.requests[-1].answer_ids == {}


def test_tokens_keep_a_character_that_the_stored_text_cannot(world: World) -> None:
    world.engine.outcome = Finished((Choice("a\0cat", "stop", [5, 0, 6]),), 3)
    first = world.run(session={})
    world.run(session_id=first.session_id)
    assert world.engine.requests[-1].answer_ids == {1: [5, 0, 6]}


def test_the_first_of_several_choices_is_the_sessions_answer(world: World) -> None:
    choices = (Choice("a cat", "stop", [5, 6]), Choice("a dog\0", "length", [5, 7, 8]))
    world.engine.outcome = Finished(choices, 3, cached_tokens=2)
    job = world.run(session={}, gen_config={"n": 2})
    result = job_view(job).result
    assert result is not None
    assert (result.text, result.finish_reason) == ("a cat", "stop")
    assert result.choices is not None
    assert [(choice.text, choice.finish_reason) for choice in result.choices] == [
        ("a cat", "stop"),
        ("a dog\ufffd", "length"),
    ]
    assert (result.usage.completion_tokens, result.usage.cached_tokens) == (5, 2)
    world.run(session_id=job.session_id)
    request = world.engine.requests[-1]
    assert request.answer_ids == {1: [5, 6]}
    assert request.messages[1].content == [TextPart(text="a cat")]


def test_each_choice_has_its_own_text_in_the_stream(world: World) -> None:
    choices = (Choice("a cat", "stop", [5, 6]), Choice("a dog", "stop", [5, 7]))
    world.engine.outcome = Finished(choices, 3)
    job = world.run(gen_config={"n": 2})
    said = [(e.index, e.text) for e in world.streamed(job.id) if e.type == "token"]
    assert sorted(said) == [(0, "a cat"), (1, "a dog")]


def test_one_choice_is_streamed_as_ever(world: World) -> None:
    job = world.run()
    entries: Any = world.courier.redis.xrange(events_key(job.id))
    assert json.loads(entries[1][1][b"event"]) == {"type": "token", "attempt": 1, "text": "a cat"}


def test_logprobs_and_perplexity_are_in_the_stored_result(world: World) -> None:
    logprobs = [{512: -2.5, 7: -0.25}, {9: -0.5, 10: -math.inf}]
    choice = Choice("a cat", "stop", [512, 9], logprobs=logprobs)
    world.engine.outcome = Finished((choice,), 3, ppl=1.5)
    result = job_view(world.run(gen_config={"logprobs": 1, "return_ppl": True})).result
    assert result is not None
    assert result.token_ids == [512, 9]
    assert result.logprobs == [{512: -2.5, 7: -0.25}, {9: -0.5, 10: -9999.0}]
    assert result.ppl == 1.5


def claimed(world: World, job_id: str) -> Claim:
    work = world.database.run(jobs.claim, job_id, worker="w1", lease_seconds=30.0)
    assert work is not None
    return work.claim


def test_a_claim_whose_answer_was_lost_is_handed_back_without_a_failure(world: World) -> None:
    lost, held = world.submit(), world.submit()
    claimed(world, lost)
    with world.runs.holding(claimed(world, held)):
        world.runs.heartbeat()
        assert world.job(lost).status is JobStatus.RUNNING, "nobody has doubts"
        world.runs.doubt_claims()
        world.runs.heartbeat()
        assert world.job(lost).status is JobStatus.RUNNING, "it may just be on its way"
        world.runs.heartbeat()
        job = world.job(lost)
        assert (job.status, job.failures, job.crashes) == (JobStatus.QUEUED, 0, 0)
        assert world.job(held).status is JobStatus.RUNNING


def test_what_nobody_expected_costs_an_attempt_and_not_the_job(world: World) -> None:
    def no_memory(*_: object) -> Handle:
        raise MemoryError

    world.engine.submit = no_memory  # type: ignore[method-assign]
    job = world.run()
    assert (job.status, job.failures) == (JobStatus.QUEUED, 1)


def test_a_second_run_of_a_job_stops_the_first_one_that_this_worker_had_lost(world: World) -> None:
    job_id = world.submit()
    claim = claimed(world, job_id)
    with world.runs.holding(claim) as first, world.runs.holding(replace(claim, attempt=2)):
        assert first.stop_reason == "lost"
