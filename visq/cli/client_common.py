"""What the client's commands share: the connection, options, and how results and errors are shown.

====== =======================================================================================
status
====== =======================================================================================
0      done; the job, or every item of the batch, succeeded
1      it failed: the server is away, there is no such job, ...
2      it was called or set up wrongly
3      the job ended without an answer, or not every item of the batch succeeded
4      it has not ended within ``--timeout``, and goes on
130    Ctrl-C; what was submitted goes on
====== =======================================================================================

Results go to stdout and everything else to stderr, so output can be piped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from visq.cli.console import errors
from visq.errors import ConfigurationError, VisqError

if TYPE_CHECKING:
    from visq.client import Client
    from visq.types import JobView


class Exit(IntEnum):
    FAILED = 1
    WRONG = 2
    NO_ANSWER = 3
    TIMED_OUT = 4
    INTERRUPTED = 130


Url = Annotated[
    str | None,
    typer.Option("--url", help="The server; by default the running `visq up`.", envvar="VISQ_URL"),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Data folder of the running `visq up`.", envvar="VISQ_DATA"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

STATUS_COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "expired": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "queued": "blue",
    "waiting": "blue",
    "completed": "green",
    "cancelling": "yellow",
    "in_progress": "cyan",
    "finalizing": "cyan",
    "validating": "blue",
}


@contextmanager
def connected(url: str | None, data: Path | None) -> Iterator[Client]:
    """A client; errors inside become one line on stderr and an exit status.

    The key comes from ``VISQ_API_KEY`` or the data folder, never from the command line, which
    other users of the machine can see.
    """
    from visq.client import Client
    from visq.embedded.connection import ConnectionInfo

    with shown_errors():
        running = ConnectionInfo.read(data) if data is not None and url is None else None
        found = (running.url, running.api_key) if running is not None else (url, None)
        with Client(*found) as client:
            yield client


@contextmanager
def shown_errors() -> Iterator[None]:
    """Errors of ours become one line on stderr, with their code, and an exit status."""
    try:
        yield
    except VisqError as error:
        show_error(error)
        wrong = isinstance(error, ConfigurationError)
        raise typer.Exit(Exit.WRONG if wrong else Exit.FAILED) from None
    except TimeoutError as error:
        errors.print(f"[bold red]error[/] (timeout): {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(Exit.TIMED_OUT) from None


def show_error(error: VisqError) -> None:
    errors.print(f"[bold red]error[/] ({error.code}): {escape(error.message)}", soft_wrap=True)


def print_json(view: JobView) -> None:
    """One JSON object on one line."""
    typer.echo(view.model_dump_json())


def coloured(status: str) -> str:
    return f"[{STATUS_COLOURS.get(status, 'white')}]{status}[/]"
