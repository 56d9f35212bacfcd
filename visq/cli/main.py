"""``visq``: the servers (`server_commands.py`), the client (`client_commands.py`) and the demo."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from visq import __version__
from visq.cli import client_commands, demo, server_commands
from visq.cli.console import console, errors
from visq.errors import ConfigurationError, VisqError

app = typer.Typer(
    help="Vision-language models behind a message queue.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a plain traceback suits a server's log
    context_settings={"help_option_names": ["-h", "--help"]},
)
client_commands.register(app)
for commands in (client_commands, demo, server_commands):
    commands.register(app)
demo.register(app)


def _show_version(value: bool) -> None:
    if value:
        console.print(f"visq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Vision-language models behind a message queue."""


def main() -> None:
    """Run the command; an error of ours is one line and an exit status, not a traceback.

    Exit status 2: it was called or set up wrongly. 1: it failed.
    """
    try:
        app()
    except VisqError as error:
        errors.print(f"[bold red]error[/] ({error.code}): {escape(error.message)}", soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
