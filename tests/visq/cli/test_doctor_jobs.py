"""``visq doctor`` about jobs: what cannot be late, or cannot be at all, is found if it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.visq.cli.operators import Jobs, announce, found, settings_for, wrong
from visq.settings import Settings


@pytest.fixture
def settings(migrated_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Of a system with a worker."""
    announce(redis_url)
    return settings_for(migrated_url, redis_url, tmp_path)


def test_a_lease_that_ran_out_long_ago_means_that_no_maintenance_loop_runs(
    settings: Settings, jobs: Jobs
) -> None:
    job = jobs.submit()
    jobs.run_once(job.id, None)
    jobs.sql("UPDATE jobs SET lease_expires_at = AGO")
    looked_at = wrong(settings)
    assert looked_at.keys() == {"leases"}
    assert looked_at["leases"].level == "problem"
    assert job.id in looked_at["leases"].message
    assert "5 min" in looked_at["leases"].message
    assert "maintenance loop" in looked_at["leases"].advice


def test_a_queued_job_that_nobody_publishes_is_a_problem(settings: Settings, jobs: Jobs) -> None:
    job = jobs.submit()
    jobs.sql("UPDATE jobs SET publish_at = AGO")
    looked_at = wrong(settings)
    assert looked_at.keys() == {"queue"}
    assert job.id in looked_at["queue"].message
    assert "published" in looked_at["queue"].message


def test_a_deadline_that_nobody_keeps_is_a_problem(settings: Settings, jobs: Jobs) -> None:
    job = jobs.submit(expires_in=600)
    jobs.sql("UPDATE jobs SET expires_at = AGO")
    looked_at = wrong(settings)
    assert looked_at.keys() == {"deadlines"}
    assert job.id in looked_at["deadlines"].message


@pytest.mark.parametrize(("busy", "level"), [(0, "problem"), (2, "problem"), (3, "ok"), (4, "ok")])
def test_jobs_that_wait_for_minutes_are_stuck_only_if_workers_have_room(
    settings: Settings, jobs: Jobs, busy: int, level: str
) -> None:
    announce(settings.redis, in_flight=busy)
    job = jobs.submit()
    jobs.sql("UPDATE job_events SET at = AGO")
    looked_at = found(settings)
    assert looked_at["queue"].level == level
    assert "for 5 min" in looked_at["queue"].message
    if level == "problem":
        assert job.id in looked_at["queue"].message


def test_jobs_that_need_not_run_yet_do_not_count_as_waiting(settings: Settings, jobs: Jobs) -> None:
    in_back_off, held_by_batch = jobs.submit(), jobs.submit()
    jobs.sql("UPDATE job_events SET at = AGO")
    jobs.sql(
        "UPDATE jobs SET run_after = :later, publish_at = :later WHERE id = :id",
        later="2999-01-01 00:00:00.000000",
        id=in_back_off.id,
    )
    jobs.sql("UPDATE jobs SET publish_at = NULL WHERE id = :id", id=held_by_batch.id)
    assert found(settings)["queue"].message == "no job waits for a worker"


def test_a_turn_that_waits_behind_an_ended_one_is_a_defect(settings: Settings, jobs: Jobs) -> None:
    first = jobs.submit(session={})
    second = jobs.submit(session_id=first.session_id)
    third = jobs.submit(session_id=first.session_id)
    assert not wrong(settings)
    jobs.sql("UPDATE jobs SET status = 'failed' WHERE id = :id", id=first.id)
    looked_at = wrong(settings)
    assert looked_at.keys() == {"turns"}
    assert second.id in looked_at["turns"].message
    assert third.id not in looked_at["turns"].message


def test_result_events_that_are_not_delivered_are_a_problem_that_says_who_is_to_blame(
    settings: Settings, jobs: Jobs
) -> None:
    jobs.dead()
    assert "results" not in wrong(settings)  # it has only just ended
    jobs.sql("UPDATE outbox SET created_at = AGO, available_at = AGO")
    assert "maintenance loop" in wrong(settings)["results"].advice
    jobs.sql("UPDATE outbox SET tries = 7")
    assert "7 times" in wrong(settings)["results"].advice


def test_dead_letters_are_a_warning_with_their_reasons(settings: Settings, jobs: Jobs) -> None:
    jobs.dead()
    jobs.dead()
    warning = wrong(settings)["dead jobs"]
    assert warning.level == "warning"
    assert "2 image_fetch_failed" in warning.message
    assert "visq dead" in warning.advice
