"""``client.batches``, blocking. `visq.client.async_batches` is the same with ``await``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Unpack

from visq.client import batch_calls
from visq.client.batch_calls import Order
from visq.client.batch_feed import BatchEvent, BatchFeed
from visq.client.flows import Flow
from visq.client.options import BatchOptions, Item
from visq.client.results import ResultsAsTheyEnd, results_in
from visq.client.runners import Runner
from visq.client.runs import RunState, begun, cursor_number
from visq.errors import VisqError
from visq.types import BatchCounts, BatchEstimate, BatchView, JobView


class Batch:
    """A submitted batch; `view` is what was last heard of it."""

    def __init__(self, runner: Runner, view: BatchView) -> None:
        self._runner = runner
        self.view = view

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def counts(self) -> BatchCounts:
        return self.view.counts

    def refresh(self) -> BatchView:
        self.view = self._runner.run(batch_calls.batch(self.id))
        return self.view

    def wait(
        self,
        timeout: float | None = None,
        *,
        on_progress: Callable[[BatchCounts], None] | None = None,
    ) -> BatchView:
        """Wait until it has ended, whatever its end, and its output is written; `on_progress` is
        told of each change.

        :raises TimeoutError: it has not within `timeout` seconds; it goes on.
        """

        def seen(view: BatchView) -> None:
            self._see(view)
            if on_progress is not None:
                on_progress(view.counts)

        return self._runner.run(batch_calls.wait_batch(self.id, timeout, seen))

    def results(self, order: Order = "input", *, after: str | None = None) -> Iterator[JobView]:
        """Its items, while it runs: in input order, each as soon as it and those before it have
        ended; or (``ended``) as they end.

        :param after: go on there: after the item at this `position` (``input``), or after the end
            with this number (``ended``; `BatchRun.cursor`).
        """
        results = results_in(order, self.id, cursor_number(after), self._see)
        while found := self._runner.run(results.more()):
            for _, job in found:
                yield job

    def events(self, *, items: bool = True, after: str | None = None) -> Iterator[BatchEvent]:
        """What happens in it until its end, as it happens; over broken connections.

        :param items: ``False``: only its progress.
        :param after: the `cursor` of the last item that was seen before.
        """
        return self._runner.batch_events(self.id, BatchFeed(after), items=items)

    def cancel(self) -> BatchView:
        """End all items that have not ended."""
        self.view = self._runner.run(batch_calls.cancel_batch(self.id))
        return self.view

    def _see(self, view: BatchView) -> None:
        self.view = view


class BatchRun(Iterator[JobView]):
    """The items of a batch as they end (`Batches.run`)."""

    def __init__(
        self,
        runner: Runner,
        begin: Callable[[], Flow[BatchView]],
        state: RunState,
        running: set[str],
    ) -> None:
        self._state = state
        self._items = _items(runner, begin, state, running)

    @property
    def id(self) -> str | None:
        """Of the batch; ``None`` before the first item was asked for."""
        return self._state.batch_id

    @property
    def cursor(self) -> str | None:
        """Of the last item that was given out: ``run(batch_id=..., after=...)`` goes on there."""
        return self._state.cursor

    def __next__(self) -> JobView:
        return next(self._items)

    def close(self) -> None:
        """Cancel the batch, unless it has ended."""
        self._items.close()


def _items(
    runner: Runner, begin: Callable[[], Flow[BatchView]], state: RunState, running: set[str]
) -> Generator[JobView]:
    try:
        batch_id = state.batch_id = runner.run(begin()).id
    except KeyboardInterrupt:
        if state.sent is not None:  # there may be a batch
            with suppress(VisqError):
                runner.run(batch_calls.withdraw(state.sent))
        raise
    running.add(batch_id)
    try:
        results = ResultsAsTheyEnd(batch_id, cursor_number(state.cursor))
        while found := runner.run(results.more()):
            for number, job in found:
                state.cursor = str(number)
                yield job
    except (KeyboardInterrupt, GeneratorExit):
        cancel_all(runner, running & {batch_id})
        raise
    finally:
        running.discard(batch_id)


def cancel_all(runner: Runner, batch_ids: Iterable[str]) -> None:
    """As far as the server answers: whoever leaves is not held up by that."""
    for batch_id in batch_ids:
        with suppress(VisqError):
            runner.run(batch_calls.cancel_batch(batch_id))


class Batches:
    """``client.batches``"""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._running: set[str] = set()
        """Batches of `run` that are not cancelled yet, if nobody wants their items any more."""

    def submit(self, items: Iterable[Item] | None = None, **options: Unpack[BatchOptions]) -> Batch:
        """Submit a batch: items, or ``input_uri`` or ``input_file_id`` in their place.

        :param items: ``(prompt, image)`` pairs, or dicts with the fields of a batch item; any
            number of them: more than ten thousand go as a file.
        :raises InvalidRequest: names the field that does not fit.
        """
        view = self._runner.run(batch_calls.submit_batch(items, dict(options)))
        return Batch(self._runner, view)

    def run(
        self,
        items: Iterable[Item] | None = None,
        *,
        batch_id: str | None = None,
        after: str | None = None,
        **options: Unpack[BatchOptions],
    ) -> BatchRun:
        """Submit a batch (as `submit`) and iterate over its items as they end, failed ones too.

        Leaving the loop early (``break``, an error, Ctrl-C) cancels the batch; an outage does not.

        :param batch_id: in place of items: all items of this batch, also those that have ended.
        :param after: with `batch_id`: only those after this `BatchRun.cursor`.
        """
        begin, state = begun(items, batch_id, after, dict(options))
        return BatchRun(self._runner, begin, state, self._running)

    def estimate(
        self, items: Iterable[Item] | None = None, **options: Unpack[BatchOptions]
    ) -> BatchEstimate:
        """What `submit` with the same arguments would be: counted and estimated, and nothing done.
        Local images are uploaded, as they would be then."""
        return self._runner.run(batch_calls.estimate_batch(items, dict(options)))

    def get(self, batch_id: str) -> Batch:
        """:raises NotFound: no such batch."""
        return Batch(self._runner, self._runner.run(batch_calls.batch(batch_id)))

    def list(self) -> Iterator[BatchView]:
        """All batches, newest first."""
        return self._runner.pages(batch_calls.batches())

    def cancel(self, batch_id: str) -> BatchView:
        return self._runner.run(batch_calls.cancel_batch(batch_id))

    def close(self) -> None:
        """Cancel the batches of `run` whose items were not all taken."""
        while self._running:
            cancel_all(self._runner, {self._running.pop()})
