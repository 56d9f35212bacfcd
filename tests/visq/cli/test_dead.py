"""``visq dead`` on a real database, without an API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migrations import run as migrations
from models import dead_letters, reading
from tests.visq.cli.operators import Jobs, Run
from visq.cli import dead as command
from visq.errors import EngineError
from visq.types import JobStatus as S


@pytest.fixture(autouse=True)
def by_settings(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands find the database by their settings."""
    monkeypatch.setenv("VISQ_DATABASE_URL", database_url)
    monkeypatch.setenv("VISQ_DATA", str(tmp_path / "no-stack"))


def test_dead_letters_of_all_tenants_are_listed_oldest_first(jobs: Jobs, run: Run) -> None:
    other = jobs.database.run(reading.ensure_tenants, ["other"])["other"]
    jobs.submit()
    first = jobs.dead(session={})
    second = Jobs(jobs.database, other).dead("no answer")
    failed = jobs.submit()
    jobs.run_once(failed.id, EngineError("it cannot"))

    listed = [json.loads(line) for line in run("dead", "list", "--json").stdout.splitlines()]
    assert [(each["id"], each["tenant"], each["attempts"]) for each in listed] == [
        (first.id, "acme", 2),
        (second.id, "other", 2),
    ]
    assert listed[0]["session_id"] == first.session_id
    assert listed[1]["error_code"] == "image_fetch_failed"
    shown = run("dead", "list")
    assert shown.status == 0
    assert f"turn 1 of {first.session_id}" in shown.stdout
    assert "(image_fetch_failed) no answer" in shown.stdout
    assert failed.id not in shown.stdout


def test_a_long_list_is_read_in_pages_and_cut_with_a_word(
    jobs: Jobs, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PAGE", 2)
    made = [jobs.dead().id for _ in range(5)]
    # The same instant: then the id decides, and none is left out between two pages.
    jobs.sql("UPDATE jobs SET dead_at = (SELECT min(dead_at) FROM jobs)")
    listed = run("dead", "list", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in listed] == made
    assert "and 1 more" in run("dead", "list", "--limit", "4").stderr


def test_show_tells_the_request_without_its_long_texts_and_every_attempt(
    jobs: Jobs, run: Run
) -> None:
    job = jobs.dead(prompt="why? " * 2000, images=["s3://pictures/[a].png"])
    told = json.loads(run("dead", "show", job.id, "--json").stdout)
    assert told["id"] == job.id
    assert "(10000 characters)" in json.dumps(told["request"])
    assert len(json.dumps(told)) < 5000
    assert [event["to_status"] for event in told["history"]] == [
        "queued", "running", "queued", "running", "failed",
    ]  # fmt: skip
    shown = run("dead", "show", job.id)
    assert shown.status == 0
    assert "s3://pictures/[a].png" in shown.stdout.replace("\n", "")
    assert "the store is slow" in shown.stdout


def test_a_retried_dead_letter_is_due_for_publishing_with_all_its_attempts(
    jobs: Jobs, run: Run
) -> None:
    job, other = jobs.dead(), jobs.dead()
    assert run("dead", "retry", job.id).status == 0
    queued = jobs.job(job.id)
    assert (queued.status, queued.failures, queued.dead_at) == (S.QUEUED, 0, None)
    assert queued.publish_at is not None
    assert jobs.job(other.id).dead_at is not None


def test_all_are_retried_and_one_that_cannot_be_does_not_hold_up_the_others(
    jobs: Jobs, run: Run
) -> None:
    turn = jobs.dead(session={})
    jobs.submit(session_id=turn.session_id)
    later = jobs.dead()
    done = run("dead", "retry", "--all")
    assert done.status == 1
    assert "(not_retriable)" in done.stderr
    assert turn.id in done.stderr
    assert f"{later.id} queued again" in done.stdout
    assert jobs.database.read(dead_letters.ids) == [turn.id]
    assert run("dead", "drop").status == 2
    assert run("dead", "drop", "--all").status == 0
    assert "no dead letters" in run("dead", "retry", "--all").stdout


def test_a_dropped_dead_letter_stays_failed_and_can_still_be_retried_by_its_client(
    jobs: Jobs, run: Run
) -> None:
    job = jobs.dead()
    history = jobs.database.read(reading.job_events, job.id)
    assert run("dead", "drop", job.id).status == 0
    dropped = jobs.job(job.id)
    assert (dropped.status, dropped.error_code) == (S.FAILED, "image_fetch_failed")
    assert dropped.dead_at is None
    assert len(jobs.database.read(reading.job_events, job.id)) == len(history)
    assert "no dead letters" in run("dead", "list").stdout


@pytest.mark.parametrize("verb", ["show", "retry", "drop"])
def test_what_is_no_dead_letter_is_told_apart_from_what_is_not_there(
    jobs: Jobs, run: Run, verb: str
) -> None:
    unknown = run("dead", verb, "job_" + "0" * 32)
    assert unknown.status == 1
    assert unknown.stderr.startswith("error (not_found): there is no job ")
    failed = jobs.submit()
    jobs.run_once(failed.id, EngineError("it cannot"))
    for job in (jobs.submit(), failed):
        done = run("dead", verb, job.id)
        assert done.status == 1
        assert done.stderr.startswith(f"error (conflict): job {job.id} is no dead letter: it is ")
        assert jobs.job(job.id).status in (S.QUEUED, S.FAILED)


def test_as_json_each_job_has_its_own_answer(jobs: Jobs, run: Run) -> None:
    job = jobs.dead()
    done = run("dead", "retry", "job_unknown", job.id, job.id, "--json")
    assert done.status == 1
    first, second = [json.loads(line) for line in done.stdout.splitlines()]
    assert (first["id"], first["ok"], first["error"]["code"]) == ("job_unknown", False, "not_found")
    assert second == {"id": job.id, "ok": True, "error": None}


def test_retry_wants_either_ids_or_all(jobs: Jobs, run: Run) -> None:
    assert run("dead", "retry").status == 2
    assert run("dead", "retry", "job_x", "--all").status == 2


def test_a_database_that_is_not_there_is_not_made(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISQ_DATA", str(tmp_path))
    monkeypatch.delenv("VISQ_DATABASE_URL", raising=False)
    done = run("dead", "list")
    assert done.status == 2
    assert "--data" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_database_of_another_revision_is_refused(
    run: Run, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.upgrade(sqlite_url, "0002")
    monkeypatch.setenv("VISQ_DATABASE_URL", sqlite_url)
    done = run("dead", "list")
    assert done.status == 2
    assert "visq migrate" in done.stderr


def test_a_database_that_does_not_answer_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "postgresql+psycopg://nobody:hunter2@127.0.0.1:1/none?connect_timeout=2"
    monkeypatch.setenv("VISQ_DATABASE_URL", url)
    done = run("dead", "list")
    assert done.status == 1
    assert done.stderr.startswith("error (unavailable): ")
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr
