"""``/readyz``: what it tells operators besides whether this process can serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
import redis

from migrations.run import upgrade
from models import jobs
from models.outcomes import Failed
from tests.api.conftest import settings_for
from tests.api.running import PlayedWorker, RunningApi
from tests.servers import Valkey
from tests.waiting import until
from visq import streams
from visq.errors import ImageFetchFailed
from visq.streams import (
    announce_failure,
    announce_worker,
    failed_workers,
    live_workers,
    withdraw_failures,
)


@pytest.fixture
def store(api: RunningApi) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(api.settings.redis) as client:
        yield client
        for host in ("gpu-1", "gpu-2"):
            withdraw_failures(client, host)


def test_a_model_that_does_not_load_is_told_and_jobs_are_still_accepted(
    client: httpx2.Client, store: redis.Redis
) -> None:
    announce_failure(store, "gpu-1", "/models/mine", "no such folder")
    body = until(
        lambda: found if (found := client.get("/readyz").json())["failed_workers"] else None,
        10,
        "the failure",
    )
    assert client.get("/readyz").status_code == 200
    assert body["status"] == "ready"
    [failure] = body["failed_workers"]
    assert (failure["host"], failure["model"]) == ("gpu-1", "/models/mine")
    assert failure["reason"] == "no such folder"
    withdraw_failures(store, "gpu-1")
    until(lambda: not client.get("/readyz").json()["failed_workers"], 10, "its end")


def test_a_worker_that_comes_up_withdraws_the_failures_of_its_own_host_only(
    store: redis.Redis,
) -> None:
    announce_failure(store, "gpu-1", "/models/a", "torn")
    announce_failure(store, "gpu-1", "/models/a", "torn again")  # its supervisor tried again
    announce_failure(store, "gpu-1", "/models/b", "gone")
    announce_failure(store, "gpu-2", "/models/a", "torn")
    assert [(each.name, each.reason) for each in failed_workers(store)] == [
        ("gpu-1:/models/a", "torn again"),
        ("gpu-1:/models/b", "gone"),
        ("gpu-2:/models/a", "torn"),
    ]
    withdraw_failures(store, "gpu-1")
    assert [each.name for each in failed_workers(store)] == ["gpu-2:/models/a"]


def test_a_failure_is_forgotten_after_some_minutes_and_its_reason_is_short(
    store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce_failure(store, "gpu-1", "m", "x" * 100_000)
    [failure] = failed_workers(store)
    assert len(failure.reason) < 2 * streams.LONGEST_REASON
    assert 0 < store.ttl(streams.failed_worker_key(failure.name)) <= streams.FAILURE_SECONDS
    monkeypatch.setattr(streams, "FAILURE_SECONDS", 1)
    announce_failure(store, "gpu-1", "m", "anew")
    until(lambda: not failed_workers(store), 10, "the failure to be outdated")
    assert not store.exists(streams.FAILED_WORKERS_KEY)


def test_an_engine_that_is_down_is_told(
    client: httpx2.Client, worker: PlayedWorker, store: redis.Redis
) -> None:
    worker.announce()
    info = next(each for each in live_workers(store) if each.id == "w1")
    announce_worker(store, info.model_copy(update={"engine_down": "killed"}), ttl_seconds=60)
    try:
        [down] = until(lambda: client.get("/readyz").json()["engines_down"], 10, "the engine")
        assert down == {"worker": "w1", "model": "small", "reason": "killed"}
    finally:
        worker.leave()


def test_a_redis_that_is_silent_is_named_before_a_probe_gives_up(
    sqlite_url: str, tmp_path: Path
) -> None:
    upgrade(sqlite_url)
    with Valkey(tmp_path / "valkey") as own:
        settings = settings_for(sqlite_url, own.url, tmp_path)
        with RunningApi(settings) as running, running.client("secret-0") as asking:
            assert asking.get("/readyz").status_code == 200
            process = psutil.Process(redis.Redis.from_url(own.url).info()["process_id"])
            process.suspend()
            try:
                answer = asking.get("/readyz", timeout=5)
            finally:
                process.resume()
    assert answer.status_code == 503
    assert answer.json()["dependencies"]["redis"] == "does not answer"
    assert answer.json()["workers"] is None


def test_dead_letters_are_counted_until_they_are_retried(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    before = client.get("/readyz").json()["dead_letters"]
    job = client.post("/v1/jobs", json={"prompt": "x"}).json()
    for _ in range(3):
        fails = Failed(ImageFetchFailed("the store is slow"), backoff_seconds=0.0)
        worker.database.run(jobs.finish, worker.claim(job["id"]), fails)
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "failed"
    assert client.get("/readyz").json()["dead_letters"] == before + 1
    client.post(f"/v1/jobs/{job['id']}/retry")
    assert client.get("/readyz").json()["dead_letters"] == before
