"""``client.batches.run``: what both clients know of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from visq.client import batch_calls
from visq.client.flows import Flow, Request
from visq.client.options import Item
from visq.errors import InvalidRequest
from visq.types import BatchView, Json


@dataclass
class RunState:
    """How far it is."""

    batch_id: str | None = None
    cursor: str | None = None
    sent: Request | None = None
    """What makes its batch, if that was begun."""

    def sending(self, request: Request) -> None:
        self.sent = request


def begun(
    items: Iterable[Item] | None, batch_id: str | None, after: str | None, fields: Json
) -> tuple[Callable[[], Flow[BatchView]], RunState]:
    """How a run begins, when its first item is asked for: with a new batch, or with one that is
    there.

    :raises InvalidRequest: the arguments say both, or `after` is no cursor.
    """
    cursor_number(after)
    if batch_id is None:
        if after is not None:
            raise InvalidRequest("`after` goes with `batch_id`", param="after")
        state = RunState()
        return lambda: batch_calls.submit_batch(items, fields, state.sending), state
    if items is not None or fields:
        raise InvalidRequest(
            "a batch that is resumed has its items and options already; give `batch_id` alone, or "
            "with `after`",
            param="batch_id",
        )
    return lambda: batch_calls.batch(batch_id, patient=True), RunState(batch_id, after)


def cursor_number(cursor: str | None) -> int | None:
    """:raises InvalidRequest: it is none."""
    if cursor is None:
        return None
    if not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= 9):
        raise InvalidRequest(f"{cursor!r} is no cursor of a batch's results", param="after")
    return int(cursor)
