"""``visq up``: the embedded stack in a terminal, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from visq import __version__
from visq.cli.console import console
from visq.cli.show_settings import hide_password
from visq.embedded.stack import Stack
from visq.settings import Settings


def run(settings: Settings) -> None:
    """Run the stack until it is asked to end.

    :raises VisqError: if it cannot start or cannot go on.
    """
    for wish in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(wish, signal.default_int_handler)
    status = console.status("starting")

    def tell(line: str) -> None:
        status.update(escape(line))
        if stack.worker is not None:  # everything ran before: this is news
            console.print(f"[yellow]{escape(line)}[/]")

    stack = Stack(settings, tell)
    with suppress(KeyboardInterrupt), ExitStack() as running:
        with status:
            running.enter_context(stack)
        running.callback(console.print, "stopping ([bold]Ctrl-C[/] again: at once)")
        _show(stack)
        stack.wait()
    console.print("stopped")


def _show(stack: Stack) -> None:
    settings, worker = stack.settings, stack.worker
    table = Table.grid(padding=(0, 2))
    rows = [
        ("API", f"{stack.url}  (documentation: {stack.url}/docs)"),
        ("worker", f"{worker.model} on {worker.device}, {worker.dtype}" if worker else ""),
        ("database", hide_password(settings.database)),
        ("broker", hide_password(settings.broker)),
        ("objects", settings.objects),
        ("key", f"tenant {next(iter(settings.tenants))}, in {_near(settings.data)}/api-key"),
        ("logs", f"{_near(settings.data)}/logs"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(f"[bold green]visq {__version__}[/] runs on this machine")
    console.print(table)
    console.print(
        "Try [bold]visq chat[/] in another terminal; [bold]Ctrl-C[/] here stops everything."
    )


def _near(path: Path) -> str:
    """Return `path` as a person in this folder would write it."""
    inside = path.is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path)
