"""A job's event stream as text: what both clients do with each event, without any I/O."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from pydantic import BaseModel

from visq.client.flows import OUTAGE_SECONDS, RetryPolicy
from visq.ended import result_of
from visq.told import Told, ToldOtherwise
from visq.types import JobStatus, JobView

STABLE_SECONDS: Final = 10.0
"""A connection that held for this long was a good one, though no event came."""


class ServerSentEvent(Protocol):
    """What is used of `httpx2.ServerSentEvent`."""

    @property
    def event(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def id(self) -> str: ...


class _Token(BaseModel):
    text: str
    index: int = 0
    """Which of the ``n`` choices; a stream shows the first."""


class TextStream:
    """Joins the tokens of a job's stream, over reconnections and over attempts (`visq.told`).

    If an attempt says something else than the one before it (sampling), its whole text follows
    after a line break.
    """

    def __init__(self) -> None:
        self.last_event_id: str | None = None
        self.job: JobView | None = None
        """The ended job, after the last event."""
        self._told = Told()

    def feed(self, event: ServerSentEvent) -> str:
        """Take the next event and return the text to show for it (often none)."""
        self.last_event_id = event.id or self.last_event_id
        match event.event:
            case "attempt":
                self._told.begin()
            case "token":
                said = _Token.model_validate_json(event.data)
                if said.index == 0:
                    return self._new_text(self._told.say, said.text)
            case "end":
                return self.ended(JobView.model_validate_json(event.data))
        return ""  # or of a kind that a later version has

    def ended(self, job: JobView) -> str:
        """Take the end of the job. A stream may lack tokens; the result is the truth."""
        self.job = job
        if job.status is not JobStatus.SUCCEEDED:
            return ""
        return self._new_text(self._told.end, result_of(job).text)

    def _new_text(self, told: Callable[[str], str], text: str) -> str:
        try:
            return told(text)
        except ToldOtherwise:
            return f"\n{self._told.start_over()}"


class Reconnects:
    """When a broken stream is opened again, and when not any more."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._failing_since = 0.0
        self._opened_at: float | None = None

    def opened(self) -> None:
        self._opened_at = time.monotonic()

    def progress(self) -> None:
        """An event came: what failed before does not count any more."""
        self._failures = 0

    def after(self, failure: Exception) -> float:
        """Seconds to wait, or `failure` is raised: it has been tried often and long enough."""
        now = time.monotonic()
        if self._opened_at is not None and now - self._opened_at > STABLE_SECONDS:
            self._failures = 0
        self._opened_at = None
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        tried = self._failures > self._policy.max_retries
        if self._policy.max_retries == 0 or (tried and now - self._failing_since > OUTAGE_SECONDS):
            raise failure
        return self._policy.delay(self._failures)
