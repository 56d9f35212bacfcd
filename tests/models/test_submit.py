"""Acceptance: idempotency by key, also when two come at the same time."""

from __future__ import annotations

import threading

import pytest

from models.views import job_view
from tests.models.conftest import World
from visq.errors import IdempotencyConflict, NotFound
from visq.ids import new_id
from visq.types import JobRequest


def test_a_new_job_can_be_shown_after_its_transaction(world: World) -> None:
    view = job_view(world.submit(expires_in=60))
    assert view.expires_at is not None
    assert view.expires_at > view.created_at


def test_a_repeat_of_the_key_returns_the_first_job(world: World) -> None:
    first = world.submit(key="k1", prompt="same")
    assert world.submit(key="k1", prompt="same").id == first.id
    assert world.submit(key="k2", prompt="same").id != first.id
    assert world.submit(prompt="same").id != first.id


def test_the_key_with_another_body_is_a_conflict(world: World) -> None:
    world.submit(key="k1", prompt="one")
    with pytest.raises(IdempotencyConflict, match="another body"):
        world.submit(key="k1", prompt="two")


def test_a_repeat_into_a_session_does_not_count_another_turn(world: World) -> None:
    session_id = world.submit(session={}).session_id
    for _ in range(3):
        world.submit(key="k1", session_id=session_id)
    assert world.submit(session_id=session_id).turn == 3


def test_the_same_key_at_the_same_time_makes_one_job(world: World) -> None:
    start = threading.Barrier(8)
    found: list[str] = []

    def submit() -> None:
        start.wait()
        found.append(world.submit(key="k1", session={}).id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_turn_of_an_unknown_session_is_refused(world: World) -> None:
    with pytest.raises(NotFound):
        world.submit(session_id=new_id("ses"))


def test_the_request_comes_back_as_it_was_given(world: World) -> None:
    request = JobRequest.model_validate(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "s3://bucket/cat.png"}},
                        {"type": "text", "text": "what is this?"},
                    ],
                }
            ],
            "gen_config": {"max_new_tokens": 9, "stop_words": ["."]},
        }
    )
    job = world.submit(**request.model_dump(mode="json", exclude_unset=True))
    prompt = world.claimed(job.id).prompt
    assert prompt.as_messages() == request.as_messages()
    assert prompt.gen_config == request.gen_config
