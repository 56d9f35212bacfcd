"""``visq batch run``: submit items or go on with a batch, and write its results in input order."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from visq.cli import batch_output
from visq.cli.batch_input import input_of
from visq.cli.batch_progress import all_succeeded, followed, summary
from visq.cli.client_common import AsJson, Data, Exit, Url, connected, print_json
from visq.cli.console import console, errors
from visq.errors import InvalidRequest

if TYPE_CHECKING:
    from visq.client import Batch
    from visq.types import BatchEstimate, JobView


def run(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="A file of items (in.jsonl, in.jsonl.gz; s3://bucket/in.jsonl, also .parquet), a "
            "prefix of images (s3://bucket/photos/), or images (paths or s3://...)."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What to ask of each image or item without a prompt."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Where the images lie that a local file names: s3://bucket/x/ or a path."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Write each result there, as a line of JSON, in input order. s3://...: the server "
            "does, when the batch has ended.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Go on with this batch (bat_...), and with its output."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the results.")] = True,
    cancel_on_interrupt: Annotated[
        bool, typer.Option("--cancel-on-interrupt", help="Ctrl-C cancels the batch.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count what there is to do.")
    ] = False,
    lane: Annotated[str | None, typer.Option(help="interactive, standard or batch.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of each answer.")] = None,
    max_in_flight: Annotated[
        int | None, typer.Option(help="Most items at the workers at a time.")
    ] = None,
    expires_in: Annotated[float | None, typer.Option(help="Seconds until it expires.")] = None,
    on_item_error: Annotated[str | None, typer.Option(help="continue or stop.")] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Do once what several items ask for.")
    ] = False,
    result_queue: Annotated[str | None, typer.Option(help="Also publish results there.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """Run a batch of items, and print or write the results in their order.

    Ctrl-C leaves the batch running, and says how to go on with it (`--resume`).
    """
    options: dict[str, Any] = {
        "lane": lane,
        "max_in_flight": max_in_flight,
        "expires_in": expires_in,
        "on_item_error": on_item_error,
        "result_queue": result_queue,
        "dedupe": dedupe or None,
        "gen_config": {"max_new_tokens": max_new_tokens} if max_new_tokens is not None else None,
        "output_uri": output if _is_remote(output) else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    with connected(url, data) as client:
        if output is not None and not _is_remote(output) and output.endswith((".gz", ".parquet")):
            raise InvalidRequest(
                "a local output is plain JSON lines: give another name, or an s3:// one",
                param="output",
            )
        if dry_run:
            items, named = input_of(sources or [], prompt, images)
            _show(client.batches.estimate(items, **options | named), as_json)
            return
        if resume is not None:
            if sources or prompt or images:
                raise InvalidRequest("a batch that is resumed has its items", param="resume")
            batch = client.batches.get(resume)
        else:
            items, named = input_of(sources or [], prompt, images)
            batch = client.batches.submit(items, **options | named)
        errors.print(batch.id, style="dim")
        if not wait:
            typer.echo(batch.view.model_dump_json() if as_json else batch.id)
            return
        results = _Results(batch, output, as_json, is_resumed=resume is not None)
        try:
            results.follow()
        except KeyboardInterrupt:
            if not cancel_on_interrupt:
                _tell_how_to_go_on(batch, output)
                raise typer.Exit(Exit.INTERRUPTED) from None
            batch.cancel()
            errors.print("cancelled; what has ended follows")
            results.follow()
    if not all_succeeded(batch.view):
        errors.print(summary(batch.view))
        raise typer.Exit(Exit.NO_ANSWER)


def _is_remote(output: str | None) -> bool:
    return output is not None and output.startswith("s3://")


class _Results:
    """The results of a batch, on their way to where they are wanted."""

    def __init__(
        self, batch: Batch, output: str | None, as_json: bool, *, is_resumed: bool
    ) -> None:
        self._batch = batch
        self._output = output
        self._as_json = as_json
        self._is_resumed = is_resumed
        self._printed: str | None = None
        """Position of the last one."""

    def follow(self) -> None:
        """Until the end of the batch; a second call goes on where the first was interrupted."""
        with followed(self._batch):
            if self._output is None:
                self._print()
            elif not _is_remote(self._output):
                self._append(Path(self._output))
            self._batch.wait()
        if self._output is not None:
            errors.print(f"written to {self._output}", markup=False)

    def _append(self, path: Path) -> None:
        last = batch_output.last_position(path, self._batch.id) if self._is_resumed else None
        fresh, self._is_resumed = not self._is_resumed, True
        after = None if last is None else str(last)
        batch_output.append(path, self._batch.results(after=after), fresh=fresh)

    def _print(self) -> None:
        for job in self._batch.results(after=self._printed):
            self._printed = str(job.position)
            _print(job, self._as_json)


def _print(job: JobView, as_json: bool) -> None:
    if as_json:
        print_json(job)
    elif job.result is not None:
        typer.echo(f"{job.custom_id}\t{job.result.text}")
    else:
        said = f"({job.error.code}) {job.error.message}" if job.error else job.status
        typer.echo(f"{job.custom_id}\t{said}")


def _tell_how_to_go_on(batch: Batch, output: str | None) -> None:
    to = "" if output is None else f" -o {shlex.quote(output)}"
    errors.print(
        f"\n{batch.id} goes on; to follow it again:\n"
        f"  visq batch run --resume {batch.id}{to}\n"
        f"to end it:\n"
        f"  visq batch cancel {batch.id}",
        markup=False,
        soft_wrap=True,
    )


def _show(estimate: BatchEstimate, as_json: bool) -> None:
    if as_json:
        typer.echo(estimate.model_dump_json())
        return
    table = Table.grid(padding=(0, 2))
    rows = estimate.model_dump(exclude={"object", "errors"})
    for name, value in rows.items():
        shown = "not known" if value is None else f"{value:,.0f}"
        table.add_row(f"[dim]{name.replace('_', ' ')}[/]", shown)
    console.print(table)
    for error in estimate.errors:
        errors.print(f"line {error.line}: ({error.code}) {error.message}", markup=False)
