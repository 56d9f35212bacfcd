"""``visq dead``: look at dead letters, retry them, let go of them.

A dead letter is a job that failed for a reason that may pass (a store that was slow, a worker that
died), with all its attempts used up. These commands are an operator's: they work on the database,
over all tenants, and need no API.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.markup import escape
from rich.table import Table

from visq.cli.client_common import AsJson, Exit, coloured, show_error
from visq.cli.console import console, errors
from visq.cli.operator import Data, operator_database, operator_settings
from visq.errors import Unavailable, VisqError

if TYPE_CHECKING:
    from models.dead_letters import DeadLetter

app = typer.Typer(
    help="Dead letters: jobs that used up their attempts. List, show, retry or drop them.",
    no_args_is_help=True,
)

PAGE: Final = 500
LONG: Final = 400
"""Characters of a text in a request that are shown."""

JobIds = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of jobs (job_...).")]
Every = Annotated[bool, typer.Option("--all", help="All that there are.")]


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="The oldest so many.")] = 50,
    as_json: AsJson = False,
    data: Data = None,
) -> None:
    """List dead letters, the oldest first."""
    with operator_database(operator_settings(data)) as database:
        from models import dead_letters

        found: list[DeadLetter] = []
        while len(found) < limit:
            after = (found[-1].dead_at, found[-1].id) if found else None
            most = min(PAGE, limit - len(found))
            page = database.read(dead_letters.page, after=after, limit=most)
            found += page
            if len(page) < most:
                break
        total = database.read(dead_letters.count)
    if as_json:
        for letter in found:
            typer.echo(json.dumps(_fields(letter)))
        return
    if not found:
        console.print("there are no dead letters")
        return
    for letter in found:
        console.print(
            f"[bold]{letter.id}[/]  {letter.dead_at:%Y-%m-%d %H:%M:%S}  {escape(letter.tenant)}  "
            f"{letter.attempts} attempts{escape(_of(letter))}",
            soft_wrap=True,
        )
        said = f"    ({letter.error_code}) {escape(letter.error_message)}"
        console.print(said, style="dim", soft_wrap=True)
    if total > len(found):
        errors.print(f"and {total - len(found)} more: see --limit", style="dim")


@app.command()
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the job (job_...).")],
    as_json: AsJson = False,
    data: Data = None,
) -> None:
    """Show a dead letter: what was asked, and what became of each attempt."""
    with operator_database(operator_settings(data)) as database:
        from models import dead_letters, jobs, reading, views

        letter = database.read(dead_letters.get, job_id)
        request = shortened(database.read(jobs.get, job_id).request)
        history = [views.event_view(event) for event in database.read(reading.job_events, job_id)]
    if as_json:
        events = [event.model_dump(mode="json") for event in history]
        typer.echo(json.dumps(_fields(letter) | {"request": request, "history": events}))
        return
    details = Table.grid(padding=(0, 2))
    for name, value in _fields(letter).items():
        if value is not None:
            details.add_row(f"[dim]{name}[/]", escape(str(value)))
    for name, value in request.items():
        if value not in (None, {}, []):
            details.add_row(f"[dim]{name}[/]", escape(json.dumps(value, ensure_ascii=False)))
    console.print(details)
    console.print(
        "attempts are counted in all: also those that were handed back, that died with their "
        "engine, or came before a retry, which use up none of VISQ_MAX_ATTEMPTS",
        style="dim",
        soft_wrap=True,
    )
    console.print()
    timeline = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("at", "state", "attempt", "worker", "reason"):
        timeline.add_column(column, overflow="fold")
    for event in history:
        timeline.add_row(
            f"{event.at:%m-%d %H:%M:%S}",
            coloured(event.to_status),
            str(event.attempt),
            escape(event.worker or ""),
            escape(event.reason or ""),
        )
    console.print(timeline)


@app.command()
def retry(
    job_ids: JobIds = None, every: Every = False, as_json: AsJson = False, data: Data = None
) -> None:
    """Queue dead letters again, with all their attempts; an API or a worker publishes them."""
    _each("retry", "queued again", job_ids or [], every, as_json, data)


@app.command()
def drop(
    job_ids: JobIds = None, every: Every = False, as_json: AsJson = False, data: Data = None
) -> None:
    """Let go of dead letters: their jobs stay failed, and are listed here no more."""
    _each("drop", "dropped", job_ids or [], every, as_json, data)


def _each(
    action: Literal["retry", "drop"],
    done: str,
    named: Sequence[str],
    every: bool,
    as_json: bool,
    data: Path | None,
) -> None:
    """Do it to each job; what fails for one of them is said, and does not keep the others from it.

    :raises typer.Exit: with status 1, if it failed for one of them.
    """
    if bool(named) == every:
        raise typer.BadParameter("name the ids of jobs, or --all")
    failed = False
    with operator_database(operator_settings(data)) as database:
        from models import dead_letters

        job_ids = database.read(dead_letters.ids) if every else list(dict.fromkeys(named))
        for job_id in job_ids:
            try:
                database.run(getattr(dead_letters, action), job_id)
            except Unavailable:
                raise
            except VisqError as error:
                failed = True
                if as_json:
                    said = {"code": error.code, "message": error.message}
                    typer.echo(json.dumps({"id": job_id, "ok": False, "error": said}))
                else:
                    show_error(error)
            else:
                if as_json:
                    typer.echo(json.dumps({"id": job_id, "ok": True, "error": None}))
                else:
                    console.print(f"{job_id} {done}", soft_wrap=True)
    if failed:
        raise typer.Exit(Exit.FAILED)
    if not job_ids and not as_json:
        console.print("there are no dead letters")


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return asdict(letter) | {"dead_at": letter.dead_at.isoformat()}


def _of(letter: DeadLetter) -> str:
    """Where it belongs."""
    if letter.session_id is not None:
        return f"  turn {letter.turn} of {letter.session_id}"
    if letter.batch_id is not None:
        return f"  {letter.custom_id} of {letter.batch_id}"
    return ""


def shortened(value: Any) -> Any:
    """`value` (of JSON) with its long texts cut."""
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    if isinstance(value, str) and len(value) > LONG:
        return f"{value[:LONG]}... ({len(value)} characters)"
    return value
