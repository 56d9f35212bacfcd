"""Ended jobs in the words of OpenAI's API, read back by the released client's own types."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from visq.errors import (
    ContextLengthExceeded,
    EngineDown,
    ImageNotFound,
    InvalidRequest,
    JobCancelled,
    JobExpired,
    ModelNotFound,
    Unauthorized,
    VisqError,
)
from visq.openai.answers import batch_line, chunk, completion, delta
from visq.openai.errors import body_of, status_of_code
from visq.types import Choice, ErrorBody, JobKind, JobResult, JobStatus, JobView, Lane, Usage

NUMBER = "0197f2a4c1d87cc2a1b2c3d4e5f60718"


def job(status: JobStatus = JobStatus.SUCCEEDED, **fields: Any) -> JobView:
    given: dict[str, Any] = {
        "id": f"job_{NUMBER}",
        "kind": JobKind.CHAT,
        "status": status,
        "lane": Lane.INTERACTIVE,
        "attempt": 1,
        "max_attempts": 3,
        "metadata": {},
        "created_at": datetime.fromtimestamp(1000.9, UTC),
        "custom_id": "row-1",
    }
    return JobView(**given | fields)


def result(*choices: Choice, **fields: Any) -> JobResult:
    first, *_ = choices
    usage = Usage(prompt_tokens=7, completion_tokens=2, images=1, cached_tokens=4)
    return JobResult(
        **dict(first) | fields,
        usage=usage,
        model="small",
        choices=list(choices) if len(choices) > 1 else None,
    )


HELLO = Choice(text="hello", finish_reason="stop")


def test_a_completion_is_one_for_the_released_client() -> None:
    said = ChatCompletion.model_validate(completion(job(result=result(HELLO))), strict=True)
    assert (said.id, said.created, said.model) == (f"chatcmpl-{NUMBER}", 1000, "small")
    [choice] = said.choices
    assert (choice.message.content, choice.finish_reason) == ("hello", "stop")
    assert choice.logprobs is None
    assert said.usage is not None
    assert said.usage.total_tokens == 9
    assert said.usage.prompt_tokens_details is not None
    assert said.usage.prompt_tokens_details.cached_tokens == 4


def test_all_choices_are_told_in_their_order() -> None:
    choices = [Choice(text=text, finish_reason="length") for text in "abc"]
    said = ChatCompletion.model_validate(completion(job(result=result(*choices))))
    assert [(each.index, each.message.content) for each in said.choices] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


def test_logprobs_name_their_tokens_likeliest_first() -> None:
    choice = Choice(
        text="é cat",
        finish_reason="stop",
        token_ids=[5, 6, 7],
        logprobs=[{5: -3.0, 8: -0.5, 9: -2.0}, {6: -0.1, 8: -4.0}, {7: -0.2, 9: -5.0}],
        tokens={5: r"bytes:\xc3", 6: r"bytes:\xa9", 7: " cat", 8: " dog", 9: "!"},
    )
    body = completion(job(result=result(choice)), top_logprobs=2)
    logprobs = ChatCompletion.model_validate(body).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first, second, third = logprobs.content
    assert (first.token, first.bytes, first.logprob) == (r"bytes:\xc3", [0xC3], -3.0)
    assert [(each.token, each.logprob) for each in first.top_logprobs] == [
        (" dog", -0.5),
        ("!", -2),
    ]
    assert [each.token for each in second.top_logprobs] == [r"bytes:\xa9", " dog"]
    joined = bytes(byte for each in (first, second, third) for byte in each.bytes or [])
    assert joined.decode() == "é cat"


def test_without_alternatives_asked_for_none_are_told() -> None:
    choice = Choice(
        text="a", finish_reason="stop", token_ids=[5], logprobs=[{5: -1.0}], tokens={5: "a"}
    )
    body = completion(job(result=result(choice)))
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_chunks_are_some_for_the_released_client() -> None:
    running = job(JobStatus.RUNNING)
    said = chunk(running, "small", delta(1, {"content": "he"}))
    assert "usage" not in said
    read = ChatCompletionChunk.model_validate(said)
    assert (read.choices[0].index, read.choices[0].delta.content) == (1, "he")
    assert chunk(running, "small", tells_usage=True)["usage"] is None
    last = ChatCompletionChunk.model_validate(
        chunk(running, "small", usage=Usage(prompt_tokens=3), tells_usage=True)
    )
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 3


def test_the_line_of_an_item_that_succeeded() -> None:
    ended = job(result=result(HELLO))
    assert batch_line(ended) == {
        "id": f"batch_req_{NUMBER}",
        "custom_id": "row-1",
        "response": {"status_code": 200, "request_id": ended.id, "body": completion(ended)},
        "error": None,
    }


def test_the_line_of_an_item_that_failed_has_the_answer_that_a_request_would_have() -> None:
    failed = job(JobStatus.FAILED, error=ErrorBody(code="image_not_found", message="no", param="x"))
    line = batch_line(failed)
    assert line["error"] is None
    assert line["response"]["status_code"] == 400
    assert line["response"]["body"]["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "x",
        "code": "image_not_found",
    }


@pytest.mark.parametrize(
    ("status", "code"),
    [(JobStatus.EXPIRED, "batch_expired"), (JobStatus.CANCELLED, "batch_cancelled")],
)
def test_the_line_of_an_item_that_was_never_answered(status: JobStatus, code: str) -> None:
    line = batch_line(job(status))
    assert (line["response"], line["error"]["code"]) == (None, code)


@pytest.mark.parametrize(
    ("kind", "status", "type_", "code"),
    [
        (InvalidRequest, 400, "invalid_request_error", "invalid_request"),
        (Unauthorized, 401, "invalid_request_error", "invalid_api_key"),
        (ModelNotFound, 404, "invalid_request_error", "model_not_found"),
        (ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
        (ImageNotFound, 400, "invalid_request_error", "image_not_found"),
        (EngineDown, 503, "server_error", "engine_down"),
        (JobCancelled, 499, "invalid_request_error", "job_cancelled"),
        (JobExpired, 504, "server_error", "job_expired"),
        (VisqError, 500, "server_error", "internal_error"),
    ],
)
def test_errors_have_openais_status_type_and_code(
    kind: type[VisqError], status: int, type_: str, code: str
) -> None:
    error = body_of(kind.code, "m", None)["error"]
    assert (status_of_code(kind.code), error["type"], error["code"]) == (status, type_, code)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gen_config.max_new_tokens", "max_completion_tokens"),
        ("gen_config.n", "n"),
        ("messages.0.content", "messages.0.content"),
        (None, None),
    ],
)
def test_params_are_fields_of_the_chat_completion(ours: str | None, theirs: str | None) -> None:
    assert body_of("invalid_request", "m", ours)["error"]["param"] == theirs


def test_an_error_in_a_job_says_its_type_too() -> None:
    said = ErrorBody(code="engine_error", message="no").model_dump()
    assert said["type"] == "server_error"
    assert ErrorBody.model_validate(said).type == "server_error"
    assert ErrorBody(code="of_a_later_version", message="no").type == "invalid_request_error"
