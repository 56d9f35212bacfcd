"""``visq health``: whether the API or the worker of this machine (or container) is ready."""

from __future__ import annotations

import socket
from typing import Literal

import httpx2
import redis

from visq.cli.operator import SOCKET_SECONDS, redis_client
from visq.embedded.connection import ConnectionInfo
from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import failed_workers, live_workers


def check(part: Literal["api", "worker"], settings: Settings) -> str:
    """Return a line that says so.

    :raises Unavailable: if it is not ready; says what is wrong.
    """
    return _api(settings) if part == "api" else _worker(settings)


def _api(settings: Settings) -> str:
    url = f"{_url(settings)}/readyz"
    try:
        answer = httpx2.get(url, timeout=SOCKET_SECONDS, trust_env=False)
    except httpx2.HTTPError as error:
        raise Unavailable(f"the API does not answer at {url}: {error}") from error
    if answer.status_code != 200:
        raise Unavailable(f"the API is not ready: {answer.text}")
    return f"the API is ready at {url}"


def _url(settings: Settings) -> str:
    """Where the API should answer; what is not set is that of the running `visq up`."""
    running = ConnectionInfo.read(settings.data)
    if running is not None and not {"host", "port"} & settings.model_fields_set:
        return running.url
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return f"http://{everywhere.get(settings.host, settings.host)}:{settings.port}"


def _worker(settings: Settings) -> str:
    """Ask Redis: a worker announces itself there under the name of its host."""
    host = socket.gethostname()
    client = redis_client(settings.redis, "VISQ_REDIS_URL")
    try:
        found = [each for each in live_workers(client) if each.id.startswith(f"{host}:")]
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
    if all(each.engine_down for each in found):
        raise Unavailable(f"the engine of {found[0].id} is down: {found[0].engine_down}")
    return f"a worker of {host} is ready"
