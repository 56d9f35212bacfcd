"""``visq batch`` as processes see it; in `tests/end_to_end` with signals and a real stack."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from tests.api.running import PlayedWorker, RunningApi
from visq import Client
from visq.cli import batch_output, client_commands
from visq.cli.batch_progress import Pace
from visq.errors import InvalidRequest
from visq.objects import open_store, parse_uri
from visq.types import BatchView

Run = Callable[..., Result]


@pytest.fixture
def run(api: RunningApi, secret: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("VISQ_URL", api.url)
    monkeypatch.setenv("VISQ_API_KEY", secret)
    app = typer.Typer()
    client_commands.register(app)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["batch", *map(str, arguments)])

    return run


def jsonl(path: Path, *items: dict[str, Any]) -> Path:
    data = b"".join(json.dumps(item).encode() + b"\n" for item in items)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def items(count: int) -> list[dict[str, Any]]:
    return [{"custom_id": f"i{number}", "prompt": f"Item {number}"} for number in range(count)]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_file_is_run_and_its_results_written(
    run: Run, answering: None, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "out.jsonl"
    result = run("run", jsonl(tmp_path / name, *items(120)), "-o", output, "--lane", "standard")
    assert result.exit_code == 0, result.output
    assert [job["custom_id"] for job in written(output)] == [f"i{n}" for n in range(120)]
    assert {job["lane"] for job in written(output)} == {"standard"}
    assert result.stdout == ""


def test_a_parquet_file_is_run(run: Run, answering: None, tmp_path: Path) -> None:
    table = pyarrow.table({"custom_id": ["a", "b"], "prompt": ["First", "Second"]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    result = run("run", tmp_path / "in.parquet")
    assert result.stdout == "a\tYou asked: First\nb\tYou asked: Second\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("in.jsonl", b'{"prompt": "x"}\n[]\n', "line 2 is not an object"),
        ("in.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-9], "it was cut off"),
        ("in.jsonl", b"\xff\xfe\x00", "it is UTF-16"),
        ("in.parquet", b"PAR1", "cannot be read as Parquet"),
        ("in.jsonl", None, "cannot be read (No such file"),
    ],
)
def test_a_file_that_is_none_of_items_is_named(
    run: Run, client: Client, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run("run", tmp_path / name)
    assert result.exit_code == 1
    assert str(tmp_path / name) in result.stderr
    assert said in result.stderr
    assert list(client.batches.list()) == []
    assert "plain JSON lines" in run("run", "a.png", "-p", "x", "-o", "out.parquet").stderr


def test_lines_in_openais_form_are_run(run: Run, answering: None, tmp_path: Path) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Why?"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    result = run("run", jsonl(tmp_path / "in.jsonl", line), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["result"]["text"] == "You asked: Why?"


def test_images_of_a_file_are_found_where_it_is_said(
    run: Run, answering: None, client: Client, tmp_path: Path
) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    file = jsonl(tmp_path / "in.jsonl", {"prompt": "What?", "images": ["a.png"]})
    result = run("run", file, "--images", tmp_path, "--json")
    assert json.loads(result.stdout)["result"]["usage"]["images"] == 1
    result = run("run", file, "--images", "s3://pictures/", "--dry-run", "--json")
    told = json.loads(result.stdout)
    assert (told["items"], told["invalid_items"], told["images"]) == (1, 0, 1)
    assert run("run", "a.png", "--images", "b", "-p", "What?").exit_code == 1


def test_what_lies_in_the_store_is_run_by_name(
    run: Run, answering: None, api: RunningApi, tmp_path: Path
) -> None:
    store = open_store(api.settings)
    lines = b"".join(json.dumps(item).encode() + b"\n" for item in items(3))
    store.put(parse_uri("s3://cli/in.jsonl"), lines, "application/x-ndjson")
    store.put(parse_uri("s3://cli/photos/a.png"), b"any", "image/png")
    output = tmp_path / "out.jsonl"
    assert run("run", "s3://cli/in.jsonl", "-o", output).exit_code == 0
    assert [job["custom_id"] for job in written(output)] == ["i0", "i1", "i2"]
    result = run("run", "--images", "s3://cli/photos/", "-p", "What?", "-o", "s3://cli/out.jsonl")
    assert result.exit_code == 0, result.output
    with store.open(parse_uri("s3://cli/out.jsonl")) as file:
        [line] = [json.loads(line) for line in file]
    assert line["custom_id"] == "a.png"
    store.close()


def test_a_dry_run_says_what_it_would_be(run: Run, client: Client, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "in.jsonl", *items(2))
    result = run("run", file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "not known" in result.stdout
    assert json.loads(run("run", file, "--dry-run", "--json").stdout)["items"] == 2
    assert list(client.batches.list()) == []


def test_a_batch_is_gone_on_with_where_its_output_ends(
    run: Run, client: Client, answering: None, tmp_path: Path
) -> None:
    batch = client.batches.submit(items(5))
    output = tmp_path / "out.jsonl"
    whole = [job.model_dump_json() for job in batch.results()]
    cut = whole[2][:20]
    output.write_text("\n".join([*whole[:2], cut]))
    result = run("run", "--resume", batch.id, "-o", output)
    assert result.exit_code == 0, result.output
    assert output.read_text().splitlines() == whole
    assert run("run", "--resume", batch.id, "-o", tmp_path / "new.jsonl").exit_code == 0
    assert (tmp_path / "new.jsonl").read_text() == output.read_text()
    assert len(list(client.batches.list())) == 1


def test_the_output_of_something_else_is_not_gone_on_with(
    run: Run, client: Client, answering: None, tmp_path: Path
) -> None:
    batch = client.batches.submit(items(1))
    other = client.batches.submit(items(1))
    output = tmp_path / "out.jsonl"
    lines = [job.model_dump_json() + "\n" for job in other.results()]
    for content in ("".join(lines), "notes\n", "notes"):
        output.write_text(content)
        result = run("run", "--resume", batch.id, "-o", output)
        assert result.exit_code == 1
        assert "error (invalid_request)" in result.stderr
        assert output.read_text() == content
    with pytest.raises(InvalidRequest):
        batch_output.last_position(output, batch.id)


def test_a_batch_is_watched_until_its_end(run: Run, client: Client, worker: PlayedWorker) -> None:
    batch = client.batches.submit(items(2))
    first, second = (job.id for job in client.jobs.list(batch_id=batch.id))

    def play() -> None:
        worker.answer(first)
        worker.fail(worker.claim(second))

    playing = threading.Timer(0.2, play)
    playing.start()
    result = run("watch", batch.id)
    playing.join()
    assert result.exit_code == 3
    assert "completed: 1 of 2 succeeded, 1 failed" in " ".join(result.stdout.split())
    [last] = [json.loads(line) for line in run("watch", batch.id, "--json").stdout.splitlines()]
    assert last["counts"]["failed"] == 1


def test_batches_are_listed_shown_and_cancelled(run: Run, client: Client, answering: None) -> None:
    first = client.batches.submit(items(1))
    first.wait()
    second = client.batches.submit(items(1), expires_in=3600)
    listed = [json.loads(line)["id"] for line in run("list", "--json").stdout.splitlines()]
    assert listed == [second.id, first.id]
    assert first.id in run("list").stdout
    assert json.loads(run("show", first.id, "--json").stdout)["id"] == first.id
    assert "1 succeeded" in run("show", first.id).stdout
    assert first.id in run("cancel", first.id).stdout
    assert json.loads(run("cancel", first.id, "--json").stdout)["status"] == "completed"
    assert run("show", "bat_" + "0" * 32).exit_code == 1


def test_a_batch_that_cannot_be_read_says_why(run: Run, api: RunningApi) -> None:
    store = open_store(api.settings)
    store.put(parse_uri("s3://cli/binary.jsonl"), b"\x00\x01", "application/x-ndjson")
    store.close()
    result = run("run", "s3://cli/binary.jsonl")
    assert result.exit_code == 3
    assert "it is binary" in " ".join(result.stderr.split())


def test_without_a_command_it_is_run(run: Run, answering: None, tmp_path: Path) -> None:
    result = run(jsonl(tmp_path / "in.jsonl", *items(1)))
    assert result.stdout == "i0\tYou asked: Item 0\n"
    assert "Usage" in run("--help").output
    assert run().exit_code == 2


# --- pace ------------------------------------------------------------------------------------


def view_of(client: Client, finished: int, tokens: int, total: int = 100) -> BatchView:
    view = client.batches.submit(items(1)).view
    counts = view.counts.model_copy(update={"succeeded": finished, "total": total})
    usage = view.usage.model_copy(update={"output_tokens": tokens})
    return view.model_copy(update={"counts": counts, "usage": usage})


def test_pace_is_that_of_the_last_seconds(client: Client) -> None:
    pace = Pace()
    view = view_of(client, 0, 0)
    for second in range(100):
        speed = 1 if second < 50 else 2
        view.counts.succeeded += speed
        view.usage.output_tokens += 10 * speed
        pace.see(view, float(second))
    rate, tokens = pace.per_second()
    assert rate == pytest.approx(2)
    assert tokens == pytest.approx(20)


def test_pace_is_told_with_the_time_that_is_left(client: Client) -> None:
    pace = Pace()
    pace.see(view_of(client, 0, 0), 0.0)
    view = view_of(client, 10, 500)
    pace.see(view, 10.0)
    assert pace.describe(view) == "10/100  1.0 items/s  50 tokens/s  1:30 left  0 failed"
    reading = view.model_copy(update={"intake_done": False})
    assert pace.describe(reading).startswith("10/100+  ")
    assert "left" not in pace.describe(reading)
