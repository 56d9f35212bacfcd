"""Telling a client the answer of a job over the connection on which it asks.

Who asks in this way waits: a client that hangs up wants no answer any more, so its job is
cancelled. With an ``Idempotency-Key`` it is not, since with the key the client can come back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from api import commands
from api.auth import Caller
from api.errors import add_header
from api.events import KEEP_ALIVE, EventStream, JobEvents, Said
from api.services import Services
from models.views import job_view
from visq.ended import result_of
from visq.errors import Unavailable, VisqError
from visq.openai.answers import completion
from visq.openai.chunks import Chunks
from visq.openai.errors import body_of
from visq.openai.requests import ChatCompletionRequest
from visq.types import JobView, Json

T = TypeVar("T")

log = structlog.get_logger(__name__)

WAIT_SECONDS: Final = 60.0
"""Of one wait; there is another after it, as long as the client is there."""
RETRY_SECONDS: Final = 1.0
"""Between two looks while the database is away."""
CLIENT_LEFT: Final = 499
"""Status of the answer that nobody reads; it is in the access log."""

_STOPPING: Final = "this server is about to stop; ask again"


class HungUp(Exception):  # noqa: N818  (nothing went wrong)
    """The client has closed the connection."""


class Chat:
    """One request for a chat completion, whose job is accepted."""

    def __init__(
        self,
        here: Services,
        caller: Caller,
        connection: Request,
        asked: ChatCompletionRequest,
        job: JobView,
        *,
        keep: bool,
    ) -> None:
        """
        :param connection: the request; its body has been read.
        :param keep: do not cancel the job if the client hangs up.
        """
        self._here = here
        self._caller = caller
        self._connection = connection
        self._asked = asked
        self._job = job
        self._keep = keep
        self._ended = False
        add_header(connection, "X-Request-Id", job.id)

    async def answer(self) -> Response:
        """The answer: whole, or a stream of chunks.

        :raises VisqError: why there is none, if it is known before the answer begins.
        """
        try:
            return await (self._stream() if self._asked.stream else self._whole())
        except HungUp:
            await self._leave()
            return Response(status_code=CLIENT_LEFT)
        except BaseException:
            await self._leave()
            raise

    async def _whole(self) -> Response:
        job = await _while_connected(self._connection, self._end())
        self._settle(job)
        body = completion(job, top_logprobs=self._asked.top_logprobs or 0)
        return JSONResponse(body, headers={"X-Request-Id": job.id})

    async def _end(self) -> JobView:
        """Wait for it, however long it takes; the job outlives outages, and so does the waiting."""
        while not self._here.watch.stopping:
            try:
                job = await self._here.watch.until_ended(
                    self._caller.database, self._job.id, WAIT_SECONDS
                )
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if job.status.is_terminal:
                return job_view(job)
        raise Unavailable(_STOPPING)

    async def _stream(self) -> Response:
        """Begins with the first text, or when it has been silent for so long that a proxy might
        cut the connection: until then an error has its HTTP status."""
        events = self._events()
        try:
            first = await _while_connected(self._connection, _until_worth_telling(events))
            if (job := first[-1].job) is not None:
                self._settle(job)
        except BaseException:
            await events.aclose()
            raise
        stream = _ChatStream(self._lines(first, events), self._leave)
        stream.headers["X-Request-Id"] = self._job.id
        return stream

    async def _lines(
        self, first: list[Said], events: AsyncGenerator[Said, None]
    ) -> AsyncGenerator[str, None]:
        asked = self._asked
        options = asked.stream_options
        chunks = Chunks(
            self._job,
            asked.model,
            n=asked.n or 1,
            top_logprobs=asked.top_logprobs or 0,
            include_usage=bool(options and options.include_usage),
        )
        async with aclosing(events):
            try:
                for chunk in chunks.begin():
                    yield _line(chunk)
                for said in first:
                    for line in self._told(said, chunks):
                        yield line
                async for said in events:
                    for line in self._told(said, chunks):
                        yield line
                if not self._ended:
                    raise Unavailable(_STOPPING)
                yield "data: [DONE]\n\n"
            except VisqError as error:
                yield _line(body_of(error.code, error.message, error.param))

    def _told(self, said: Said, chunks: Chunks) -> list[str]:
        if said.job is not None:
            self._ended = True
            return [_line(chunk) for chunk in chunks.end(said.job)]
        if said.event is None:
            return [KEEP_ALIVE]
        if said.event.type == "attempt":
            chunks.attempt(said.event.attempt)
            return []
        event = said.event
        return [_line(chunk) for chunk in chunks.token(event.attempt, event.index, event.text)]

    async def _events(self) -> AsyncGenerator[Said, None]:
        """What happens to the job, over outages of the database."""
        here, last = self._here, None
        while not here.watch.stopping:
            job_events = JobEvents(here.redis, here.watch, self._caller.database, self._job.id)
            try:
                async with aclosing(job_events.follow(last)) as events:
                    async for said in events:
                        last = said.id or last
                        yield said
                        if said.job is not None:
                            return
            except Unavailable as error:
                log.warning("a chat goes on after an outage", job=self._job.id, error=str(error))
                yield Said()
                await asyncio.sleep(RETRY_SECONDS)

    def _settle(self, job: JobView) -> None:
        """The job has ended.

        :raises VisqError: without an answer. visq has tried it often enough.
        """
        self._ended = True
        add_header(self._connection, "X-Should-Retry", "false")
        result_of(job)

    async def _leave(self) -> None:
        """Nobody waits for the answer any more."""
        if self._ended or self._keep:
            return
        self._ended = True
        try:
            await commands.cancel(self._here, self._caller, self._job.id)
        except VisqError as error:
            log.warning("a chat was left, but not cancelled", job=self._job.id, error=str(error))


class _ChatStream(EventStream):
    """Says when it is over, whether it was sent to its end or not."""

    def __init__(
        self, lines: AsyncGenerator[str, None], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(lines)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


async def _while_connected(connection: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns.

    :raises HungUp: the client has hung up before; the work is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(connection))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hung_up(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass


async def _until_worth_telling(events: AsyncGenerator[Said, None]) -> list[Said]:
    """The first events, up to a token, the end, or a silence."""
    first = []
    async for said in events:
        first.append(said)
        if said.event is None or said.event.type == "token":
            return first
    raise Unavailable(_STOPPING)


def _line(data: Json) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"
