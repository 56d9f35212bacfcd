"""visq: vision-language models behind a message queue, and the same engine as a library.

A plain install is the client and the consumer; the servers come with the extras ``api``, ``worker``
and ``all``. Names are imported when they are first used, so ``import visq`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from visq.client import AsyncClient, Client
    from visq.consumer import Event, consume
    from visq.errors import VisqError
    from visq.settings import Settings

__version__: Final = "0.1.0"

__all__ = ["AsyncClient", "Client", "Event", "Settings", "VisqError", "consume"]

_HOMES: Final = {
    "AsyncClient": "visq.client",
    "Client": "visq.client",
    "Event": "visq.consumer",
    "Settings": "visq.settings",
    "VisqError": "visq.errors",
    "consume": "visq.consumer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
