"""Drive flows over HTTP: `Runner` blocks, `AsyncRunner` awaits. Nothing else differs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Final, TypedDict, TypeVar

import httpx2

from visq import __version__
from visq.client import calls
from visq.client.answers import error_of
from visq.client.batch_calls import event_stream
from visq.client.batch_feed import BatchEvent, BatchFeed
from visq.client.flows import (
    Answer,
    Exchange,
    Flow,
    Pause,
    Request,
    RetryPolicy,
    Step,
    Together,
    attempts,
    unreachable,
)
from visq.client.servers import Server
from visq.client.streaming import Reconnects, TextStream
from visq.errors import Unavailable, VisqError
from visq.types import Page

T = TypeVar("T")

AT_ONCE: Final = 8
"""Uploads that run beside each other."""

CLOSED_PAUSE: Final = 0.5
"""Seconds before a stream that the server closed is opened again."""

_LIMITS: Final = httpx2.Limits(max_connections=100, max_keepalive_connections=20)


class _Connection(TypedDict):
    base_url: str
    headers: dict[str, str]


class Runner:
    """A blocking connection to one server. Thread-safe."""

    def __init__(self, server: Server, timeout: float, policy: RetryPolicy) -> None:
        self._timeout = timeout
        self._policy = policy
        self._http = httpx2.Client(**_connection(server), timeout=timeout, limits=_LIMITS)

    def run(self, flow: Flow[T]) -> T:
        """Do what `flow` says until it returns."""
        try:
            step = next(flow)
            while True:
                try:
                    outcome = self._do(step)
                except (httpx2.TransportError, VisqError) as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def pages(self, page: Callable[[str | None], Flow[Page[T]]]) -> Iterator[T]:
        """All entries of a list, page after page."""
        cursor: str | None = None
        while True:
            found = self.run(page(cursor))
            yield from found.data
            cursor = found.next_cursor
            if cursor is None:
                return

    def stream(self, job_id: str, text: TextStream) -> Iterator[str]:
        """The pieces of a job's answer as they come, over broken connections."""
        reconnects = Reconnects(self._policy)
        while text.job is None:
            try:
                request = calls.job_event_stream(job_id, text.last_event_id)
                for event in self._events(request, reconnects):
                    if piece := text.feed(event):
                        yield piece
            except Unavailable as error:
                time.sleep(reconnects.after(error))
                continue
            if text.job is None:  # the server closed the stream before the job ended
                time.sleep(CLOSED_PAUSE)
                view = self.run(calls.job(job_id))
                if view.status.is_terminal and (piece := text.ended(view)):
                    yield piece

    def batch_events(self, batch_id: str, feed: BatchFeed, *, items: bool) -> Iterator[BatchEvent]:
        """What happens in a batch until its end, over broken connections."""
        reconnects = Reconnects(self._policy)
        while not feed.ended:
            request = event_stream(batch_id, items=items, last_event_id=feed.last_event_id)
            try:
                for event in self._events(request, reconnects):
                    if said := feed.feed(event):
                        yield said
            except Unavailable as error:
                time.sleep(reconnects.after(error))
                continue
            if not feed.ended:  # the server closed the stream before the batch ended
                time.sleep(CLOSED_PAUSE)

    def _events(self, request: Request, reconnects: Reconnects) -> Iterator[httpx2.ServerSentEvent]:
        try:
            with self._http.stream(**_arguments(request, self._timeout)) as response:
                if response.status_code >= 400:
                    raise error_of(response.status_code, response.read())
                if response.status_code == 204:  # nothing follows what was seen
                    return
                reconnects.opened()
                for event in httpx2.EventSource(response):
                    reconnects.progress()
                    yield event
        except httpx2.TransportError as error:
            raise unreachable(error) from error

    def close(self) -> None:
        self._http.close()

    def _do(self, step: Step) -> Any:
        match step:
            case Request():
                return self.run(attempts(step, self._policy))
            case Exchange(request):
                return _answer(self._http.request(**_arguments(request, self._timeout)))
            case Pause(seconds):
                return time.sleep(seconds)
            case Together(flows):
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    return list(pool.map(self.run, flows))


class AsyncRunner:
    """As `Runner`, for one event loop."""

    def __init__(self, server: Server, timeout: float, policy: RetryPolicy) -> None:
        self._timeout = timeout
        self._policy = policy
        self._http = httpx2.AsyncClient(**_connection(server), timeout=timeout, limits=_LIMITS)
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    outcome = await self._do(step)
                except (httpx2.TransportError, VisqError) as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def pages(self, page: Callable[[str | None], Flow[Page[T]]]) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            found = await self.run(page(cursor))
            for entry in found.data:
                yield entry
            cursor = found.next_cursor
            if cursor is None:
                return

    async def stream(self, job_id: str, text: TextStream) -> AsyncIterator[str]:
        reconnects = Reconnects(self._policy)
        while text.job is None:
            try:
                request = calls.job_event_stream(job_id, text.last_event_id)
                async with aclosing(self._events(request, reconnects)) as events:
                    async for event in events:
                        if piece := text.feed(event):
                            yield piece
            except Unavailable as error:
                await asyncio.sleep(reconnects.after(error))
                continue
            if text.job is None:
                await asyncio.sleep(CLOSED_PAUSE)
                view = await self.run(calls.job(job_id))
                if view.status.is_terminal and (piece := text.ended(view)):
                    yield piece

    async def batch_events(
        self, batch_id: str, feed: BatchFeed, *, items: bool
    ) -> AsyncIterator[BatchEvent]:
        reconnects = Reconnects(self._policy)
        while not feed.ended:
            request = event_stream(batch_id, items=items, last_event_id=feed.last_event_id)
            try:
                async with aclosing(self._events(request, reconnects)) as events:
                    async for event in events:
                        if said := feed.feed(event):
                            yield said
            except Unavailable as error:
                await asyncio.sleep(reconnects.after(error))
                continue
            if not feed.ended:
                await asyncio.sleep(CLOSED_PAUSE)

    async def _events(
        self, request: Request, reconnects: Reconnects
    ) -> AsyncGenerator[httpx2.ServerSentEvent]:
        try:
            async with self._http.stream(**_arguments(request, self._timeout)) as response:
                if response.status_code >= 400:
                    raise error_of(response.status_code, await response.aread())
                if response.status_code == 204:  # nothing follows what was seen
                    return
                reconnects.opened()
                async for event in httpx2.EventSource(response):
                    reconnects.progress()
                    yield event
        except httpx2.TransportError as error:
            raise unreachable(error) from error

    async def close(self) -> None:
        await self._http.aclose()

    async def _do(self, step: Step) -> Any:
        match step:
            case Request():
                return await self.run(attempts(step, self._policy))
            case Exchange(request):
                return _answer(await self._http.request(**_arguments(request, self._timeout)))
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case Together(flows):
                return await asyncio.gather(*map(self._in_slot, flows))

    async def _in_slot(self, flow: Flow[T]) -> T:
        async with self._slots:
            return await self.run(flow)


def _connection(server: Server) -> _Connection:
    headers = {"User-Agent": f"visq-python/{__version__}"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    return {"base_url": server.url, "headers": headers}


def _arguments(request: Request, timeout: float) -> dict[str, Any]:
    """The arguments of httpx2 for one attempt."""
    headers = dict(request.headers)
    if request.json is not None:
        headers["Content-Type"] = "application/json"
    return {
        "method": request.method,
        "url": request.path,
        "params": dict(request.params),
        "headers": headers,
        "content": request.json,
        "data": dict(request.form) or None,
        "files": None if request.file is None else {"file": request.file},
        "timeout": httpx2.Timeout(timeout, read=timeout + request.answer_seconds),
    }


def _answer(response: httpx2.Response) -> Answer:
    return Answer(response.status_code, response.headers, response.content)
