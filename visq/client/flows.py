"""How a call to the API is written once for both clients.

A *flow* is a generator that says what to do next (send this, pause, do these together) and is told
what came of it; it does no I/O. `visq.client.runners` drives flows over a blocking or an async
connection::

    calls.submit_job(...)  ──yields──►  Request, Request, ...  ──►  Runner | AsyncRunner

Retries are a flow too (`attempts`), so they are the same in both clients.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, Final, TypeVar

import httpx2

from visq.client.answers import error_of
from visq.errors import Unavailable, VisqError

T = TypeVar("T")

TEMPORARY: Final = frozenset({429, 502, 503, 504})
"""Statuses that the same request may not meet again."""

MAX_RETRY_AFTER: Final = 120.0
"""Seconds. A server that asks for more is not waited for: the error is raised at once."""

OUTAGE_SECONDS: Final = 60.0
"""A call that waits for something outlives a server that is away for this long."""

_NOT_SENT: Final = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True)
class Request:
    """One request, sent again by itself when it fails for a moment."""

    method: str
    path: str
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: bytes | None = None
    file: tuple[str, bytes | BinaryIO] | None = None
    """Name and content of an upload; of an open file, all of it."""
    form: Mapping[str, str] = field(default_factory=dict)
    """Fields beside it."""
    answer_seconds: float = 0.0
    """How long the server may think about it, beyond the client's time-out."""
    patience_seconds: float = 0.0
    """Repeat it at least for this long, however many times that is."""
    repeatable: bool = True
    """``False``: sent again only if the server cannot have seen it."""


@dataclass(frozen=True)
class Exchange:
    """One attempt at a request."""

    request: Request


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Together:
    """Flows that do not depend on each other; comes back with their results in order."""

    flows: Sequence[Flow[Any]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


Step = Request | Exchange | Pause | Together
Flow = Generator[Step, Any, T]


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter: clients that failed together do not come back together."""

    max_retries: int = 3
    first_seconds: float = 0.5
    most_seconds: float = 8.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after that many failures (1, 2, ...)."""
        most: float = min(self.most_seconds, self.first_seconds * 2 ** (failures - 1))
        return random.uniform(most / 2, most)


def attempts(request: Request, policy: RetryPolicy) -> Flow[Answer]:
    """Send `request` until it is answered.

    :raises VisqError: the API's error.
    :raises Unavailable: no answer, again and again.
    """
    failures = 0
    start = time.monotonic()
    while True:
        asked: float | None = None
        try:
            answer: Answer = yield Exchange(request)
        except httpx2.TransportError as error:
            failure: VisqError = unreachable(error)
            may_repeat = request.repeatable or isinstance(error, _NOT_SENT)
        else:
            if answer.status < 400:
                return answer
            failure = error_of(answer.status, answer.body)
            asked = retry_after(answer.headers)
            may_repeat = answer.status in TEMPORARY and (asked or 0) <= MAX_RETRY_AFTER
        failures += 1
        patient = policy.max_retries > 0 and time.monotonic() - start < request.patience_seconds
        if not may_repeat or (failures > policy.max_retries and not patient):
            raise failure
        yield Pause(max(policy.delay(failures), asked or 0.0))


def unreachable(error: httpx2.TransportError) -> Unavailable:
    """A failure of the connection as an error of ours."""
    said = str(error) or type(error).__name__
    failure = Unavailable(f"the visq server does not answer ({said})")
    failure.__cause__ = error
    return failure


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the answer's ``Retry-After`` asks for (it is a number or a date)."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
