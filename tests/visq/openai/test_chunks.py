"""The chunks of a streamed chat completion, over several choices and several attempts."""

from __future__ import annotations

import pytest

from tests.visq.openai.test_answers import job, result
from visq.errors import EngineCrashed, JobCancelled
from visq.openai.chunks import Chunks
from visq.types import Choice, JobStatus, JobView, Json

QUEUED = job(JobStatus.QUEUED)


def chunks(n: int = 1, *, include_usage: bool = False) -> Chunks:
    return Chunks(QUEUED, "small", n=n, top_logprobs=1, include_usage=include_usage)


def ended(*texts: str) -> JobView:
    return job(result=result(*(Choice(text=text, finish_reason="stop") for text in texts)))


def texts(said: list[Json]) -> list[tuple[int, str]]:
    """Index and new text of all chunks that have any."""
    choices = [choice for each in said for choice in each["choices"]]
    return [(c["index"], c["delta"]["content"]) for c in choices if c["delta"].get("content")]


def test_a_role_then_text_then_the_reason_of_the_end() -> None:
    made = chunks()
    said = [
        *made.begin(),
        *made.token(1, 0, "he"),
        *made.token(1, 0, "llo"),
        *made.end(ended("hello")),
    ]
    assert [each["choices"][0]["delta"] for each in said] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "he"},
        {"content": "llo"},
        {},
    ]
    assert [each["choices"][0]["finish_reason"] for each in said] == [None, None, None, "stop"]
    assert len({each["id"] for each in said}) == 1


def test_choices_come_mixed_by_their_index() -> None:
    made = chunks(2)
    assert [each["choices"][0]["index"] for each in made.begin()] == [0, 1]
    said = [*made.token(1, 1, "b"), *made.token(1, 0, "a"), *made.end(ended("aa", "bb"))]
    assert texts(said) == [(1, "b"), (0, "a"), (0, "a"), (1, "b")]


def test_the_next_attempt_goes_on_where_the_last_one_ended() -> None:
    made = chunks()
    made.attempt(1)
    said = made.token(1, 0, "a red ")
    made.attempt(2)
    said += made.token(1, 0, "of a run that has lost its job")
    said += [*made.token(2, 0, "a "), *made.token(2, 0, "red ca"), *made.end(ended("a red cat"))]
    assert texts(said) == [(0, "a red "), (0, "ca"), (0, "t")]


def test_an_attempt_that_says_otherwise_ends_the_stream() -> None:
    made = chunks()
    made.token(1, 0, "a red ")
    made.attempt(2)
    with pytest.raises(EngineCrashed, match="otherwise"):
        made.token(2, 0, "a blue ")


def test_a_job_without_an_answer_is_its_error() -> None:
    with pytest.raises(JobCancelled):
        chunks().end(job(JobStatus.CANCELLED))


def test_the_log_probabilities_come_with_the_end() -> None:
    choice = Choice(
        text="a", finish_reason="stop", token_ids=[5], logprobs=[{5: -1.0}], tokens={5: "a"}
    )
    [_, last] = chunks().end(job(result=result(choice)))
    [token] = last["choices"][0]["logprobs"]["content"]
    assert (token["token"], len(token["top_logprobs"])) == ("a", 1)


def test_the_usage_is_a_chunk_of_its_own_if_it_is_asked_for() -> None:
    made = chunks(include_usage=True)
    said = [*made.begin(), *made.end(ended("hello"))]
    assert [each["usage"] for each in said[:-1]] == [None] * (len(said) - 1)
    assert said[-1]["choices"] == []
    assert said[-1]["usage"]["total_tokens"] == 9
    assert not any("usage" in each for each in [*chunks().begin(), *chunks().end(ended("a"))])
