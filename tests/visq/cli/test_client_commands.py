"""The client's commands as processes see them: arguments, pipes, output, exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from tests.api.running import PlayedWorker, RunningApi
from visq import Client
from visq.cli import client_commands

Run = Callable[..., Result]


@pytest.fixture
def run(api: RunningApi, secret: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("VISQ_URL", api.url)
    monkeypatch.setenv("VISQ_API_KEY", secret)
    app = typer.Typer()
    client_commands.register(app)

    def run(*arguments: str | Path, stdin: str = "") -> Result:
        return CliRunner().invoke(app, [str(part) for part in arguments], input=stdin)

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (2, 2), "red").save(path)
    return path


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_submit_prints_the_answer_and_nothing_else(
    run: Run, answering: None, picture: Path
) -> None:
    for stream in ("--stream", "--no-stream"):
        result = run("submit", "How many?", "-i", picture, stream)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == "You asked: How many?"
        assert "job_" in result.stderr


def test_submit_reads_the_prompt_from_a_pipe(run: Run, answering: None) -> None:
    assert run("submit", "-", stdin="From a pipe").stdout.strip() == "You asked: From a pipe"


def test_submit_as_json_prints_the_job(run: Run, answering: None) -> None:
    [job] = lines(run("submit", "How many?", "--session", "new", "--json"))
    assert job["result"]["text"] == "You asked: How many?"
    [again] = lines(run("submit", "And now?", "--session", job["session_id"], "--json"))
    assert again["turn"] == 2


def test_submit_without_waiting_prints_the_id(run: Run) -> None:
    result = run("submit", "How many?", "--no-wait")
    assert result.stdout.strip().startswith("job_")


def test_a_wait_that_takes_too_long_has_its_own_status(run: Run) -> None:
    result = run("submit", "How many?", "--timeout", "0.1")
    assert result.exit_code == 4
    assert "error (timeout)" in result.stderr


def test_a_job_without_an_answer_has_its_own_status(
    run: Run, client: Client, worker: PlayedWorker
) -> None:
    job = client.jobs.submit("How many?", idempotency_key="one")
    worker.fail(worker.claim(job.id))
    result = run("show", job.id)
    assert "(engine_error)" in result.stdout
    result = run("retry", job.id)
    assert "queued" in result.stdout
    result = run("cancel", job.id, "--json")
    assert lines(result)[0]["status"] == "cancelled"


def test_errors_are_one_line_with_their_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("show", "job_" + "0" * 32)
    assert result.exit_code == 1
    assert result.stderr.startswith("error (not_found): ")
    assert result.stderr.count("\n") == 1
    result = run("submit", "What is it?", "--image", "nowhere.png")
    assert result.exit_code == 1
    assert result.stderr.startswith("error (image_not_found): ")
    monkeypatch.delenv("VISQ_URL")
    monkeypatch.setenv("VISQ_DATA", "/nonexistent")
    result = run("jobs")
    assert result.exit_code == 2
    assert result.stderr.startswith("error (configuration_error): ")


def test_jobs_are_listed_newest_first(run: Run, client: Client) -> None:
    ids = [client.jobs.submit(f"Number {number}").id for number in range(3)]
    client.jobs.cancel(ids[0])
    assert [job["id"] for job in lines(run("jobs", "--json", "--limit", "2"))] == ids[:0:-1]
    assert [job["id"] for job in lines(run("jobs", "--json", "--status", "cancelled"))] == ids[:1]
    assert "cancelled" in run("jobs").stdout


def test_show_tells_a_jobs_life(run: Run, answering: None, client: Client) -> None:
    job = client.jobs.submit("How many?", metadata={"order": "7"})
    job.wait()
    told = json.loads(run("show", job.id, "--json").stdout)
    assert told["job"]["id"] == job.id
    assert [event["to_status"] for event in told["history"]] == ["queued", "running", "succeeded"]
    shown = run("show", job.id).stdout
    assert "You asked: How many?" in shown
    assert "echo" in shown  # the worker


def test_chat_keeps_the_session_over_lines_of_a_pipe(
    run: Run, answering: None, picture: Path
) -> None:
    script = f"/help\n/image {picture}\nWhat is it?\n\nAnd now?\n/new\nAnew\n/quit\nnot reached\n"
    result = run("chat", "--json", stdin=script)
    assert result.exit_code == 0, result.output
    turns = lines(result)
    assert [turn["turn"] for turn in turns] == [1, 2, 1]
    assert [turn["result"]["usage"]["images"] for turn in turns] == [1, 0, 0]
    assert turns[0]["session_id"] == turns[1]["session_id"] != turns[2]["session_id"]


def test_chat_shows_answers_as_text(run: Run, answering: None) -> None:
    result = run("chat", stdin="One\nTwo\n")
    assert [line.strip() for line in result.stdout.splitlines()] == [
        "You asked: One",
        "You asked: Two",
    ]


def test_chat_says_what_it_does_not_understand(run: Run, answering: None) -> None:
    result = run("chat", stdin="/image nowhere.png\n/dance\nOne\n")
    assert result.exit_code == 3
    assert "there is no file 'nowhere.png'" in result.stderr
    assert "there is no command /dance" in result.stderr
    assert result.stdout.strip() == "You asked: One"


def test_a_batch_of_images_with_one_prompt(run: Run, answering: None, picture: Path) -> None:
    result = run("batch", picture, picture, "--prompt", "What is it?")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["0\tYou asked: What is it?", "1\tYou asked: What is it?"]


def test_a_batch_from_a_file_is_written_in_order(run: Run, answering: None, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"custom_id": "b", "prompt": "First"}\n\n{"custom_id": "a"}\n')
    written = tmp_path / "results.jsonl"
    result = run("batch", items, "--prompt", "Default", "-o", written)
    assert result.exit_code == 0, result.output
    results = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(job["custom_id"], job["result"]["text"]) for job in results] == [
        ("b", "You asked: First"),
        ("a", "You asked: Default"),
    ]


def test_a_broken_line_of_a_batch_is_named(run: Run, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "First"}\n{"prompt": \n')
    result = run("batch", items)
    assert result.exit_code == 1
    assert "items.jsonl, line 2 is not JSON" in result.stderr
    assert run("batch", "a.png").stderr.startswith("error (invalid_request): say what to ask")


def test_a_batch_that_did_not_succeed_has_its_own_status(
    run: Run, client: Client, answering: None, tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "First"}\n')
    batch_id = run("batch", items, "--no-wait").stdout.strip()
    assert client.batches.get(batch_id).wait(timeout=30).counts.succeeded == 1
