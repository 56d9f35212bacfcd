"""``client.batches`` of the async client: `visq.client.sync_batches` with ``await``; its docstrings
hold here too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import Unpack

from visq.client import batch_calls
from visq.client.batch_calls import Order
from visq.client.batch_feed import BatchEvent, BatchFeed
from visq.client.flows import Flow
from visq.client.options import BatchOptions, Item
from visq.client.results import ResultsAsTheyEnd, results_in
from visq.client.runners import AsyncRunner
from visq.client.runs import RunState, begun, cursor_number
from visq.errors import VisqError
from visq.types import BatchCounts, BatchEstimate, BatchView, JobView


class AsyncBatch:
    """A submitted batch; `view` is what was last heard of it."""

    def __init__(self, runner: AsyncRunner, view: BatchView) -> None:
        self._runner = runner
        self.view = view

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def counts(self) -> BatchCounts:
        return self.view.counts

    async def refresh(self) -> BatchView:
        self.view = await self._runner.run(batch_calls.batch(self.id))
        return self.view

    async def wait(
        self,
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        on_progress: Callable[[BatchCounts], None] | None = None,
    ) -> BatchView:
        def seen(view: BatchView) -> None:
            self._see(view)
            if on_progress is not None:
                on_progress(view.counts)

        return await self._runner.run(batch_calls.wait_batch(self.id, timeout, seen))

    async def results(
        self, order: Order = "input", *, after: str | None = None
    ) -> AsyncIterator[JobView]:
        results = results_in(order, self.id, cursor_number(after), self._see)
        while found := await self._runner.run(results.more()):
            for _, job in found:
                yield job

    def events(self, *, items: bool = True, after: str | None = None) -> AsyncIterator[BatchEvent]:
        return self._runner.batch_events(self.id, BatchFeed(after), items=items)

    async def cancel(self) -> BatchView:
        self.view = await self._runner.run(batch_calls.cancel_batch(self.id))
        return self.view

    def _see(self, view: BatchView) -> None:
        self.view = view


class AsyncBatchRun(AsyncIterator[JobView]):
    """The items of a batch as they end (`AsyncBatches.run`)."""

    def __init__(
        self,
        runner: AsyncRunner,
        begin: Callable[[], Flow[BatchView]],
        state: RunState,
        running: set[str],
    ) -> None:
        self._state = state
        self._items = _items(runner, begin, state, running)

    @property
    def id(self) -> str | None:
        return self._state.batch_id

    @property
    def cursor(self) -> str | None:
        return self._state.cursor

    async def __anext__(self) -> JobView:
        return await anext(self._items)

    async def close(self) -> None:
        await self._items.aclose()


async def _items(
    runner: AsyncRunner,
    begin: Callable[[], Flow[BatchView]],
    state: RunState,
    running: set[str],
) -> AsyncGenerator[JobView]:
    try:
        batch_id = state.batch_id = (await runner.run(begin())).id
    except (asyncio.CancelledError, KeyboardInterrupt):
        if state.sent is not None:  # there may be a batch
            with suppress(VisqError):
                await runner.run(batch_calls.withdraw(state.sent))
        raise
    running.add(batch_id)
    try:
        results = ResultsAsTheyEnd(batch_id, cursor_number(state.cursor))
        while found := await runner.run(results.more()):
            for number, job in found:
                state.cursor = str(number)
                yield job
    except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
        # After a ``break`` the event loop closes this when it comes to it: the client may have
        # been closed by then, and have cancelled the batch.
        await cancel_all(runner, running & {batch_id})
        raise
    finally:
        running.discard(batch_id)


async def cancel_all(runner: AsyncRunner, batch_ids: Iterable[str]) -> None:
    for batch_id in batch_ids:
        with suppress(VisqError):
            await runner.run(batch_calls.cancel_batch(batch_id))


class AsyncBatches:
    """``client.batches``"""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner
        self._running: set[str] = set()

    async def submit(
        self, items: Iterable[Item] | None = None, **options: Unpack[BatchOptions]
    ) -> AsyncBatch:
        view = await self._runner.run(batch_calls.submit_batch(items, dict(options)))
        return AsyncBatch(self._runner, view)

    def run(
        self,
        items: Iterable[Item] | None = None,
        *,
        batch_id: str | None = None,
        after: str | None = None,
        **options: Unpack[BatchOptions],
    ) -> AsyncBatchRun:
        begin, state = begun(items, batch_id, after, dict(options))
        return AsyncBatchRun(self._runner, begin, state, self._running)

    async def estimate(
        self, items: Iterable[Item] | None = None, **options: Unpack[BatchOptions]
    ) -> BatchEstimate:
        return await self._runner.run(batch_calls.estimate_batch(items, dict(options)))

    async def get(self, batch_id: str) -> AsyncBatch:
        return AsyncBatch(self._runner, await self._runner.run(batch_calls.batch(batch_id)))

    def list(self) -> AsyncIterator[BatchView]:
        return self._runner.pages(batch_calls.batches())

    async def cancel(self, batch_id: str) -> BatchView:
        return await self._runner.run(batch_calls.cancel_batch(batch_id))

    async def close(self) -> None:
        while self._running:
            await cancel_all(self._runner, {self._running.pop()})
