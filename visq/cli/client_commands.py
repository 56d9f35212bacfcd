"""The commands that talk to a server: ``submit``, ``chat``, ``batch``, ``jobs``, ``show``, ..."""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from visq.cli import client_batch, client_chat
from visq.cli.client_common import (
    AsJson,
    Data,
    Exit,
    Url,
    coloured,
    connected,
    print_json,
    show_error,
)
from visq.cli.console import console, errors

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job (job_...).")]


def register(app: typer.Typer) -> None:
    for command in (
        submit,
        client_chat.chat,
        jobs,
        show,
        cancel,
        retry,
    ):
        app.command(rich_help_panel="Client")(command)
    app.add_typer(client_batch.commands(), name="batch", rich_help_panel="Client")


def submit(
    prompt: Annotated[str, typer.Argument(help="What to ask; `-` reads it from stdin.")],
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="A path or s3://bucket/key; may be repeated."),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(help="Continue this session (ses_...), or `new` to open one."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the answer.")] = True,
    stream: Annotated[bool, typer.Option(help="Show the answer as it is generated.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.")] = None,
    lane: Annotated[str, typer.Option(help="interactive, standard or batch.")] = "interactive",
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of the answer.")] = None,
    result_queue: Annotated[str | None, typer.Option(help="Also publish the result there.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """Submit one job, and print its answer."""
    from visq.client.options import JobOptions
    from visq.ended import result_of
    from visq.errors import VisqError

    options: JobOptions = {"lane": lane, "result_queue": result_queue}  # type: ignore[typeddict-item]
    if session is not None:
        options |= {"session": {}} if session == "new" else {"session_id": session}
    if max_new_tokens is not None:
        options["gen_config"] = {"max_new_tokens": max_new_tokens}
    with connected(url, data) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        job = client.jobs.submit(text, images=image or [], **options)
        if not as_json:
            about = job.id if job.session_id is None else f"{job.id} {job.session_id}"
            errors.print(about, style="dim", soft_wrap=True)
        try:
            if stream and not as_json:
                for piece in job.stream():
                    typer.echo(piece, nl=False)
                typer.echo()
            elif wait:
                answer = result_of(job.wait(timeout)).text
                if not as_json:
                    typer.echo(answer)
            elif not as_json:
                typer.echo(job.id)
        except VisqError as error:
            if not job.status.is_terminal:
                raise
            show_error(error)
            raise typer.Exit(Exit.NO_ANSWER) from None
        finally:
            if as_json:
                print_json(job.view)


def jobs(
    status: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    session: Annotated[str | None, typer.Option(help="Only those of this session.")] = None,
    batch: Annotated[str | None, typer.Option(help="Only those of this batch.")] = None,
    lane: Annotated[str | None, typer.Option(help="Only those of this lane.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """List jobs, newest first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, width in (("job", 36), ("status", 9), ("created", 14), ("answer", 1)):
        table.add_column(column, no_wrap=True, min_width=width)
    with connected(url, data) as client:
        found = client.jobs.list(status=status, session_id=session, batch_id=batch, lane=lane)
        for job in islice(found, limit):
            if as_json:
                print_json(job)
                continue
            answer = job.result.text if job.result else job.error.message if job.error else ""
            table.add_row(
                job.id,
                coloured(job.status),
                f"{job.created_at:%m-%d %H:%M:%S}",
                escape(answer),
            )
    if not as_json:
        console.print(table)


def show(job_id: JobId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Show a job and its whole life."""
    with connected(url, data) as client:
        job = client.jobs.get(job_id).view
        history = client.jobs.history(job_id)
    if as_json:
        events = [event.model_dump(mode="json") for event in history]
        typer.echo(json.dumps({"job": job.model_dump(mode="json"), "history": events}))
        return
    details = Table.grid(padding=(0, 2))
    for name, value in job.model_dump(mode="json", exclude_none=True).items():
        if name in ("object", "result", "error", "waiting_for") or value == {}:
            continue
        shown = coloured(value) if name == "status" else escape(str(value))
        details.add_row(f"[dim]{name}[/]", shown)
    if job.result is not None:
        usage = job.result.usage
        details.add_row("[dim]answer[/]", escape(job.result.text))
        details.add_row(
            "[dim]usage[/]",
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.images} images",
        )
    if job.error is not None:
        details.add_row("[dim]error[/]", f"({job.error.code}) {escape(job.error.message)}")
    if job.waiting_for is not None:
        said = job.waiting_for.model_dump(mode="json", exclude_none=True)
        details.add_row("[dim]waiting for[/]", ", ".join(f"{k} {v}" for k, v in said.items()))
    console.print(details)
    timeline = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("at", "state", "attempt", "worker", "reason"):
        timeline.add_column(column)
    for event in history:
        timeline.add_row(
            f"{event.at:%H:%M:%S.%f}"[:-3],
            coloured(event.to_status),
            str(event.attempt),
            event.worker or "",
            escape(event.reason or ""),
        )
    console.print()
    console.print(timeline)


def cancel(job_id: JobId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Cancel a job, in whatever state it is."""
    with connected(url, data) as client:
        job = client.jobs.cancel(job_id)
    if as_json:
        print_json(job)
    elif job.status.is_terminal:
        console.print(f"{job.id} is {coloured(job.status)}")
    else:
        console.print(f"{job.id} is {coloured(job.status)}, and was asked to stop")


def retry(job_id: JobId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Queue a failed job again."""
    with connected(url, data) as client:
        job = client.jobs.retry(job_id)
    if as_json:
        print_json(job)
    else:
        console.print(f"{job.id} is {coloured(job.status)}")
