"""The calls of the API as flows (`visq.client.flows`); `batch_calls` has those of batches."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import httpx2
from pydantic import BaseModel

from visq.client import options
from visq.client.flows import OUTAGE_SECONDS, Answer, Exchange, Flow, Pause, Request
from visq.client.images import as_list, with_uploads
from visq.types import (
    JobEventView,
    JobView,
    Json,
    ModelView,
    Page,
    SessionView,
    StoredMessage,
)

ViewT = TypeVar("ViewT", bound=BaseModel)

LONG_POLL_SECONDS: Final = 30.0
PAGE_SIZE: Final = 100

# --- jobs ------------------------------------------------------------------------------------


def submit_job(fields: Json, prompt: str | None, images: options.Images) -> Flow[JobView]:
    """Upload the local images of a job, then submit it. `fields`: `options.JobOptions`."""
    key = fields.pop("idempotency_key", None)
    short_form = {"prompt": prompt, "images": as_list(images)}
    fields |= {name: value for name, value in short_form.items() if value}
    [body] = yield from with_uploads([fields])
    answer = yield creation("/v1/jobs", options.job_body(body), key)
    return JobView.model_validate_json(answer.body)


def job(job_id: str) -> Flow[JobView]:
    return (yield from get(f"/v1/jobs/{job_id}", JobView))


def wait_job(job_id: str, timeout: float | None) -> Flow[JobView]:
    """Wait until a job has ended, whatever its end.

    :raises TimeoutError: it has not ended within `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = LONG_POLL_SECONDS if deadline is None else deadline - time.monotonic()
        wait = round(max(0.0, min(left, LONG_POLL_SECONDS)), 3)
        answer = yield Request(
            "GET",
            f"/v1/jobs/{job_id}",
            params={"wait": wait},
            answer_seconds=wait,
            patience_seconds=min(OUTAGE_SECONDS, left),
        )
        view = JobView.model_validate_json(answer.body)
        if view.status.is_terminal:
            return view
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"job {job_id} is still {view.status} after {timeout:g} s")


def cancel_job(job_id: str) -> Flow[JobView]:
    return (yield from post(f"/v1/jobs/{job_id}/cancel", JobView))


def retry_job(job_id: str) -> Flow[JobView]:
    # A second one would meet a job that is not failed any more.
    request = Request("POST", f"/v1/jobs/{job_id}/retry", repeatable=False)
    answer = yield request
    return JobView.model_validate_json(answer.body)


def job_history(job_id: str) -> Flow[list[JobEventView]]:
    page = yield from get(f"/v1/jobs/{job_id}/history", Page[JobEventView])
    return page.data


def jobs(filters: Json) -> Callable[[str | None], Flow[Page[JobView]]]:
    return pages("/v1/jobs", Page[JobView], filters)


def job_event_stream(job_id: str, last_event_id: str | None) -> Request:
    """The request of a job's server-sent events, from after `last_event_id`."""
    return event_stream(f"/v1/jobs/{job_id}/events", last_event_id)


# --- sessions --------------------------------------------------------------------------------


def create_session(metadata: Json) -> Flow[SessionView]:
    answer = yield creation("/v1/sessions", json.dumps({"metadata": metadata}).encode())
    return SessionView.model_validate_json(answer.body)


def session(session_id: str) -> Flow[SessionView]:
    return (yield from get(f"/v1/sessions/{session_id}", SessionView))


def sessions() -> Callable[[str | None], Flow[Page[SessionView]]]:
    return pages("/v1/sessions", Page[SessionView], {})


def delete_session(session_id: str) -> Flow[None]:
    yield Request("DELETE", f"/v1/sessions/{session_id}")


def session_messages(session_id: str) -> Callable[[str | None], Flow[Page[StoredMessage]]]:
    return pages(f"/v1/sessions/{session_id}/messages", Page[StoredMessage], {})


def fork_session(session_id: str, at_turn: int | None) -> Flow[SessionView]:
    body = {} if at_turn is None else {"at_turn": at_turn}
    answer = yield creation(f"/v1/sessions/{session_id}/fork", json.dumps(body).encode())
    return SessionView.model_validate_json(answer.body)


# --- the rest --------------------------------------------------------------------------------


def models() -> Flow[list[ModelView]]:
    page = yield from get("/v1/models", Page[ModelView])
    return page.data


def ready() -> Flow[bool]:
    """Not retried: a server that is not ready answers so."""
    try:
        answer: Answer = yield Exchange(Request("GET", "/readyz"))
    except httpx2.TransportError:
        return False
    return answer.status == 200


class Pauses:
    """Pauses between polls that grow while nothing happens."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._seconds = 0.1

    def next(self) -> Pause:
        pause = Pause(self._seconds)
        self._seconds = min(2.0, self._seconds * 1.3)
        return pause


# --- forms of calls --------------------------------------------------------------------------


def get(path: str, kind: type[ViewT]) -> Flow[ViewT]:
    answer = yield Request("GET", path)
    return kind.model_validate_json(answer.body)


def post(path: str, kind: type[ViewT]) -> Flow[ViewT]:
    """A call that may be repeated without harm."""
    answer = yield Request("POST", path)
    return kind.model_validate_json(answer.body)


def creation(
    path: str, body: bytes, key: str | None = None, *, answer_seconds: float = 0.0
) -> Request:
    """A request that makes something: its key, kept over its retries, lets it make that once."""
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Request("POST", path, headers=headers, json=body, answer_seconds=answer_seconds)


def event_stream(
    path: str, last_event_id: str | None, params: Mapping[str, str] | None = None
) -> Request:
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    return Request("GET", path, params=params or {}, headers=headers)


def pages(path: str, kind: type[ViewT], filters: Json) -> Callable[[str | None], Flow[ViewT]]:
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}

    def page(cursor: str | None) -> Flow[ViewT]:
        params = {"limit": PAGE_SIZE, **given} | ({"cursor": cursor} if cursor else {})
        answer = yield Request("GET", path, params=params)
        return kind.model_validate_json(answer.body)

    return page
