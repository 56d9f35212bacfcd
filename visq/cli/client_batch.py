"""``visq batch``: ``run``, ``watch``, ``list``, ``show`` and ``cancel``.

``visq batch in.jsonl`` and ``visq batch photo.png -p ...`` are short for ``visq batch run ...``.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated, Any

import typer
import typer.core
from rich.markup import escape
from rich.table import Table

from visq.cli.batch_progress import all_succeeded, followed, summary
from visq.cli.batch_run import run
from visq.cli.client_common import AsJson, Data, Exit, Url, coloured, connected
from visq.cli.console import console, errors

BatchId = Annotated[str, typer.Argument(metavar="ID", help="Id of the batch (bat_...).")]


class RunByDefault(typer.core.TyperGroup):
    """What is none of the commands is the input of ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def commands() -> typer.Typer:
    """``visq batch``."""
    app = typer.Typer(
        cls=RunByDefault,
        help="Many items at once: run, watch, list, show, cancel.",
        no_args_is_help=True,
    )
    app.command(name="list")(list_batches)
    for command in (run, watch, show, cancel):
        app.command()(command)
    return app


def watch(batch_id: BatchId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Follow a batch until its end; Ctrl-C only stops following."""
    with connected(url, data) as client:
        batch = client.batches.get(batch_id)
        try:
            if as_json:
                for event in batch.events(items=False):
                    if event.batch is not None:
                        batch.view = event.batch
                        typer.echo(event.batch.model_dump_json())
            else:
                with followed(batch):
                    batch.wait()
        except KeyboardInterrupt:
            errors.print(f"{batch.id} goes on", markup=False)
            raise typer.Exit(Exit.INTERRUPTED) from None
    if not as_json:
        console.print(summary(batch.view))
    if not all_succeeded(batch.view):
        raise typer.Exit(Exit.NO_ANSWER)


def list_batches(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """List batches, newest first."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, width in (("batch", 36), ("status", 11), ("created", 14)):
        table.add_column(column, no_wrap=True, min_width=width)
    for column in ("items", "succeeded", "failed", "lane"):
        table.add_column(column, justify="right" if column != "lane" else "left")
    with connected(url, data) as client:
        for view in islice(client.batches.list(), limit):
            if as_json:
                typer.echo(view.model_dump_json())
                continue
            table.add_row(
                view.id,
                coloured(view.status),
                f"{view.created_at:%m-%d %H:%M:%S}",
                str(view.counts.total),
                str(view.counts.succeeded),
                str(view.counts.failed),
                view.lane,
            )
    if not as_json:
        console.print(table)


def show(batch_id: BatchId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Show a batch: its counters, where its output lies, and why it failed."""
    with connected(url, data) as client:
        view = client.batches.get(batch_id).view
    if as_json:
        typer.echo(view.model_dump_json())
        return
    details = Table.grid(padding=(0, 2))
    known = view.model_dump(mode="json", exclude_none=True)
    for name in ("object", "errors", "request_counts"):
        known.pop(name, None)
    known["counts"] = ", ".join(f"{count} {name}" for name, count in known["counts"].items())
    for name, value in known.items():
        if value == {}:
            continue
        shown = getattr(view, name) if name.endswith("_at") else value
        said = json.dumps(shown) if isinstance(shown, dict) else str(shown)
        details.add_row(f"[dim]{name}[/]", coloured(said) if name == "status" else escape(said))
    for error in view.errors.data if view.errors else []:
        details.add_row("[dim]error[/]", f"({error.code}) {escape(error.message)}")
    console.print(details)


def cancel(batch_id: BatchId, as_json: AsJson = False, url: Url = None, data: Data = None) -> None:
    """Cancel a batch: none of its items starts any more."""
    with connected(url, data) as client:
        view = client.batches.cancel(batch_id)
    if as_json:
        typer.echo(view.model_dump_json())
    else:
        console.print(f"{view.id} is {coloured(view.status)}")
