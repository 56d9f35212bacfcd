"""A batch's results in input order, each as soon as it and all before it have ended."""

from __future__ import annotations

from collections.abc import Sequence

from visq.client import calls
from visq.client.flows import Flow
from visq.types import JobView


class ResultsInOrder:
    """Reads page after page; a page with a gap (an item that still runs) is read again.

    :param order: the custom ids in input order. If they are not known, gaps cannot be told, so
        nothing comes before the whole batch has ended.
    """

    def __init__(self, batch_id: str, order: Sequence[str] | None) -> None:
        self._batch_id = batch_id
        self._order = order
        self._page = calls.batch_results(batch_id)
        self._cursor: str | None = None
        self._taken = 0
        """Results given out so far."""
        self._taken_of_page = 0
        self._ended = False
        self._finished = False

    def more(self) -> Flow[list[JobView]]:
        """Wait for the next results in order; an empty list when there are no more."""
        pauses = calls.Pauses()
        while not self._finished:
            # Asked for first: if the batch had ended by then, the page lacks nothing.
            self._ended = self._ended or calls.has_ended(
                (yield from calls.batch(self._batch_id, patient=True))
            )
            page = yield from self._page(self._cursor)
            fresh = self._in_order(page.data[self._taken_of_page :])
            self._taken += len(fresh)
            self._taken_of_page += len(fresh)
            if self._taken_of_page == len(page.data):
                self._finished = self._ended and page.next_cursor is None
                if page.next_cursor is not None:
                    self._cursor, self._taken_of_page = page.next_cursor, 0
            if fresh:
                return fresh
            if not self._ended:
                yield pauses.next()
        return []

    def _in_order(self, found: list[JobView]) -> list[JobView]:
        if self._ended:
            return found
        if self._order is None:
            return []
        expected = self._order[self._taken : self._taken + len(found)]
        count = 0
        for job, custom_id in zip(found, expected, strict=False):
            if job.custom_id != custom_id:
                break
            count += 1
        return found[:count]
