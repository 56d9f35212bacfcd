"""``/v1/sessions``: conversations, their messages, forks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field
from sqlalchemy.orm import Session

from api import examples, openapi
from api.auth import Me, authenticated
from api.errors import documented
from api.fields import Paged, PageParameters, SessionIdPath, page_of
from api.json_body import json_body
from api.services import Here
from models import jobs, reading, sessions
from models.tables import Message
from models.views import message_view, session_view
from visq.errors import MalformedBody, NotFound, PayloadTooLarge, UnsupportedMediaType
from visq.types import NewSession, Page, SessionView, StoredMessage, Wire

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], dependencies=[Depends(authenticated)])

BODY_ERRORS = (MalformedBody, PayloadTooLarge, UnsupportedMediaType)


class Fork(Wire):
    """Body of ``POST /v1/sessions/{session_id}/fork``."""

    at_turn: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """The last turn to take over; by default the last one that succeeded."""


class MessagesPage(PageParameters):
    cursor: Annotated[str, Field(pattern=r"^[0-9]{1,9}\.[0-9]{1,9}$")] | None = None
    """`next_cursor` of the page before."""


@router.post(
    "",
    operation_id="create_session",
    summary="Open an empty session",
    status_code=201,
    responses={
        201: openapi.example(examples.SESSION | {"turns": 0}, location=True),
        **documented(*BODY_ERRORS),
    },
    openapi_extra=openapi.body(
        NewSession, {"named": {"metadata": {"customer": "7451"}}, "bare": {}}, required=False
    ),
)
async def create_session(
    me: Me,
    response: Response,
    request: Annotated[NewSession, Depends(json_body(NewSession, optional=True))],
) -> SessionView:
    """Most callers need not: `"session": {}` in a job opens one with its first turn."""
    row = await me.database.run(sessions.open_session, me.tenant_id, request.metadata)
    response.headers["Location"] = f"/v1/sessions/{row.id}"
    return session_view(row)


@router.get(
    "", operation_id="list_sessions", summary="List sessions, newest first", responses=documented()
)
async def list_sessions(me: Me, page: Paged) -> Page[SessionView]:
    rows = await me.database.read(reading.list_sessions, before=page.cursor, limit=page.limit + 1)
    return page_of(rows, page.limit, session_view, lambda row: row.id)


@router.get(
    "/{session_id}",
    operation_id="get_session",
    summary="Look at a session",
    responses={200: openapi.example(examples.SESSION), **documented(NotFound)},
)
async def get_session(me: Me, session_id: SessionIdPath) -> SessionView:
    return session_view(await me.database.read(sessions.get, session_id))


@router.delete(
    "/{session_id}",
    operation_id="delete_session",
    summary="Delete a session and its messages",
    status_code=204,
    responses=documented(NotFound),
)
async def delete_session(here: Here, me: Me, session_id: SessionIdPath) -> None:
    """Turns that have not ended are cancelled."""
    transitions = await me.database.run(jobs.delete_session, session_id)
    await here.delivery.transitions(transitions)


@router.get(
    "/{session_id}/messages",
    operation_id="list_session_messages",
    summary="The messages that the model sees, in order",
    responses=documented(NotFound),
)
async def list_messages(
    me: Me, session_id: SessionIdPath, page: Annotated[MessagesPage, Query()]
) -> Page[StoredMessage]:
    """Turns that succeeded; an image carries the SHA-256 of the bytes that were shown."""
    turn, position = (page.cursor or "0.0").split(".")
    after = (int(turn), int(position)) if page.cursor else (0, -1)
    rows = await me.database.read(_messages, session_id, after, page.limit + 1)
    return page_of(rows, page.limit, message_view, lambda row: f"{row.turn}.{row.position}")


@router.post(
    "/{session_id}/fork",
    operation_id="fork_session",
    summary="Go on from an earlier turn in a new session",
    status_code=201,
    responses={
        201: openapi.example(
            examples.SESSION | {"forked_from": examples.SESSION_ID}, location=True
        ),
        **documented(NotFound, *BODY_ERRORS),
    },
    openapi_extra=openapi.body(Fork, {"at the second turn": {"at_turn": 2}}, required=False),
)
async def fork_session(
    me: Me,
    response: Response,
    session_id: SessionIdPath,
    request: Annotated[Fork, Depends(json_body(Fork, optional=True))],
) -> SessionView:
    """The new session has the history up to that turn; the two go their own ways from there."""
    row = await me.database.run(sessions.fork, session_id, request.at_turn)
    response.headers["Location"] = f"/v1/sessions/{row.id}"
    return session_view(row)


def _messages(
    session: Session, session_id: str, after: tuple[int, int], limit: int
) -> list[Message]:
    sessions.get(session, session_id)
    return reading.session_messages(session, session_id, after=after, limit=limit)
