"""``visq batch``: many items at once, with a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from visq.cli.client_common import AsJson, Data, Exit, Url, connected, print_json
from visq.cli.console import errors
from visq.errors import InvalidRequest

if TYPE_CHECKING:
    from visq.client import Batch
    from visq.client.options import BatchOptions
    from visq.types import BatchCounts


def batch(
    sources: Annotated[
        list[str],
        typer.Argument(help="A .jsonl file of items, or images (paths or s3://...)."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What to ask of each image or item without a prompt."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write each result there, as a line of JSON."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the results.")] = True,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of each answer.")] = None,
    result_queue: Annotated[str | None, typer.Option(help="Also publish results there.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """Run a batch of items, and print or write the results in their order."""
    options: BatchOptions = {"result_queue": result_queue}
    if max_new_tokens is not None:
        options["gen_config"] = {"max_new_tokens": max_new_tokens}
    with connected(url, data) as client:
        submitted = client.batches.submit(_items(sources, prompt), **options)
        errors.print(submitted.id, style="dim")
        if not wait:
            typer.echo(submitted.view.model_dump_json() if as_json else submitted.id)
            return
        try:
            counts = _follow(submitted)
        except KeyboardInterrupt:
            submitted.cancel()
            errors.print("cancelled; what has ended follows")
            counts = submitted.wait().counts
        _write(submitted, output, as_json)
    if counts.succeeded < counts.total:
        errors.print(
            f"{counts.succeeded} of {counts.total} succeeded: {counts.failed} failed, "
            f"{counts.cancelled} cancelled, {counts.expired} expired"
        )
        raise typer.Exit(Exit.NO_ANSWER)


def _follow(submitted: Batch) -> BatchCounts:
    """Wait with a progress bar."""
    columns = (TextColumn("items"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("items", total=submitted.counts.total)

        def advance(counts: BatchCounts) -> None:
            progress.update(task, completed=counts.finished)

        return submitted.wait(on_progress=advance).counts


def _write(submitted: Batch, output: Path | None, as_json: bool) -> None:
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            for job in submitted.results():
                file.write(job.model_dump_json() + "\n")
        errors.print(f"written to {output}", markup=False)
        return
    for job in submitted.results():
        if as_json:
            print_json(job)
        elif job.result is not None:
            typer.echo(f"{job.custom_id}\t{job.result.text}")
        else:
            said = f"({job.error.code}) {job.error.message}" if job.error else job.status
            typer.echo(f"{job.custom_id}\t{said}")


def _items(sources: list[str], prompt: str | None) -> list[dict[str, Any]]:
    """:raises InvalidRequest: names the line that is no item, or that has no prompt."""
    if len(sources) == 1 and sources[0].endswith((".jsonl", ".ndjson")):
        return _read_items(Path(sources[0]), prompt)
    if prompt is None:
        raise InvalidRequest("say what to ask of each image: --prompt", param="prompt")
    names = [source[-128:] for source in sources]
    numbered = len(set(names)) < len(names)
    return [
        {"custom_id": str(number) if numbered else name, "prompt": prompt, "images": [source]}
        for number, (name, source) in enumerate(zip(names, sources, strict=True))
    ]


def _read_items(path: Path, prompt: str | None) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise InvalidRequest(f"{path}, line {number} is not an object")
        if prompt is not None and "messages" not in item:
            item.setdefault("prompt", prompt)
        items.append(item)
    return items
