"""``/v1/batches``: many jobs at once, inline or from a file; OpenAI's form is one of them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from sqlalchemy.orm import Session

from api import examples, openapi
from api.auth import Me, authenticated
from api.batch_events import BATCH_EVENT_SCHEMA, batch_events
from api.batch_intake import batch_input
from api.errors import BATCHES, as_batches, documented
from api.estimates import estimate
from api.events import EventStream
from api.fields import BatchIdPath, IdempotencyKey, PageParameters, Parameters, page_of
from api.intake import fingerprint, resolve_batch
from api.json_body import json_body
from api.routes.jobs import SUBMIT_ERRORS
from api.services import Here
from models import batches, reading
from models.submit import submit_batch
from models.tables import Batch, Job
from models.views import batch_view, job_view
from visq import points
from visq.errors import NotFound, ObjectForbidden, ObjectNotFound
from visq.types import BatchEstimate, BatchPage, BatchRequest, BatchView, JobView, Page

router = APIRouter(
    prefix="/v1/batches", tags=["batches"], dependencies=[as_batches, Depends(authenticated)]
)

BatchCursor = Annotated[str, Field(pattern="^bat_[0-9a-f]{32}$")]


class BatchesPage(PageParameters):
    cursor: BatchCursor | None = None
    """`next_cursor` of the page before."""
    after: BatchCursor | None = None
    """The same, by OpenAI's name: `last_id` of the page before."""


class ResultsPage(Parameters):
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Most entries on the page."""
    order: Literal["input", "ended"] = "input"
    """`input`: by position. While the batch runs, items before a cursor may still end. `ended`: as
    they ended; a cursor misses none, so that who keeps it can follow a batch."""
    cursor: Annotated[str, Field(pattern="^[0-9]{1,9}$")] | None = None
    """`next_cursor` of the page before, in the same order."""


class Follow(Parameters):
    items: bool = True
    """`false`: only the batch's own events."""


@router.post(
    "",
    operation_id="submit_batch",
    summary="Submit a batch",
    status_code=202,
    response_model=BatchView,
    responses={
        200: {"model": BatchEstimate, "description": "With `dry_run`: what it would be."},
        202: openapi.example(examples.BATCH, location=True),
        **documented(ObjectNotFound, ObjectForbidden, *SUBMIT_ERRORS, face=BATCHES),
    },
    openapi_extra=openapi.body(BatchRequest, examples.BATCH_BODIES),
)
async def submit(
    here: Here,
    me: Me,
    response: Response,
    request: Annotated[BatchRequest, Depends(json_body(BatchRequest))],
    idempotency_key: IdempotencyKey = None,
) -> BatchView | Response:
    """Accept a batch: its `items`, whole or not at all; or a file of items (`input_uri`,
    `input_file_id`), which is read after this answer, and whose wrong lines become failed items.
    Each item is a job of its own, with `custom_id`. With `dry_run` nothing is accepted: the answer,
    with status 200, says what the batch would be."""
    input_uri = await batch_input(here, me, request)
    if request.dry_run:
        counted = await estimate(here, me, request, input_uri)
        return JSONResponse(counted.model_dump(mode="json"))
    sent = await fingerprint(request, idempotency_key)
    request = await resolve_batch(here, me, request)
    # In a thread: ten thousand rows take a second or two.
    submitted = await asyncio.to_thread(
        here.blocking.run,
        submit_batch,
        me.tenant_id,
        request,
        max_attempts=here.settings.max_attempts,
        idempotency_key=idempotency_key,
        fingerprint=sent,
        input_uri=input_uri,
    )
    points.reached("submit.accepted")
    if request.items is None:
        here.batch_loop.wake()
    else:
        here.maintenance.wake_for_windows()  # it lets the first items into the broker
    points.reached("submit.answering")
    response.headers["Location"] = f"/v1/batches/{submitted.batch.id}"
    return batch_view(submitted.batch)


@router.get(
    "",
    operation_id="list_batches",
    summary="List batches, newest first",
    responses=documented(face=BATCHES),
)
async def list_batches(me: Me, page: Annotated[BatchesPage, Query()]) -> BatchPage:
    rows: list[Batch] = await me.database.read(
        reading.list_batches, before=page.cursor or page.after, limit=page.limit + 1
    )
    found = page_of(rows, page.limit, batch_view, lambda row: row.id)
    return BatchPage(
        data=found.data,
        next_cursor=found.next_cursor,
        first_id=found.data[0].id if found.data else None,
        last_id=found.data[-1].id if found.data else None,
        has_more=found.next_cursor is not None,
    )


@router.get(
    "/{batch_id}",
    operation_id="get_batch",
    summary="Look at a batch and its counters",
    responses={200: openapi.example(examples.BATCH), **documented(NotFound, face=BATCHES)},
)
async def get_batch(me: Me, batch_id: BatchIdPath) -> BatchView:
    return batch_view(await me.database.read(batches.get, batch_id))


@router.get(
    "/{batch_id}/results",
    operation_id="list_batch_results",
    summary="The items that have ended",
    responses=documented(NotFound, face=BATCHES),
)
async def list_results(
    me: Me, batch_id: BatchIdPath, page: Annotated[ResultsPage, Query()]
) -> Page[JobView]:
    """At any time, also while the batch runs. In the order `ended`, `next_cursor` is null only when
    nothing more can come; an item that is retried after its end shows its present status there, and
    comes again."""
    if page.order == "input":
        after = -1 if page.cursor is None else int(page.cursor)
        rows = await me.database.read(_results, batch_id, after, page.limit + 1)
        return page_of(rows, page.limit, job_view, lambda job: str(job.position))
    number = 0 if page.cursor is None else int(page.cursor)
    batch, ended = await me.database.read(_ended, batch_id, number, page.limit)
    is_all = batch.finished_at is not None and len(ended) < page.limit
    last = ended[-1][0] if ended else number
    return Page(data=[job_view(job) for _, job in ended], next_cursor=None if is_all else str(last))


@router.get(
    "/{batch_id}/events",
    operation_id="stream_batch_events",
    summary="Follow a batch (Server-Sent Events)",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "The events. `item`: an item has ended, as `GET /v1/jobs/{job_id}` "
            "shows it; its id is the number of that end. `progress`: the batch has changed. `end`: "
            "the batch has ended; nothing follows. Comments keep the connection alive.",
            "content": {"text/event-stream": {"schema": BATCH_EVENT_SCHEMA}},
        },
        **documented(NotFound, face=BATCHES),
    },
)
async def stream_batch_events(
    here: Here,
    me: Me,
    batch_id: BatchIdPath,
    follow: Annotated[Follow, Query()],
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="Go on after the end with this number; any API process can. An id that is "
            "none is ignored.",
        ),
    ] = None,
) -> Response:
    await me.database.read(batches.get, batch_id)
    known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit()
    after = int((last_event_id or "0")[:9]) if known else 0
    return EventStream(
        batch_events(here.watch, me.database, batch_id, after=after, with_items=follow.items)
    )


@router.post(
    "/{batch_id}/cancel",
    operation_id="cancel_batch",
    summary="Cancel a batch",
    responses={
        200: openapi.example(examples.BATCH | {"status": "cancelling"}),
        **documented(NotFound, face=BATCHES),
    },
)
async def cancel_batch(here: Here, me: Me, batch_id: BatchIdPath) -> BatchView:
    """From now on none of its items starts. It is `cancelling` until the last one has ended; a
    batch that has ended is left as it is."""
    cancelled = await me.database.run(batches.request_cancel, batch_id)
    here.maintenance.wake()  # it ends the items that wait, and stops those that run
    await here.delivery.parcel(events=cancelled.events)
    return batch_view(cancelled.batch)


def _results(session: Session, batch_id: str, after_position: int, limit: int) -> list[Job]:
    batches.get(session, batch_id)
    return reading.batch_results(session, batch_id, after_position=after_position, limit=limit)


def _ended(
    session: Session, batch_id: str, after: int, limit: int
) -> tuple[Batch, list[tuple[int, Job]]]:
    batch = batches.get(session, batch_id)
    return batch, batches.ended_items(session, batch_id, after_number=after, limit=limit)
