"""``/v1/batches``: many jobs at once."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field
from sqlalchemy.orm import Session

from api import examples, openapi
from api.auth import Me, authenticated
from api.errors import documented
from api.fields import BatchIdPath, IdempotencyKey, Paged, PageParameters, page_of
from api.intake import fingerprint, resolve_batch
from api.json_body import json_body
from api.routes.jobs import SUBMIT_ERRORS
from api.services import Here
from models import batches, reading
from models.submit import submit_batch
from models.tables import Job
from models.views import batch_view, job_view
from visq import points
from visq.errors import NotFound
from visq.types import BatchRequest, BatchView, JobView, Page

router = APIRouter(prefix="/v1/batches", tags=["batches"], dependencies=[Depends(authenticated)])


class ResultsPage(PageParameters):
    cursor: Annotated[str, Field(pattern="^[0-9]{1,9}$")] | None = None
    """`next_cursor` of the page before."""


@router.post(
    "",
    operation_id="submit_batch",
    summary="Submit a batch",
    status_code=202,
    responses={202: openapi.example(examples.BATCH, location=True), **documented(*SUBMIT_ERRORS)},
    openapi_extra=openapi.body(BatchRequest, examples.BATCH_BODIES),
)
async def submit(
    here: Here,
    me: Me,
    response: Response,
    request: Annotated[BatchRequest, Depends(json_body(BatchRequest))],
    idempotency_key: IdempotencyKey = None,
) -> BatchView:
    """Accept a batch, whole or not at all. Each item is a job of its own, with `custom_id`."""
    sent = await fingerprint(request, idempotency_key)
    request = await resolve_batch(here, me, request)
    submitted = await me.database.run(
        submit_batch,
        me.tenant_id,
        request,
        max_attempts=here.settings.max_attempts,
        idempotency_key=idempotency_key,
        fingerprint=sent,
    )
    points.reached("submit.accepted")
    here.maintenance.wake_for_windows()  # it lets the first items into the broker
    points.reached("submit.answering")
    response.headers["Location"] = f"/v1/batches/{submitted.batch.id}"
    return batch_view(submitted.batch)


@router.get(
    "", operation_id="list_batches", summary="List batches, newest first", responses=documented()
)
async def list_batches(me: Me, page: Paged) -> Page[BatchView]:
    rows = await me.database.read(reading.list_batches, before=page.cursor, limit=page.limit + 1)
    return page_of(rows, page.limit, batch_view, lambda row: row.id)


@router.get(
    "/{batch_id}",
    operation_id="get_batch",
    summary="Look at a batch and its counters",
    responses={200: openapi.example(examples.BATCH), **documented(NotFound)},
)
async def get_batch(me: Me, batch_id: BatchIdPath) -> BatchView:
    return batch_view(await me.database.read(batches.get, batch_id))


@router.get(
    "/{batch_id}/results",
    operation_id="list_batch_results",
    summary="The items that have ended",
    responses=documented(NotFound),
)
async def list_results(
    me: Me, batch_id: BatchIdPath, page: Annotated[ResultsPage, Query()]
) -> Page[JobView]:
    """In the order of the items, at any time. While the batch runs, items before a cursor may
    still end: to follow it, consume its `result_queue`, or read again from the start."""
    after = -1 if page.cursor is None else int(page.cursor)
    rows = await me.database.read(_results, batch_id, after, page.limit + 1)
    return page_of(rows, page.limit, job_view, lambda job: str(job.position))


@router.post(
    "/{batch_id}/cancel",
    operation_id="cancel_batch",
    summary="Cancel a batch",
    responses={
        200: openapi.example(examples.BATCH | {"status": "cancelling"}),
        **documented(NotFound),
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
