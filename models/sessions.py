"""The life of a session: its turns in order, its history, forks, and its end.

The session's row is a lock. Every transition that ends or adds a turn takes it before it touches
a job of the session, so that no wake-up of a waiting turn is lost and no deadlock can arise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import bindparam, delete, exists, func, insert, select, update
from sqlalchemy.orm import Session

from models.base import table
from models.database import db_now, fetch
from models.outcomes import Remembered, ShownPicture, Succeeded
from models.tables import ChatSession, Job, Message
from visq import types
from visq.errors import InvalidRequest, NotFound
from visq.ids import new_id
from visq.types import JobStatus


def open_session(
    session: Session, tenant_id: str, metadata: dict[str, str], forked_from: str | None = None
) -> ChatSession:
    """A new, empty session."""
    row = ChatSession(id=new_id("ses"), tenant_id=tenant_id, meta=metadata, forked_from=forked_from)
    session.add(row)
    session.flush()
    return row


def get(session: Session, session_id: str) -> ChatSession:
    """:raises NotFound: no such session, or it was deleted."""
    row = session.scalars(
        select(ChatSession).where(ChatSession.id == session_id, ChatSession.deleted_at.is_(None))
    ).one_or_none()
    if row is None:
        raise NotFound(f"there is no session {session_id}", param="session_id")
    return row


_LOCK: Final = (
    select(ChatSession)
    .where(ChatSession.id == bindparam("session_id"))
    .with_for_update()
    .execution_options(populate_existing=True)
)


def lock(session: Session, session_id: str) -> ChatSession:
    """Take the session's lock until the end of the transaction, deleted or not."""
    return session.scalars(_LOCK, {"session_id": session_id}).one()


def next_turn(session: Session, session_id: str) -> tuple[int, bool]:
    """Lock the session and count a new turn; return its number and whether it must wait.

    :raises NotFound: no such session, or it was deleted.
    """
    turn = session.scalars(
        update(ChatSession)
        .where(ChatSession.id == session_id, ChatSession.deleted_at.is_(None))
        .values(turns=ChatSession.turns + 1, updated_at=db_now())
        .returning(ChatSession.turns),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if turn is None:
        raise NotFound(f"there is no session {session_id}", param="session_id")
    unfinished = exists().where(
        Job.session_id == session_id,
        Job.status.in_([JobStatus.WAITING, JobStatus.QUEUED, JobStatus.RUNNING]),
    )
    return turn, bool(session.scalar(select(unfinished)))


_HISTORY: Final = (
    select(Message.role, Message.content, Message.token_ids, Message.tokenizer, Message.pictures)
    .where(Message.session_id == bindparam("session_id"), Message.turn < bindparam("before_turn"))
    .order_by(Message.turn, Message.position)
)


def history(session: Session, session_id: str, before_turn: int) -> list[Remembered]:
    """What the model sees of the turns before `before_turn`: those that succeeded, in order."""
    rows = fetch(session, _HISTORY, {"session_id": session_id, "before_turn": before_turn})
    return [
        Remembered(message, token_ids, tokenizer, _pictures(pictures, message))
        for role, content, token_ids, tokenizer, pictures in rows
        for message in [types.Message.model_validate({"role": role, "content": content})]
    ]


_APPEND: Final = insert(table(Message))


def append(session: Session, session_id: str, job: Job, end: Succeeded) -> None:
    """Add a succeeded turn to the history of a session that is locked and not deleted."""
    assert job.turn is not None
    answer = len(end.messages) - 1
    added = []
    for position, message in enumerate(end.messages):
        token_ids = end.answer_ids if position == answer else None
        content = [part.model_dump(mode="json", exclude_none=True) for part in message.parts()]
        added.append(
            {
                "tenant_id": job.tenant_id,
                "session_id": session_id,
                "turn": job.turn,
                "position": position,
                "role": message.role,
                "content": content,
                "token_ids": token_ids,
                "tokenizer": None if token_ids is None else end.tokenizer,
                "pictures": _as_json(message, end.pictures),
                "job_id": job.id,
            }
        )
    if added:
        session.execute(_APPEND, added)


def fork(session: Session, session_id: str, at_turn: int | None) -> ChatSession:
    """A new session with the history of this one up to and including `at_turn`.

    `at_turn` is by default the last turn that succeeded; 0 forks an empty history.

    :raises InvalidRequest: `at_turn` is later than the last turn that succeeded.
    """
    origin = get(session, session_id)
    last = session.scalar(select(func.max(Message.turn)).where(Message.session_id == session_id))
    last = last or 0
    at_turn = last if at_turn is None else at_turn
    if at_turn > last:
        raise InvalidRequest(
            f"session {session_id} has no turn {at_turn} yet; its last is {last}", param="at_turn"
        )
    copy = open_session(session, origin.tenant_id, dict(origin.meta), forked_from=origin.id)
    copy.turns = at_turn
    rows = session.scalars(
        select(Message)
        .where(Message.session_id == session_id, Message.turn <= at_turn)
        .order_by(Message.turn, Message.position)
    )
    for row in rows.all():
        session.add(
            Message(
                tenant_id=row.tenant_id,
                session_id=copy.id,
                turn=row.turn,
                position=row.position,
                role=row.role,
                content=row.content,
                token_ids=row.token_ids,
                tokenizer=row.tokenizer,
                pictures=row.pictures,
                job_id=row.job_id,
            )
        )
    session.flush()
    return copy


def forget(session: Session, row: ChatSession) -> None:
    """Delete the history and mark the session as deleted: it answers "not found" from now on."""
    locked = lock(session, row.id)
    locked.deleted_at = session.scalar(select(db_now()))
    session.execute(
        delete(Message).where(Message.session_id == row.id),
        execution_options={"synchronize_session": False},
    )
    session.flush()


def _pictures(kept: list[Any] | None, message: types.Message) -> list[ShownPicture | None]:
    """What is kept of each image part; nothing of a turn from before it was kept."""
    kept = kept or [None] * len(_images(message))
    return [None if fields is None else ShownPicture(**fields) for fields in kept]


def _as_json(
    message: types.Message, pictures: Mapping[str, ShownPicture]
) -> list[dict[str, Any] | None] | None:
    found = [pictures.get(part.image_url.url) for part in _images(message)]
    if not any(found):
        return None
    return [None if picture is None else asdict(picture) for picture in found]


def _images(message: types.Message) -> list[types.ImagePart]:
    return [part for part in message.parts() if isinstance(part, types.ImagePart)]
