"""Items of batches become rows: checked against what is there already, many at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import bindparam, insert, select
from sqlalchemy.orm import Session

from models import batches, outbox, sessions
from models.base import table
from models.database import db_now, fetch
from models.outbox import OutboxEntry
from models.tables import Batch, Job, JobEvent
from visq.errors import DuplicateCustomId, InvalidRequest, VisqError
from visq.ids import new_id
from visq.types import BatchItem, GenerationConfig, ImagePart, JobKind, JobStatus, Prompt


@dataclass(frozen=True)
class NewItem:
    """An item to add: what it asks, or why it asks nothing that can be done."""

    position: int
    item: BatchItem | None = None
    error: VisqError | None = None
    custom_id: str | None = None
    """Of an item with an error, if it has one."""


@dataclass
class ImageOrder:
    """Where the first item with the same images stands: items are started in this order, so that
    those that share images find them in the workers' caches."""

    most: int = 100_000
    """Images that are remembered: of a larger batch, those that came last."""
    _first: dict[str, int] = field(default_factory=dict)

    def place(self, new: NewItem) -> int:
        """Of the first image: what follows it differs in the questions, as a rule."""
        if new.item is None or (url := _first_image(new.item)) is None:
            return new.position
        key = hashlib.sha256(url.encode()).hexdigest()
        place = self._first.pop(key, new.position)
        self._first[key] = place
        if len(self._first) > self.most:
            del self._first[next(iter(self._first))]
        return place


def stored_request(prompt: Prompt, default: GenerationConfig | None = None) -> dict[str, Any]:
    """The part of a request that a run needs, as `Prompt` reads it back.

    :param default: how to generate, if the request does not say.
    """
    gen_config = prompt.gen_config
    if default is not None and "gen_config" not in prompt.model_fields_set:
        gen_config = default
    stored = prompt.model_dump(
        mode="json", include={"messages", "prompt", "images", "do_preprocess", "adapter_name"}
    )
    return stored | {"gen_config": gen_config.model_dump(mode="json", exclude_defaults=True)}


def add_items(
    session: Session, batch: Batch, items: Sequence[NewItem], order: ImageOrder
) -> AddedItems:
    """Add items to a batch, to which nobody else adds any. Its `total` is the caller's to raise,
    and then its failed items to count (`AddedItems.count_failed`).

    Sessions are locked here, so the batch's row must not be: an end takes them in that order. The
    session sees what is the batch's tenant's only (`models.database.as_tenant`).
    """
    rows = AddedItems(session, batch)
    for new in _once_each(session, batch.id, items):
        rows.add(new, order.place(new))
    rows.insert()
    return rows


def _once_each(session: Session, batch_id: str, items: Sequence[NewItem]) -> Iterable[NewItem]:
    """Items whose `custom_id` another one has become errors."""
    given = [new.custom_id if new.item is None else new.item.custom_id for new in items]
    taken = set(fetch(session, _TAKEN, {"batch_id": batch_id, "custom_ids": given}).scalars())
    for new in items:
        if new.item is None:
            # Kept for its sender's eyes, unless the database could not keep both.
            custom_id = None if new.custom_id in taken else new.custom_id
            yield NewItem(new.position, error=new.error, custom_id=custom_id)
            taken.add(custom_id)
        elif new.item.custom_id in taken:
            yield NewItem(
                new.position,
                error=DuplicateCustomId.of(new.item.custom_id),
            )
        else:
            taken.add(new.item.custom_id)
            yield new


_TAKEN: Final = select(Job.custom_id).where(
    Job.batch_id == bindparam("batch_id"),
    Job.custom_id.in_(bindparam("custom_ids", expanding=True)),
)
_SESSION_OF: Final = select(Job.session_id).where(
    Job.batch_id == bindparam("batch_id"), Job.custom_id == bindparam("custom_id")
)
_INSERT_JOBS: Final = insert(table(Job))
_INSERT_EVENTS: Final = insert(table(JobEvent))


class AddedItems:
    """The rows of one chunk."""

    def __init__(self, session: Session, batch: Batch) -> None:
        self._session = session
        self._batch = batch
        self._now: datetime = session.execute(select(db_now())).scalar_one()
        default = batch.options.get("gen_config")
        self._default = None if default is None else GenerationConfig.model_validate(default)
        self._jobs: list[dict[str, Any]] = []
        self._sessions: dict[str, str | None] = {}
        """By `custom_id`: of the items of this chunk."""
        self._busy: set[str] = set()
        """Sessions that have a turn in this chunk, which is no row yet."""

    def add(self, new: NewItem, order: int) -> None:
        if new.item is None:
            assert new.error is not None
            self._add_failed(new.position, new.custom_id, new.error)
            return
        try:
            self._add(new.position, new.item, order)
        except VisqError as error:  # its session
            self._add_failed(new.position, new.item.custom_id, error)

    def insert(self) -> None:
        if not self._jobs:
            return
        self._session.execute(_INSERT_JOBS, self._jobs)
        self._session.execute(
            _INSERT_EVENTS,
            [
                {
                    "tenant_id": self._batch.tenant_id,
                    "job_id": row["id"],
                    "at": self._now,
                    "to_status": row["status"],
                    "attempt": 0,
                    "reason": row["error_code"] or "submitted",
                }
                for row in self._jobs
            ],
        )

    def count_failed(self) -> list[OutboxEntry]:
        """Count the items that have ended with being added: those with an error. Returns their
        events, and that of the batch's end if it has ended with them."""
        failed = [
            Job(**{_ATTRIBUTES.get(name, name): value for name, value in row.items()})
            for row in self._jobs
            if row["status"] is JobStatus.FAILED
        ]
        if not failed:
            return []
        events = outbox.add_results(self._session, failed)
        return events + batches.count_ends(self._session, self._batch.id, failed)

    def _add(self, position: int, item: BatchItem, order: int) -> None:
        session_id = self._session_of(item)
        turn, must_wait = None, False
        if session_id is not None:
            turn, must_wait = sessions.next_turn(self._session, session_id)
            must_wait = must_wait or session_id in self._busy
            self._busy.add(session_id)
        self._sessions[item.custom_id] = session_id
        request = stored_request(item, self._default)
        self._jobs.append(
            self._row(position, item.custom_id)
            | {
                "kind": JobKind.GENERATE if session_id is None else JobKind.CHAT,
                "status": JobStatus.WAITING if must_wait else JobStatus.QUEUED,
                "session_id": session_id,
                "turn": turn,
                "dispatch_order": order,
                "dedupe_key": self._dedupe_key(item, request),
                "request": request | {"on_image_change": item.on_image_change},
                "metadata": item.metadata,
            }
        )

    def _add_failed(self, position: int, custom_id: str | None, error: VisqError) -> None:
        self._jobs.append(
            self._row(position, custom_id)
            | {
                "status": JobStatus.FAILED,
                "error_code": error.code,
                "error_message": error.message,
                "error_param": None if error.param is None else error.param[:256],
                "finished_at": self._now,
            }
        )

    def _row(self, position: int, custom_id: str | None) -> dict[str, Any]:
        """What all items have; of the rest, what those have that ask nothing."""
        return {
            "id": new_id("job"),
            "tenant_id": self._batch.tenant_id,
            "kind": JobKind.GENERATE,
            "lane": self._batch.lane,
            "batch_id": self._batch.id,
            "custom_id": custom_id,
            "position": position,
            "dispatch_order": None,
            "dedupe_key": None,
            "session_id": None,
            "turn": None,
            "request": {},
            "metadata": {},
            "result_queue": self._batch.result_queue,
            "max_attempts": self._batch.max_attempts,
            "attempt": 0,
            "failures": 0,
            "crashes": 0,
            "publishes": 0,
            "expires_at": self._batch.expires_at,
            "created_at": self._now,
            "error_code": None,
            "error_message": None,
            "error_param": None,
            "finished_at": None,
        }

    def _session_of(self, item: BatchItem) -> str | None:
        if item.session is not None:
            opened = sessions.open_session(
                self._session, self._batch.tenant_id, item.session.metadata
            )
            return opened.id
        if item.after is None:
            return item.session_id
        if item.after in self._sessions:
            session_id = self._sessions[item.after]
        else:
            row = fetch(
                self._session,
                _SESSION_OF,
                {"batch_id": self._batch.id, "custom_id": item.after},
            ).one_or_none()
            if row is None:
                raise InvalidRequest(
                    f"`after` is {item.after!r}, and no item before this one has that `custom_id`",
                    param="after",
                )
            (session_id,) = row
        if session_id is None:
            raise InvalidRequest(
                f"`after` is {item.after!r}, which is in no session; give that item "
                "`session: {}`",
                param="after",
            )
        return session_id

    def _dedupe_key(self, item: BatchItem, request: dict[str, Any]) -> str | None:
        if not self._batch.dedupe or self._sessions[item.custom_id] is not None:
            return None
        gen_config = GenerationConfig.model_validate(request["gen_config"])
        if gen_config.do_sample and gen_config.random_seed is None:
            return None  # each of them is to be another answer
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


_ATTRIBUTES: Final = {"metadata": "meta"}
"""Columns whose attribute has another name."""


def _first_image(prompt: Prompt) -> str | None:
    for message in prompt.as_messages():
        for part in message.parts():
            if isinstance(part, ImagePart):
                return part.image_url.url
    return None
