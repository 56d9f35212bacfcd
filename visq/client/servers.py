"""Which server a client talks to, when the program does not say."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from visq.embedded.connection import ConnectionInfo
from visq.errors import ConfigurationError


@dataclass(frozen=True)
class Server:
    url: str
    api_key: str | None


def find_server(base_url: str | None, api_key: str | None) -> Server:
    """What is given, else ``VISQ_URL`` and ``VISQ_API_KEY``, else the `visq up` of this folder.

    :raises ConfigurationError: none of them names a server.
    """
    url = base_url or os.environ.get("VISQ_URL")
    key = api_key or os.environ.get("VISQ_API_KEY")
    if url:
        return Server(url.rstrip("/"), key)
    running = running_stack()
    if running is None:
        raise ConfigurationError(
            "no visq server is known: give its URL, set VISQ_URL (and VISQ_API_KEY), "
            "or start one with `visq up`"
        )
    return Server(running.url.rstrip("/"), key or running.api_key)


def find_broker(broker_url: str | None) -> str:
    """What is given, else ``VISQ_BROKER_URL``, else that of the `visq up` of this folder.

    :raises ConfigurationError: none of them names a broker.
    """
    url = broker_url or os.environ.get("VISQ_BROKER_URL")
    if url:
        return url
    running = running_stack()
    if running is None:
        raise ConfigurationError(
            "no broker is known: give its URL, set VISQ_BROKER_URL, or start one with `visq up`"
        )
    return running.broker_url


def running_stack() -> ConnectionInfo | None:
    """The embedded stack that runs on ``VISQ_DATA`` (by default ``./visq-data``)."""
    return ConnectionInfo.read(Path(os.environ.get("VISQ_DATA") or "visq-data"))
