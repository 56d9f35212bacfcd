"""Ended jobs as chat completions, whole or in chunks, and as the lines of a batch's output."""

from __future__ import annotations

from typing import Any, Final

from visq.openai.errors import body_of, status_of_code
from visq.token_text import bytes_of
from visq.types import Choice, JobResult, JobStatus, JobView, Json, Usage

_NEVER_RUN: Final = {
    JobStatus.CANCELLED: ("batch_cancelled", "This request was cancelled before it was answered."),
    JobStatus.EXPIRED: ("batch_expired", "This request could not be answered before it expired."),
}
"""What the error file of a batch says of items that have no response."""


def completion(job: JobView, *, top_logprobs: int = 0) -> Json:
    """The ``chat.completion`` of a job that succeeded.

    :param top_logprobs: how many alternatives of each token were asked for.
    """
    assert job.result is not None
    result = job.result
    return {
        **_head(job, "chat.completion", result.model),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": logprobs_of(choice, top_logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices_of(result))
        ],
        "usage": usage_of(result.usage),
    }


def chunk(
    job: JobView,
    model: str,
    *choices: Json,
    usage: Usage | None = None,
    tells_usage: bool = False,
) -> Json:
    """One ``chat.completion.chunk``.

    :param choices: what is new of them: see `delta`.
    :param tells_usage: whether a last chunk will have the usage; then all others have it as null.
    """
    said = {**_head(job, "chat.completion.chunk", model), "choices": list(choices)}
    if tells_usage:
        said["usage"] = None if usage is None else usage_of(usage)
    return said


def delta(
    index: int, new: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
) -> Json:
    """What is new of the choice `index`; `new` are fields of its message."""
    return {"index": index, "delta": new, "logprobs": logprobs, "finish_reason": finish_reason}


def batch_line(job: JobView, *, top_logprobs: int = 0) -> Json:
    """The line of an ended item: of the output file if it succeeded, else of the error file."""
    line: Json = {"id": f"batch_req_{_number(job)}", "custom_id": job.custom_id}
    if job.status in _NEVER_RUN:
        code, message = _NEVER_RUN[job.status]
        return line | {"response": None, "error": {"code": code, "message": message}}
    if job.result is not None:
        status, body = 200, completion(job, top_logprobs=top_logprobs)
    else:
        code, message, param = "job_failed", "the job has no result", None
        if job.error is not None:
            code, message, param = job.error.code, job.error.message, job.error.param
        status, body = status_of_code(code), body_of(code, message, param)
    response = {"status_code": status, "request_id": job.id, "body": body}
    return line | {"response": response, "error": None}


def choices_of(result: JobResult) -> list[Choice]:
    """All choices, also if it is only one."""
    return result.choices or [result]


def logprobs_of(choice: Choice, top: int) -> Json | None:
    """The log probabilities of a choice with their tokens as text; ``None`` if it has none."""
    if choice.logprobs is None or choice.token_ids is None:
        return None
    tokens = choice.tokens or {}

    def said(token: int, logprob: float) -> dict[str, Any]:
        text = tokens.get(token, "")
        return {"token": text, "logprob": logprob, "bytes": list(bytes_of(text))}

    content = []
    for token, found in zip(choice.token_ids, choice.logprobs, strict=True):
        likeliest = sorted(found.items(), key=lambda pair: pair[1], reverse=True)[:top]
        entry = said(token, found[token])
        content.append(entry | {"top_logprobs": [said(*pair) for pair in likeliest]})
    return {"content": content, "refusal": None}


def usage_of(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _head(job: JobView, kind: str, model: str) -> Json:
    head = {
        "id": f"chatcmpl-{_number(job)}",
        "object": kind,
        "created": int(job.created_at.timestamp()),
        "model": model,
        "system_fingerprint": None,
    }
    # visq's own: which session the turn is of.
    return head if job.session_id is None else {**head, "session_id": job.session_id}


def _number(job: JobView) -> str:
    return job.id.removeprefix("job_")
