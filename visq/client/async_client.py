"""The async client: `visq.client.sync_client` with ``await``; its docstrings hold here too.

::

    async with visq.AsyncClient() as client:
        job = await client.jobs.submit("What is in the picture?", images=["photo.jpg"])
        async for piece in job.stream():
            print(piece, end="")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Unpack

from visq.client import calls, images
from visq.client.async_batches import AsyncBatches
from visq.client.flows import RetryPolicy
from visq.client.images import ImageLike
from visq.client.options import ChatOptions, Images, JobOptions
from visq.client.runners import AsyncRunner
from visq.client.servers import find_server
from visq.client.streaming import TextStream
from visq.ended import result_of
from visq.types import (
    ImageView,
    JobEventView,
    JobResult,
    JobStatus,
    JobView,
    Lane,
    ModelView,
    SessionView,
    StoredMessage,
)


class AsyncClient:
    """As `visq.Client`, for one event loop: ``async with visq.AsyncClient() as client``."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 3,
    ) -> None:
        server = find_server(base_url, api_key)
        self.base_url = server.url
        self._runner = AsyncRunner(server, timeout, RetryPolicy(max_retries))
        self.jobs = AsyncJobs(self._runner)
        self.sessions = AsyncSessions(self._runner)
        self.batches = AsyncBatches(self._runner)
        self.images = AsyncImageUploads(self._runner)
        self.models = AsyncModels(self._runner)

    async def ready(self) -> bool:
        return await self._runner.run(calls.ready())

    async def close(self) -> None:
        await self.batches.close()
        await self._runner.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncJob:
    """A submitted job; `view` is what was last heard of it."""

    def __init__(self, runner: AsyncRunner, view: JobView) -> None:
        self._runner = runner
        self.view = view

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def status(self) -> JobStatus:
        return self.view.status

    @property
    def session_id(self) -> str | None:
        return self.view.session_id

    async def refresh(self) -> JobView:
        self.view = await self._runner.run(calls.job(self.id))
        return self.view

    async def wait(self, timeout: float | None = None) -> JobView:  # noqa: ASYNC109  # as in Job
        if not self.status.is_terminal:
            self.view = await self._runner.run(calls.wait_job(self.id, timeout))
        return self.view

    async def result(self, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109
        return result_of(await self.wait(timeout))

    async def stream(self) -> AsyncIterator[str]:
        text = TextStream()
        async for piece in self._runner.stream(self.id, text):
            yield piece
        if text.job is not None:
            self.view = text.job
            result_of(text.job)

    async def cancel(self) -> JobView:
        self.view = await self._runner.run(calls.cancel_job(self.id))
        return self.view

    async def retry(self) -> JobView:
        self.view = await self._runner.run(calls.retry_job(self.id))
        return self.view

    async def history(self) -> list[JobEventView]:
        return await self._runner.run(calls.job_history(self.id))


class AsyncJobs:
    """``client.jobs``"""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    async def submit(
        self, prompt: str | None = None, *, images: Images = (), **options: Unpack[JobOptions]
    ) -> AsyncJob:
        view = await self._runner.run(calls.submit_job(dict(options), prompt, images))
        return AsyncJob(self._runner, view)

    async def get(self, job_id: str) -> AsyncJob:
        return AsyncJob(self._runner, await self._runner.run(calls.job(job_id)))

    def list(
        self,
        *,
        status: JobStatus | str | None = None,
        session_id: str | None = None,
        batch_id: str | None = None,
        lane: Lane | str | None = None,
    ) -> AsyncIterator[JobView]:
        filters = {
            "status": status,
            "session_id": session_id,
            "batch_id": batch_id,
            "lane": lane,
        }
        return self._runner.pages(calls.jobs(filters))

    async def cancel(self, job_id: str) -> JobView:
        return await self._runner.run(calls.cancel_job(job_id))

    async def retry(self, job_id: str) -> JobView:
        return await self._runner.run(calls.retry_job(job_id))

    async def history(self, job_id: str) -> Sequence[JobEventView]:
        return await self._runner.run(calls.job_history(job_id))


class AsyncSession:
    """A session; each turn sees the history of those before it."""

    def __init__(self, runner: AsyncRunner, view: SessionView) -> None:
        self._runner = runner
        self.view = view

    @property
    def id(self) -> str:
        return self.view.id

    async def chat(
        self, prompt: str, *, images: Images = (), **options: Unpack[ChatOptions]
    ) -> AsyncJob:
        fields = {**options, "session_id": self.id}
        view = await self._runner.run(calls.submit_job(fields, prompt, images))
        return AsyncJob(self._runner, view)

    async def refresh(self) -> SessionView:
        self.view = await self._runner.run(calls.session(self.id))
        return self.view

    def messages(self) -> AsyncIterator[StoredMessage]:
        return self._runner.pages(calls.session_messages(self.id))

    async def fork(self, at_turn: int | None = None) -> AsyncSession:
        view = await self._runner.run(calls.fork_session(self.id, at_turn))
        return AsyncSession(self._runner, view)

    async def delete(self) -> None:
        await self._runner.run(calls.delete_session(self.id))


class AsyncSessions:
    """``client.sessions``"""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    async def create(self, *, metadata: Mapping[str, str] | None = None) -> AsyncSession:
        view = await self._runner.run(calls.create_session(dict(metadata or {})))
        return AsyncSession(self._runner, view)

    async def get(self, session_id: str) -> AsyncSession:
        return AsyncSession(self._runner, await self._runner.run(calls.session(session_id)))

    def list(self) -> AsyncIterator[SessionView]:
        return self._runner.pages(calls.sessions())

    def messages(self, session_id: str) -> AsyncIterator[StoredMessage]:
        return self._runner.pages(calls.session_messages(session_id))

    async def fork(self, session_id: str, at_turn: int | None = None) -> AsyncSession:
        view = await self._runner.run(calls.fork_session(session_id, at_turn))
        return AsyncSession(self._runner, view)

    async def delete(self, session_id: str) -> None:
        await self._runner.run(calls.delete_session(session_id))


class AsyncImageUploads:
    """``client.images``"""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    async def upload(self, image: ImageLike) -> ImageView:
        return await self._runner.run(images.upload(image))


class AsyncModels:
    """``client.models``"""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    async def list(self) -> Sequence[ModelView]:
        return await self._runner.run(calls.models())
