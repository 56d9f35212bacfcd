"""A batch's results while it runs: in input order, or as its items end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Protocol

from visq.client.batch_calls import Order, batch, results_page
from visq.client.calls import Pauses
from visq.client.flows import Flow
from visq.types import BatchStatus, BatchView, JobView


class Results(Protocol):
    """What is common to both orders."""

    def more(self) -> Flow[list[tuple[int, JobView]]]:
        """Wait for the next results with their cursors; an empty list when there are no more."""
        ...


def results_in(
    order: Order, batch_id: str, after: int | None, seen: Callable[[BatchView], None]
) -> Results:
    """The results after the cursor `after`; `seen` is told of the batch while it is waited for."""
    if order == "ended":
        return ResultsAsTheyEnd(batch_id, after)
    return ResultsInOrder(batch_id, after, seen)


class ResultsInOrder:
    """Each item as soon as it and all before it have ended; its cursor is its position.

    Reads page after page; a page with a gap (an item that still runs) is read again. A line of a
    file that is blank looks like that, too: what is behind it comes when all items have ended.
    """

    def __init__(self, batch_id: str, after: int | None, seen: Callable[[BatchView], None]) -> None:
        self._batch_id = batch_id
        self._seen = seen
        self._last = -1 if after is None else after
        """Position of the last item that was given out."""
        self._all_ended = False
        self._finished = False

    def more(self) -> Flow[list[tuple[int, JobView]]]:
        pauses = Pauses()
        while not self._finished:
            if not self._all_ended:
                # Asked for first: if the items had ended by then, the page lacks none.
                view = yield from batch(self._batch_id, patient=True)
                self._seen(view)
                self._all_ended = view.status.is_terminal or view.status is BatchStatus.FINALIZING
            cursor = None if self._last < 0 else self._last
            page = yield from results_page(self._batch_id, "input", cursor)
            found = [(job.position or 0, job) for job in page.data]
            fresh = found if self._all_ended else self._without_gap(found)
            self._finished = self._all_ended and page.next_cursor is None
            if fresh:
                self._last = fresh[-1][0]
                return fresh
            if not self._finished:
                yield pauses.next()
        return []

    def _without_gap(self, found: list[tuple[int, JobView]]) -> list[tuple[int, JobView]]:
        numbered = enumerate(found, start=self._last + 1)
        return [pair for _, pair in takewhile(lambda each: each[0] == each[1][0], numbered)]


class ResultsAsTheyEnd:
    """Each item when it has ended; its cursor is the number of that end.

    An item that was retried after its end comes once for each of its ends.
    """

    def __init__(self, batch_id: str, after: int | None) -> None:
        self._batch_id = batch_id
        self._last = after or 0
        self._finished = False

    def more(self) -> Flow[list[tuple[int, JobView]]]:
        pauses = Pauses()
        while not self._finished:
            page = yield from results_page(self._batch_id, "ended", self._last)
            found = list(enumerate(page.data, start=self._last + 1))  # numbered without gaps
            self._last += len(found)
            self._finished = page.next_cursor is None
            # One that runs again ends again: it comes with that end.
            if fresh := [(number, job) for number, job in found if job.status.is_terminal]:
                return fresh
            if not found and not self._finished:
                yield pauses.next()
        return []
