"""The commands that run visq, and those for its operators: ``doctor`` and ``dead``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from visq.cli import dead
from visq.cli.client_common import AsJson, Exit
from visq.cli.console import console, load_settings, mount_rooms
from visq.cli.operator import Data as OperatorData
from visq.cli.operator import operator_settings
from visq.errors import Unavailable

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder for all that is kept.", envvar="VISQ_DATA"),
]


def register(app: typer.Typer) -> None:
    for command in (up, api, worker, migrate, health, config, doctor):
        app.command(rich_help_panel="Servers")(command)
    app.add_typer(dead.app, name="dead", rich_help_panel="Servers")


def up(
    data: Data = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0: any free one.")] = None,
) -> None:
    """Run everything on this machine: SQLite, Valkey, the API and one worker. Ctrl-C ends it."""
    from visq.embedded.up import run

    run(load_settings(data=data, port=port))


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Run the REST API."""
    settings = load_settings(host=host, port=port)
    mount_rooms("api", "fastapi")
    from api.main import serve

    serve(settings)


def worker() -> None:
    """Run one worker: load the model, then take jobs."""
    settings = load_settings()
    mount_rooms("worker", "torch")
    from worker.main import run

    raise typer.Exit(run(settings))


def migrate(
    revision: Annotated[str, typer.Argument(help="Revision to go to, forwards.")] = "head",
) -> None:
    """Bring the database's tables up to date."""
    settings = load_settings()
    mount_rooms("api", "alembic")
    from sqlalchemy.exc import OperationalError

    from migrations.run import current, upgrade

    try:
        upgrade(settings.database, revision)
    except OperationalError as error:
        raise Unavailable(f"the database does not answer: {error.orig}") from error
    console.print(f"database at revision {current(settings.database)}")


def health(
    part: Annotated[Literal["api", "worker"], typer.Argument(help="Which one.")] = "api",
    data: OperatorData = None,
) -> None:
    """Say whether the API or the worker of this machine is ready; exit status 1 if it is not."""
    from visq.cli.health import check

    console.print(check(part, operator_settings(data)))


def doctor(as_json: AsJson = False, data: OperatorData = None) -> None:
    """Check the servers, the workers and the jobs, and say what to do; exit status 1: a problem."""
    from visq.cli.doctor import run

    if not run(operator_settings(data), as_json=as_json):
        raise typer.Exit(Exit.FAILED)


def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the settings in effect, secrets hidden."""
    from visq.cli.show_settings import shown

    rows = shown(load_settings())
    if as_json:
        typer.echo(json.dumps({row.variable: row.value for row in rows}, indent=2))
        return
    for row in rows:
        mark = "bold green" if row.is_set else "bold"
        console.print(f"[{mark}]{row.variable}[/] = {escape(row.value)}", soft_wrap=True)
        for line in row.meaning.splitlines():
            console.print(f"    [dim]{escape(line)}[/]", soft_wrap=True)
    console.print("[dim]Green: set by you. Each is an environment variable.[/]")
