"""The calls of batches as flows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, Literal

from visq.client import calls, options
from visq.client.batch_input import DRY_RUN_SECONDS, batch_body
from visq.client.flows import OUTAGE_SECONDS, Flow, Request
from visq.errors import VisqError
from visq.types import BatchEstimate, BatchView, JobView, Json, Page

SUBMIT_SECONDS: Final = 120.0
"""How long the server may take for ten thousand items."""

Order = Literal["input", "ended"]


def submit_batch(
    items: Iterable[options.Item] | None,
    fields: Json,
    sending: Callable[[Request], None] = lambda _: None,
) -> Flow[BatchView]:
    """Upload the local images of all items, then submit them. `fields`: `BatchOptions`.

    :param sending: is told of the request that makes the batch, before it is sent.
    """
    key = fields.pop("idempotency_key", None)
    body = yield from batch_body(items, fields)
    request = calls.creation("/v1/batches", body.data, key, answer_seconds=SUBMIT_SECONDS)
    sending(request)
    answer = yield request
    return BatchView.model_validate_json(answer.body)


def withdraw(request: Request) -> Flow[BatchView]:
    """Cancel the batch of a request whose answer was not waited for: its key finds it."""
    answer = yield request
    return (yield from cancel_batch(BatchView.model_validate_json(answer.body).id))


def estimate_batch(items: Iterable[options.Item] | None, fields: Json) -> Flow[BatchEstimate]:
    """As `submit_batch`, but nothing is done and nothing of it stays but uploaded images."""
    fields.pop("idempotency_key", None)
    body = yield from batch_body(items, {**fields, "dry_run": True})
    try:
        answer = yield Request(
            "POST", "/v1/batches", json=body.data, answer_seconds=DRY_RUN_SECONDS
        )
    finally:
        if body.file_id is not None:
            with suppress(VisqError):  # it expires anyway
                yield Request("DELETE", f"/v1/files/{body.file_id}")
    return BatchEstimate.model_validate_json(answer.body)


def batch(batch_id: str, *, patient: bool = False) -> Flow[BatchView]:
    patience = OUTAGE_SECONDS if patient else 0.0
    answer = yield Request("GET", f"/v1/batches/{batch_id}", patience_seconds=patience)
    return BatchView.model_validate_json(answer.body)


def wait_batch(
    batch_id: str, timeout: float | None, seen: Callable[[BatchView], None]
) -> Flow[BatchView]:
    """Wait until a batch has ended, however; `seen` is called with each new state.

    :raises TimeoutError: it has not within `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pauses = calls.Pauses()
    last: BatchView | None = None
    while True:
        view = yield from batch(batch_id, patient=True)
        if view != last:
            seen(view)
            pauses.reset()
            last = view
        if view.status.is_terminal:
            return view
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"batch {batch_id} has not ended after {timeout:g} s")
        yield pauses.next()


def batches() -> Callable[[str | None], Flow[Page[BatchView]]]:
    return calls.pages("/v1/batches", Page[BatchView], {})


def results_page(batch_id: str, order: Order, cursor: int | None) -> Flow[Page[JobView]]:
    """Items that have ended, after the one at `cursor`; outlives an outage."""
    answer = yield Request(
        "GET",
        f"/v1/batches/{batch_id}/results",
        params={"order": order, "limit": calls.PAGE_SIZE}
        | ({} if cursor is None else {"cursor": cursor}),
        patience_seconds=OUTAGE_SECONDS,
    )
    return Page[JobView].model_validate_json(answer.body)


def cancel_batch(batch_id: str) -> Flow[BatchView]:
    return (yield from calls.post(f"/v1/batches/{batch_id}/cancel", BatchView))


def event_stream(batch_id: str, *, items: bool, last_event_id: str | None) -> Request:
    """The request of a batch's server-sent events, from after `last_event_id`."""
    path = f"/v1/batches/{batch_id}/events"
    return calls.event_stream(path, last_event_id, {"items": "true" if items else "false"})
