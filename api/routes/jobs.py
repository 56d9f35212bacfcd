"""``/v1/jobs``: submit, look, list, cancel, retry, and follow jobs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import Field
from sqlalchemy.orm import Session

from api import commands, examples, openapi
from api.auth import Me, authenticated
from api.errors import documented
from api.events import EVENT_SCHEMA, EventStream, JobEvents
from api.fields import (
    MAX_WAIT_SECONDS,
    IdempotencyKey,
    JobId,
    NewestFirst,
    Parameters,
    Prefer,
    page_of,
    wait_of,
)
from api.json_body import json_body
from api.services import Here, Services
from models import jobs, reading
from models.moves import PENDING
from models.tables import Job, JobEvent
from models.views import event_view, job_view
from visq.errors import (
    IdempotencyConflict,
    ImageChanged,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageUndecodable,
    MalformedBody,
    NotFound,
    NotRetriable,
    PayloadTooLarge,
    Unavailable,
    UnsupportedMediaType,
    UnsupportedParameter,
)
from visq.types import JobEventView, JobRequest, JobStatus, JobView, Lane, Page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(authenticated)])

SUBMIT_ERRORS: Final = (
    MalformedBody,
    PayloadTooLarge,
    UnsupportedMediaType,
    UnsupportedParameter,
    IdempotencyConflict,
    ImageNotFound,
    ImageForbidden,
    ImageTooLarge,
    ImageUndecodable,
    ImageChanged,
)
"""What taking in a job or a batch may answer with."""


class JobFilters(NewestFirst):
    """Which jobs to list; several filters must all hold."""

    status: JobStatus | None = None
    lane: Lane | None = None
    session_id: Annotated[str, Field(pattern="^ses_[0-9a-f]{32}$")] | None = None
    batch_id: Annotated[str, Field(pattern="^bat_[0-9a-f]{32}$")] | None = None


class Wait(Parameters):
    wait: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS, allow_inf_nan=False)] = 0.0
    """Seconds to wait for the job's end before answering with what it is."""


@router.post(
    "",
    operation_id="submit_job",
    summary="Submit a job",
    status_code=202,
    responses={
        200: {
            "model": JobView,
            "description": "The job has ended: within `Prefer: wait=N`, or before this repeat.",
            **openapi.example(examples.ENDED_JOB, location=True),
        },
        202: {
            "description": "The job is accepted.",
            **openapi.example(examples.JOB, location=True),
        },
        **documented(NotFound, *SUBMIT_ERRORS),
    },
    openapi_extra=openapi.body(JobRequest, examples.JOB_BODIES),
)
async def submit(
    here: Here,
    me: Me,
    response: Response,
    request: Annotated[JobRequest, Depends(json_body(JobRequest))],
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> JobView:
    """Accept a job. From the `202` on it reaches exactly one end: `succeeded`, `failed`,
    `cancelled` or `expired`."""
    job = await commands.submit(here, me, request, sent=request, idempotency_key=idempotency_key)
    seconds = wait_of(prefer)
    if seconds is not None:
        with suppress(Unavailable):  # it is accepted, whatever happens from here on
            job = await here.watch.until_ended(me.database, job.id, seconds)
        response.headers["Preference-Applied"] = f"wait={seconds}"
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if job.status.is_terminal:
        response.status_code = 200
    return job_view(job)


@router.get("", operation_id="list_jobs", summary="List jobs, newest first", responses=documented())
async def list_jobs(me: Me, filters: Annotated[JobFilters, Query()]) -> Page[JobView]:
    rows = await me.database.read(
        reading.list_jobs,
        status=filters.status,
        session_id=filters.session_id,
        batch_id=filters.batch_id,
        lane=filters.lane,
        before=filters.cursor,
        limit=filters.limit + 1,
    )
    return page_of(rows, filters.limit, job_view, lambda job: job.id)


@router.get(
    "/{job_id}",
    operation_id="get_job",
    summary="Look at a job, or wait for its end",
    responses={200: openapi.example(examples.WAITING_JOB), **documented(NotFound)},
)
async def get_job(here: Here, me: Me, job_id: JobId, query: Annotated[Wait, Query()]) -> JobView:
    """A job that is not running says in `waiting_for` what it waits for: an earlier turn of its
    session, its place in the lane, a retry at a time, or a worker."""
    job = await here.watch.until_ended(me.database, job_id, query.wait)
    return await _with_reason(here, job)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    summary="Cancel a job",
    responses={
        200: openapi.example(examples.JOB | {"status": "cancelled"}),
        **documented(NotFound),
    },
)
async def cancel_job(here: Here, me: Me, job_id: JobId) -> JobView:
    """A waiting or queued job ends at once; a running one is asked to stop and ends a moment
    later; an ended one is left as it is."""
    return job_view(await commands.cancel(here, me, job_id))


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    summary="Try a failed job again",
    responses={200: openapi.example(examples.JOB), **documented(NotFound, NotRetriable)},
)
async def retry_job(here: Here, me: Me, job_id: JobId) -> JobView:
    """Queue a failed job again, with all its attempts."""
    transition = await me.database.run(jobs.retry, job_id)
    await here.delivery.transitions([transition])
    return job_view(transition.job)


@router.get(
    "/{job_id}/history",
    operation_id="get_job_history",
    summary="A job's whole life",
    responses={200: openapi.example(examples.HISTORY), **documented(NotFound)},
)
async def get_history(me: Me, job_id: JobId) -> Page[JobEventView]:
    """Every transition: when, from what to what, which attempt on which worker, and why."""
    events = await me.database.read(_history, job_id)
    return Page(data=[event_view(event) for event in events])


@router.get(
    "/{job_id}/events",
    operation_id="stream_job_events",
    summary="Follow a job as it is answered (Server-Sent Events)",
    status_code=200,
    response_class=EventStream,
    responses={
        200: {
            "description": "The events. `attempt`: a run begins, discard all text so far. `token`: "
            "append `text`; with `n` > 1, to the choice that `index` names (absent: 0). `end`: the "
            "job as `GET /v1/jobs/{job_id}` shows it; nothing follows. Comments keep the "
            "connection alive. A job that has ended replays.",
            "content": {"text/event-stream": {"schema": EVENT_SCHEMA, "example": examples.EVENTS}},
        },
        204: {"description": "`Last-Event-ID` is of the end: there is nothing to follow."},
        **documented(NotFound),
    },
)
async def stream_events(
    here: Here,
    me: Me,
    job_id: JobId,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="Go on after this event; any API process can. An id that is none is "
            "ignored.",
        ),
    ] = None,
) -> Response:
    job = await me.database.read(jobs.get, job_id)
    events = JobEvents(here.redis, here.watch, me.database, job_id)
    if last_event_id is not None and await events.has_seen_the_end(job, last_event_id):
        return Response(status_code=204)  # tells a browser to stop connecting again
    return EventStream(events.after(last_event_id))


async def _with_reason(here: Services, job: Job) -> JobView:
    view = job_view(job)
    if job.status in PENDING:
        alive = await here.workers.any_alive()
        # For all tenants: its place in the lane counts the jobs of others too.
        view.waiting_for = await here.database.read(reading.waiting_for, job, workers_alive=alive)
    return view


def _history(session: Session, job_id: str) -> list[JobEvent]:
    jobs.get(session, job_id)
    return reading.job_events(session, job_id)
