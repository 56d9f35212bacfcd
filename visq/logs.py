"""How the processes of visq log: one line an event on stderr, for people on a terminal, else JSON.

Import it in server processes only: a plain install has no structlog.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog

CHATTY: Final = (
    "aiosqlite",
    "alembic",
    "amqp",
    "asyncio",
    "botocore",
    "celery.app.trace",
    "celery.worker.strategy",
    "httpcore2",  # shows headers, and so signed URLs
    "httpx2",
    "kombu",
    "urllib3",
)
"""Libraries whose debug and info lines say nothing about jobs."""


def configure(level: str) -> None:
    """Send structlog and the standard library's logging the same way, from `level` on."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    on_terminal = sys.stderr.isatty()
    rendering: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if on_terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
