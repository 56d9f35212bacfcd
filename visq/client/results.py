"""A batch's results in input order, each as soon as it and all before it have ended."""

from __future__ import annotations

from itertools import takewhile

from visq.client import calls
from visq.client.flows import Flow
from visq.types import JobView


class ResultsInOrder:
    """Reads page after page; a page with a gap (an item that still runs) is read again."""

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id
        self._page = calls.batch_results(batch_id)
        self._cursor: str | None = None
        self._taken = 0
        """Results given out so far: the position of the next one."""
        self._finished = False

    def more(self) -> Flow[list[JobView]]:
        """Wait for the next results in order; an empty list when there are no more."""
        pauses = calls.Pauses()
        while not self._finished:
            # Asked for first: if the batch had ended by then, the page lacks nothing.
            batch = yield from calls.batch(self._batch_id, patient=True)
            page = yield from self._page(self._cursor)
            fresh = self._in_order(page.data)
            self._taken += len(fresh)
            if not page.data or page.data[-1].position == self._taken - 1:  # no gap in it
                self._cursor = page.next_cursor or self._cursor
                self._finished = calls.has_ended(batch) and page.next_cursor is None
            if fresh:
                return fresh
            if not self._finished:
                yield pauses.next()
        return []

    def _in_order(self, found: list[JobView]) -> list[JobView]:
        """Those that follow what was given out, up to the first gap."""
        new = [job for job in found if (job.position or 0) >= self._taken]
        numbered = enumerate(new, start=self._taken)
        return [job for _, job in takewhile(lambda item: item[0] == item[1].position, numbered)]
