"""The blocking client. `visq.client.async_client` is the same with ``await``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Unpack

from visq.client import calls, images
from visq.client.flows import RetryPolicy
from visq.client.images import ImageLike
from visq.client.options import ChatOptions, Images, JobOptions
from visq.client.runners import Runner
from visq.client.servers import find_server
from visq.client.streaming import TextStream
from visq.client.sync_batches import Batches
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


class Client:
    """A connection to a visq server. Thread-safe; close it, or use it in a ``with``.

    ::

        with visq.Client() as client:
            job = client.jobs.submit("What is in the picture?", images=["photo.jpg"])
            print(job.result().text)

    :param base_url: by default ``VISQ_URL``, else the `visq up` that runs on ``VISQ_DATA``.
    :param api_key: by default ``VISQ_API_KEY``, else that of this `visq up`.
    :param timeout: seconds of silence after which a request has failed.
    :param max_retries: how often a request is sent again after a lost connection, a time-out, or
        an answer 429, 502, 503 or 504; with growing pauses.
    :raises ConfigurationError: nothing says which server.
    """

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
        self._runner = Runner(server, timeout, RetryPolicy(max_retries))
        self.jobs = Jobs(self._runner)
        self.sessions = Sessions(self._runner)
        self.batches = Batches(self._runner)
        self.images = ImageUploads(self._runner)
        self.models = Models(self._runner)

    def ready(self) -> bool:
        """Whether the server and all that it needs answer."""
        return self._runner.run(calls.ready())

    def close(self) -> None:
        """Batches of `batches.run` whose items were not all taken are cancelled."""
        self.batches.close()
        self._runner.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Job:
    """A submitted job; `view` is what was last heard of it."""

    def __init__(self, runner: Runner, view: JobView) -> None:
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

    def refresh(self) -> JobView:
        """Ask for its present state."""
        self.view = self._runner.run(calls.job(self.id))
        return self.view

    def wait(self, timeout: float | None = None) -> JobView:
        """Wait until it has ended, whatever its end.

        :raises TimeoutError: it has not ended within `timeout` seconds; it goes on.
        """
        if not self.status.is_terminal:
            self.view = self._runner.run(calls.wait_job(self.id, timeout))
        return self.view

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the answer.

        :raises VisqError: there is none: the class says why, e.g. `ImageNotFound`, `JobCancelled`.
        :raises TimeoutError: it has not ended within `timeout` seconds; it goes on.
        """
        return result_of(self.wait(timeout))

    def stream(self) -> Iterator[str]:
        """The answer's text in pieces, as it is generated.

        If a worker dies on the way, the next attempt goes on where this one ended; if it says
        something else (sampling), its whole text follows after a line break.

        :raises VisqError: at the end, if there is no answer; as `result`.
        """
        text = TextStream()
        yield from self._runner.stream(self.id, text)
        if text.job is not None:
            self.view = text.job
            result_of(text.job)

    def cancel(self) -> JobView:
        """End it, or ask its worker to stop."""
        self.view = self._runner.run(calls.cancel_job(self.id))
        return self.view

    def retry(self) -> JobView:
        """Queue it again, if it has failed.

        :raises NotRetriable: it has not failed, or later turns have followed it.
        """
        self.view = self._runner.run(calls.retry_job(self.id))
        return self.view

    def history(self) -> list[JobEventView]:
        """Its transitions so far, oldest first."""
        return self._runner.run(calls.job_history(self.id))


class Jobs:
    """``client.jobs``"""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def submit(
        self, prompt: str | None = None, *, images: Images = (), **options: Unpack[JobOptions]
    ) -> Job:
        """Submit a job: a prompt with its images, or ``messages``.

        :param images: references (``s3://...``), or local images, which are uploaded.
        :raises InvalidRequest: names the field that does not fit.
        :raises NotFound: the session does not exist.
        """
        view = self._runner.run(calls.submit_job(dict(options), prompt, images))
        return Job(self._runner, view)

    def get(self, job_id: str) -> Job:
        """:raises NotFound: no such job."""
        return Job(self._runner, self._runner.run(calls.job(job_id)))

    def list(
        self,
        *,
        status: JobStatus | str | None = None,
        session_id: str | None = None,
        batch_id: str | None = None,
        lane: Lane | str | None = None,
    ) -> Iterator[JobView]:
        """All jobs that fit, newest first."""
        filters = {
            "status": status,
            "session_id": session_id,
            "batch_id": batch_id,
            "lane": lane,
        }
        return self._runner.pages(calls.jobs(filters))

    def cancel(self, job_id: str) -> JobView:
        return self._runner.run(calls.cancel_job(job_id))

    def retry(self, job_id: str) -> JobView:
        return self._runner.run(calls.retry_job(job_id))

    def history(self, job_id: str) -> Sequence[JobEventView]:
        return self._runner.run(calls.job_history(job_id))


class Session:
    """A session; each turn sees the history of those before it."""

    def __init__(self, runner: Runner, view: SessionView) -> None:
        self._runner = runner
        self.view = view

    @property
    def id(self) -> str:
        return self.view.id

    def chat(self, prompt: str, *, images: Images = (), **options: Unpack[ChatOptions]) -> Job:
        """Submit the next turn. Turns run one after the other, however fast they are submitted."""
        fields = {**options, "session_id": self.id}
        return Job(self._runner, self._runner.run(calls.submit_job(fields, prompt, images)))

    def refresh(self) -> SessionView:
        self.view = self._runner.run(calls.session(self.id))
        return self.view

    def messages(self) -> Iterator[StoredMessage]:
        """The history that the next turn sees, oldest first."""
        return self._runner.pages(calls.session_messages(self.id))

    def fork(self, at_turn: int | None = None) -> Session:
        """A new session with the history up to and with `at_turn` (by default all of it)."""
        return Session(self._runner, self._runner.run(calls.fork_session(self.id, at_turn)))

    def delete(self) -> None:
        """Delete the history; turns that have not ended are cancelled."""
        self._runner.run(calls.delete_session(self.id))


class Sessions:
    """``client.sessions``"""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def create(self, *, metadata: Mapping[str, str] | None = None) -> Session:
        view = self._runner.run(calls.create_session(dict(metadata or {})))
        return Session(self._runner, view)

    def get(self, session_id: str) -> Session:
        """:raises NotFound: no such session."""
        return Session(self._runner, self._runner.run(calls.session(session_id)))

    def list(self) -> Iterator[SessionView]:
        """All sessions, newest first."""
        return self._runner.pages(calls.sessions())

    def messages(self, session_id: str) -> Iterator[StoredMessage]:
        return self._runner.pages(calls.session_messages(session_id))

    def fork(self, session_id: str, at_turn: int | None = None) -> Session:
        return Session(self._runner, self._runner.run(calls.fork_session(session_id, at_turn)))

    def delete(self, session_id: str) -> None:
        self._runner.run(calls.delete_session(session_id))


class ImageUploads:
    """``client.images``"""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def upload(self, image: ImageLike) -> ImageView:
        """Upload one image: a path, the bytes of a file, an open file, or a PIL image."""
        return self._runner.run(images.upload(image))


class Models:
    """``client.models``"""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def list(self) -> Sequence[ModelView]:
        """The models that live workers serve."""
        return self._runner.run(calls.models())
