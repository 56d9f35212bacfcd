"""``visq health``: whether the API or the worker of this machine (or container) is ready."""

from __future__ import annotations

import socket
from typing import Literal

import httpx2
import redis

from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import failed_workers, live_workers

TIMEOUT_SECONDS = 5


def check(part: Literal["api", "worker"], settings: Settings) -> str:
    """Return a line that says so.

    :raises Unavailable: if it is not ready; says what is wrong.
    """
    return _api(settings) if part == "api" else _worker(settings)


def _api(settings: Settings) -> str:
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    url = f"http://{everywhere.get(settings.host, settings.host)}:{settings.port}/readyz"
    try:
        answer = httpx2.get(url, timeout=TIMEOUT_SECONDS, trust_env=False)
    except httpx2.HTTPError as error:
        raise Unavailable(f"the API does not answer at {url}: {error}") from error
    if answer.status_code != 200:
        raise Unavailable(f"the API is not ready: {answer.text}")
    return f"the API is ready at {url}"


def _worker(settings: Settings) -> str:
    """Ask Redis: a worker announces itself there under the name of its host."""
    host = socket.gethostname()
    client = redis.Redis.from_url(
        settings.redis, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
    )
    try:
        found = any(worker.id.startswith(f"{host}:") for worker in live_workers(client))
        failed = [each for each in failed_workers(client) if each.host == host]
    except redis.RedisError as error:
        raise Unavailable(f"Redis does not answer: {error}") from error
    finally:
        client.close()
    if not found:
        why = "".join(
            f"; one could not load {each.model} ({each.at:%Y-%m-%d %H:%M:%S} UTC): {each.reason}"
            for each in failed
        )
        raise Unavailable(f"no worker of {host} has announced itself{why}")
    return f"a worker of {host} is ready"
