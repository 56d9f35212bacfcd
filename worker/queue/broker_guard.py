"""Keeps the Celery 5.7.0 worker alive when Redis goes away while a message is unacknowledged.

On a lost connection Celery 5.7.0 closes the broken channel, whose clean-up asks for a client that
is gone already; the AttributeError ends the process (seen on prefork and threads pools, though
not at every restart; 5.6.3 lives). The same error comes from acknowledging a message of a dead
channel. Delete this module, its call in `worker.main` and its test
(tests/worker/test_broker_guard.py) when upstream has mended it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import structlog
from kombu.message import Message
from kombu.transport import redis as kombu_redis

log = structlog.get_logger(__name__)


def install() -> None:
    """Patch kombu in this process. Safe to call twice."""
    # The clean-up that fails would put unacknowledged messages back; the database publishes them.
    kombu_redis.Channel.do_restore = False
    for name in ("ack_log_error", "reject_log_error"):
        method = getattr(Message, name)
        if not hasattr(method, "__wrapped__"):
            setattr(Message, name, _tolerating_a_dead_channel(method))


def _tolerating_a_dead_channel(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def tolerant(self: Message, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except AttributeError as error:
            # The message comes again; its job has ended, so that run will find nothing to claim.
            log.warning("message not acknowledged: its channel is gone", error=str(error))

    return tolerant
