"""What the worker and its engine process say to each other, as typed values over a pipe.

Pixels do not go through the pipe: a request names them in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from worker.engine.face import EngineInfo, EngineRequest, Event


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


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of the request `number`."""

    number: int
    event: Event


ToEngine: TypeAlias = Submit | Cancel
FromEngine: TypeAlias = Ready | LoadFailed | Happened
