"""``visq demo``: the whole flow on sample pictures, on a stack of its own, checked.

A chat turn about a picture in the object store, a follow-up in its session, and a batch of pictures
go in through the API; a consumer in another process prints the results from the queue. It ends with
status 0 only if every result arrived everywhere and most answers were right.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import typer
from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from visq.cli.client_common import Data, shown_errors
from visq.cli.console import console, load_settings
from visq.cli.demo_consumer import ConsumerProcess
from visq.settings import Settings

if TYPE_CHECKING:
    from visq.client import Client
    from visq.objects import ObjectStore
    from visq.types import JobResult

BATCH_SIZE: Final = 24
ENOUGH_RIGHT: Final = 0.8
"""Share of the answers that must be right."""
RESULTS_SECONDS: Final = 30.0
"""Longest wait for the last result at the consumer, after the last answer."""


SHORT: Final = {"max_new_tokens": 64}
"""The answers are a few words."""


class Question(BaseModel):
    question: str
    answer: str


class Sample(Question):
    """A picture that ships with the small model, and what is true of it."""

    file: str
    follow_up: Question | None = None


@dataclass(frozen=True)
class Shown:
    """One answered question."""

    job_id: str
    picture: str
    question: str
    answer: str
    truth: str

    @property
    def is_right(self) -> bool:
        return _plain(self.answer) == _plain(self.truth)


@dataclass(frozen=True)
class Report:
    """What the flow came to."""

    rows: Sequence[Shown]
    seconds: dict[str, float]
    missing: int
    """Results that did not come through the queue."""
    missing_values: int
    """Results that Redis does not hold."""

    @property
    def right(self) -> int:
        return sum(row.is_right for row in self.rows)

    @property
    def worked(self) -> bool:
        arrived = self.missing == self.missing_values == 0
        return arrived and self.right >= ENOUGH_RIGHT * len(self.rows)


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Servers")(demo)


def demo(data: Data = None) -> None:
    """Start everything, run the whole flow on sample pictures, check it, and stop."""
    from visq.client import Client
    from visq.embedded.stack import Stack
    from visq.objects import open_store

    with shown_errors(), ExitStack() as running:
        folder = data or Path(running.enter_context(TemporaryDirectory(prefix="visq-demo-")))
        settings = load_settings(data=folder)
        if "port" not in settings.model_fields_set:
            settings = load_settings(data=folder, port=0)
        start = time.monotonic()
        with console.status("starting") as status:
            stack = running.enter_context(Stack(settings, lambda line: status.update(escape(line))))
        console.print(f"started on {stack.url} in {time.monotonic() - start:.1f} s")
        store = open_store(stack.settings)
        running.callback(store.close)
        client = running.enter_context(Client(stack.url, stack.api_key))
        report = run_flow(client, store, stack.settings, console)
        console.print("stopping")
    if not report.worked:
        raise typer.Exit(1)


def run_flow(client: Client, store: ObjectStore, settings: Settings, console: Console) -> Report:
    """Run the flow against any stack, with the first tenant of `settings`, and print it."""
    samples = load_samples()
    tenant = next(iter(settings.tenants))
    place = _put_pictures(samples, store, settings, tenant)
    console.print(f"{len(samples)} sample pictures in {place}/")
    first = next(sample for sample in samples if sample.follow_up is not None)
    rest = [sample for sample in samples if sample is not first]
    batch = [rest[number * len(rest) // BATCH_SIZE] for number in range(BATCH_SIZE)]
    queue = f"visq-demo-{secrets.token_hex(4)}"
    with ConsumerProcess(settings.broker, queue, f"{tenant}.#", _printer(console)) as consumer:
        console.print(f"a consumer in another process waits at the queue {queue}\n")
        seconds: dict[str, float] = {}
        rows = _chat(client, first, place, console, seconds)
        rows += _batch(client, batch, place, console, seconds)
        missing = consumer.wait_for(len(rows), RESULTS_SECONDS)
    report = Report(rows, seconds, missing, _missing_values(rows, settings))
    _print_report(report, console)
    return report


def load_samples() -> list[Sample]:
    """The pictures that ship with the small model."""
    text = (samples_folder() / "samples.json").read_text(encoding="utf-8")
    return TypeAdapter(list[Sample]).validate_json(text)


def samples_folder() -> Path:
    from visq import rooms

    return rooms.folder() / "worker" / "small_model" / "samples"


def _put_pictures(
    samples: Sequence[Sample], store: ObjectStore, settings: Settings, tenant: str
) -> str:
    """Put the pictures where the tenant may read them; the ``s3://`` folder."""
    from visq.objects import parse_uri

    # A real S3 has no bucket `demo`; the tenant's own part of the upload bucket is always there.
    is_s3 = settings.objects == "s3"
    place = f"s3://{settings.upload_bucket}/{tenant}/demo" if is_s3 else "s3://demo"
    for sample in samples:
        picture = (samples_folder() / sample.file).read_bytes()
        store.put(parse_uri(f"{place}/{sample.file}"), picture, "image/png")
    return place


def _chat(
    client: Client, sample: Sample, place: str, console: Console, seconds: dict[str, float]
) -> list[Shown]:
    """A turn with a picture that opens a session, and a turn that continues it."""
    uri = f"{place}/{sample.file}"
    assert sample.follow_up is not None
    console.print(f"[bold]chat[/] about {uri}")
    start = time.monotonic()
    job = client.jobs.submit(sample.question, images=[uri], session={}, gen_config=SHORT)
    answer = job.result().text
    seconds["chat: submit to answer"] = time.monotonic() - start
    _print_turn(console, sample.question, answer)
    assert job.session_id is not None
    start = time.monotonic()
    follow_up = client.sessions.get(job.session_id).chat(
        sample.follow_up.question, gen_config=SHORT
    )
    second = follow_up.result().text
    seconds["follow-up: submit to answer"] = time.monotonic() - start
    _print_turn(console, sample.follow_up.question, second)
    return [
        Shown(job.id, sample.file, sample.question, answer, sample.answer),
        Shown(
            follow_up.id,
            "the same session",
            sample.follow_up.question,
            second,
            sample.follow_up.answer,
        ),
    ]


def _batch(
    client: Client,
    samples: Sequence[Sample],
    place: str,
    console: Console,
    seconds: dict[str, float],
) -> list[Shown]:
    """All pictures as one batch, with a progress bar."""
    console.print(f"\n[bold]batch[/] of {len(samples)} pictures")
    start = time.monotonic()
    batch = client.batches.submit(
        [
            {
                "custom_id": sample.file,
                "prompt": sample.question,
                "images": [f"{place}/{sample.file}"],
            }
            for sample in samples
        ],
        gen_config=SHORT,
    )
    columns = (TextColumn("items"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("items", total=len(samples))
        batch.wait(on_progress=lambda counts: progress.update(task, completed=counts.finished))
    seconds["batch: submit to last answer"] = time.monotonic() - start
    return [
        Shown(job.id, sample.file, sample.question, _said(job.result), sample.answer)
        for sample, job in zip(samples, batch.results(), strict=True)
    ]


def _missing_values(rows: Sequence[Shown], settings: Settings) -> int:
    """How many of the results are not in Redis."""
    import redis

    from visq.streams import job_key

    with redis.Redis.from_url(settings.redis) as connection:
        return len(rows) - int(connection.exists(*(job_key(row.job_id) for row in rows)))


def _print_report(report: Report, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("picture", "question", "answer", ""):
        table.add_column(column)
    for row in report.rows:
        mark = "[green]right[/]" if row.is_right else f"[red]wrong: {escape(row.truth)}[/]"
        table.add_row(*map(escape, (row.picture, row.question, row.answer)), mark)
    console.print()
    console.print(table)
    timings = Table.grid(padding=(0, 2))
    for name, value in report.seconds.items():
        timings.add_row(name, f"{value:.2f} s")
    per_second = (len(report.rows) - 2) / report.seconds["batch: submit to last answer"]
    timings.add_row("batch", f"{per_second:.1f} items/s")
    console.print()
    console.print(timings)
    total = len(report.rows)
    colour = "green" if report.worked else "red"
    console.print(
        f"\n[{colour}]{report.right} of {total} answers are right[/]; results that came: "
        f"{total - report.missing} by the queue, {total - report.missing_values} by Redis"
    )


def _printer(console: Console) -> Any:
    def show(line: str) -> None:
        event = json.loads(line)
        console.print(f"  [dim]queue ->[/] [cyan]{event['type']}[/] {escape(event['text'])}")

    return show


def _print_turn(console: Console, question: str, answer: str) -> None:
    console.print(f"  [bold]you[/]   {escape(question)}\n  [bold]model[/] {escape(answer)}")


def _said(result: JobResult | None) -> str:
    return result.text if result is not None else "(no answer)"


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
