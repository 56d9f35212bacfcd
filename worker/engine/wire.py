"""What the worker and its engine process say to each other, as typed values over a pipe.

Pixels do not go through the pipe: a request names them in shared memory, or the engine asks for
them when it must see a known picture again (`worker.engine.lending`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from visq.errors import VisqError
from visq.pixels import PixelBuffer
from worker.engine.face import EngineInfo, EngineRequest, Logprobs, Outcome
from worker.engine.stats import EngineStats

ALIVE_SECONDS: Final = 1.0
"""Time between two messages `Alive`."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Answer this request; its events come back under `number`."""

    number: int
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The model cannot be loaded; the process ends."""

    message: str


Said: TypeAlias = tuple[int, str, list[int], int, list[Logprobs] | None]
"""A request's number and the fields of its `TokenEvent`: as a tuple it costs far less to send."""


@dataclass(frozen=True, slots=True)
class Happened:
    """Events of many requests since the last message; `ended` came after all that was `said`."""

    said: list[Said]
    ended: list[tuple[int, Outcome]]


@dataclass(frozen=True, slots=True)
class Alive:
    """Sent every `ALIVE_SECONDS`, by a thread that does not wait for the model."""

    progress: int
    """Changes while the engine goes on: rounds of its loop, or, of `generate`, events so far."""
    stats: EngineStats | None


@dataclass(frozen=True, slots=True)
class PixelsNeeded:
    """The model must see a known picture. Answered by `Pixels`, whatever becomes of the request."""

    number: int
    index: int
    """In `EngineRequest.images`."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """What became of `PixelsNeeded`."""

    number: int
    index: int
    pixels: PixelBuffer | VisqError
    """They belong to the worker, as those of any picture; or why there are none."""


ToEngine: TypeAlias = Submit | Cancel | Pixels
FromEngine: TypeAlias = Ready | LoadFailed | Happened | Alive | PixelsNeeded
