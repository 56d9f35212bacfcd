"""What the API does while a server that it needs is away, and when it stops itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.orm import Session

from api import services
from migrations.run import upgrade
from models import jobs
from models.connections import Limits
from models.database import AsyncDatabase, Database
from tests.api.conftest import settings_for
from tests.api.running import PlayedWorker, RunningApi, events_of
from tests.api.test_events import said
from tests.api.test_images import PNG
from tests.api.test_jobs import submit
from tests.faults.proxy import Proxy, url_through
from tests.servers import PostgreSQL, S3Endpoint, Valkey
from tests.waiting import until
from visq.embedded.processes import free_port


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that the test may kill."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def own_api(own_valkey: Valkey, sqlite_url: str, tmp_path: Path) -> Iterator[RunningApi]:
    upgrade(sqlite_url)
    with RunningApi(settings_for(sqlite_url, own_valkey.url, tmp_path)) as running:
        yield running


@pytest.fixture
def own_worker(own_api: RunningApi) -> Iterator[PlayedWorker]:
    played = PlayedWorker(own_api.settings)
    yield played
    played.close()


@pytest.fixture
def own_client(own_api: RunningApi) -> Iterator[httpx2.Client]:
    with own_api.client("secret-0") as made:
        yield made


# --- Redis and the broker ------------------------------------------------------------------------


def test_a_job_is_accepted_without_a_broker_and_published_when_it_is_back(
    own_client: httpx2.Client, own_worker: PlayedWorker, own_valkey: Valkey
) -> None:
    own_valkey.kill()
    job = submit(own_client)
    seen = own_client.get(f"/v1/jobs/{job['id']}").json()
    assert seen["waiting_for"]["reason"] == "lane"  # nobody knows whether a worker lives
    cancelled = submit(own_client)
    assert own_client.post(f"/v1/jobs/{cancelled['id']}/cancel").json()["status"] == "cancelled"
    own_valkey.start()
    until(lambda: own_worker.database.read(jobs.get, job["id"]).publishes, 60, "the job's message")
    until(
        lambda: own_worker.courier.redis.get(f"visq:job:{cancelled['id']}"), 60, "the result event"
    )


def test_a_long_poll_ends_without_redis(
    own_client: httpx2.Client, own_worker: PlayedWorker, own_valkey: Valkey
) -> None:
    job = submit(own_client)
    claim = own_worker.begin(job["id"])
    with ThreadPoolExecutor(1) as threads:
        poll = threads.submit(own_client.get, f"/v1/jobs/{job['id']}", params={"wait": 30})
        own_valkey.kill()
        own_worker.succeed(claim, publish=False)
        assert poll.result().json()["status"] == "succeeded"


def test_a_stream_ends_from_the_row_when_redis_dies_under_it(
    own_client: httpx2.Client, own_worker: PlayedWorker, own_valkey: Valkey
) -> None:
    job = submit(own_client)
    claim = own_worker.begin(job["id"])
    own_worker.say(claim, "Thr")
    with own_client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        before = [next(events), next(events)]
        own_valkey.kill()
        own_worker.succeed(claim, "Three.", publish=False)
        rest = list(events)
    assert rest[-1].event == "end"
    assert rest[-1].data["result"]["text"] == "Three."
    assert said([*before, *rest]) == "Three."
    with own_client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert said(list(events_of(response))) == "Three."


def test_notes_come_again_when_redis_is_back_without_its_data(
    own_client: httpx2.Client, own_worker: PlayedWorker, own_valkey: Valkey
) -> None:
    job = submit(own_client)
    claim = own_worker.begin(job["id"])
    with own_client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        before = [next(events)]
        own_valkey.restart(keep_data=False)
        channel = f"visq:notify:{job['id']}"
        until(
            lambda: own_worker.courier.redis.pubsub_numsub(channel)[0][1],
            30,
            "the subscription",
        )
        own_worker.say(claim, "Thr")
        before.append(next(events))
        own_worker.say(claim, "ee.")
        own_worker.succeed(claim, "Three.")
        rest = list(events)
    assert said([*before, *rest]) == "Three."


def test_without_redis_nobody_knows_the_models(
    own_client: httpx2.Client, own_worker: PlayedWorker, own_valkey: Valkey
) -> None:
    own_worker.announce("small", "w1")
    own_worker.announce("small", "w2")
    own_worker.announce("large", "w3")
    until(lambda: len(own_client.get("/v1/models").json()["data"]) == 2, 10, "the workers")
    assert [
        (model["id"], model["workers"]) for model in own_client.get("/v1/models").json()["data"]
    ] == [("large", 1), ("small", 2)]
    own_valkey.kill()
    response = until(
        lambda: response if (response := own_client.get("/v1/models")).is_error else None,
        10,
        "the outage to be seen",
    )
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "unavailable"
    assert int(response.headers["retry-after"]) > 0


def test_readiness_names_what_is_down(own_client: httpx2.Client, own_valkey: Valkey) -> None:
    ready = own_client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "dependencies": {
            "database": "ok", "broker": "ok", "redis": "ok", "object_store": "ok",
        },
        "workers": 0,
        "failed_workers": [],
        "engines_down": [],
        "dead_letters": 0,
    }  # fmt: skip
    own_valkey.kill()
    seen = own_client.get("/readyz")
    assert seen.status_code == 503
    down = {name for name, state in seen.json()["dependencies"].items() if state != "ok"}
    assert down == {"broker", "redis"}
    own_valkey.start()
    until(lambda: own_client.get("/readyz").status_code == 200, 30, "the API to be ready again")


# --- the other servers ---------------------------------------------------------------------------


def test_without_the_object_store_uploads_are_refused_and_jobs_are_not(
    own_valkey: Valkey, sqlite_url: str, tmp_path: Path
) -> None:
    upgrade(sqlite_url)
    nowhere = {
        "object_store": "s3",
        "s3_endpoint_url": f"http://127.0.0.1:{free_port()}",
        "s3_access_key_id": "x",
        "s3_secret_access_key": "x",
    }
    settings = settings_for(sqlite_url, own_valkey.url, tmp_path, **nowhere)
    with RunningApi(settings) as running, running.client("secret-0") as client:
        response = client.post("/v1/images", content=PNG, headers={"Content-Type": "image/png"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        assert submit(client, images=["s3://pictures/a.png"])["status"] == "queued"
        seen = client.get("/readyz").json()["dependencies"]
        assert seen["object_store"] != "ok"
        assert seen["database"] == "ok"


def test_an_upload_goes_to_s3(
    own_valkey: Valkey, sqlite_url: str, tmp_path: Path, s3: S3Endpoint, bucket: str
) -> None:
    upgrade(sqlite_url)
    values = {
        "object_store": "s3",
        "s3_endpoint_url": s3.url,
        "s3_region": s3.region,
        "s3_access_key_id": s3.access_key,
        "s3_secret_access_key": s3.secret_key,
        "upload_bucket": bucket,
    }
    settings = settings_for(sqlite_url, own_valkey.url, tmp_path, **values)
    with RunningApi(settings) as running, running.client("secret-0") as client:
        image = client.post("/v1/images", files={"file": ("a.png", PNG)}).json()
        assert client.get("/readyz").status_code == 200
    [_, _, _, key] = image["uri"].split("/", 3)
    found = s3.client().get_object(Bucket=bucket, Key=key)
    assert found["Body"].read() == PNG
    assert found["ContentType"] == "image/png"


def test_without_the_database_everything_is_unavailable_until_it_is_back(
    servers_dir: Path, own_valkey: Valkey, tmp_path: Path
) -> None:
    with PostgreSQL(servers_dir / "own-postgres") as postgres:
        url = postgres.create_database()
        upgrade(url)
        settings = settings_for(url, own_valkey.url, tmp_path)
        with RunningApi(settings) as running, running.client("secret-0") as client:
            job = submit(client)
            with (
                client.stream("GET", f"/v1/jobs/{job['id']}/events") as response,
                redis.Redis.from_url(own_valkey.url) as own_redis,
            ):
                channel = f"visq:notify:{job['id']}"
                until(lambda: own_redis.pubsub_numsub(channel)[0][1], 20, "the stream")
                postgres.kill()
                own_redis.publish(channel, "end")
                assert list(events_of(response)) == []  # no `end`, and no broken connection
            for response in (
                client.get(f"/v1/jobs/{job['id']}"),
                client.get(f"/v1/jobs/{job['id']}", params={"wait": 1}),
                client.get(f"/v1/jobs/{job['id']}/events"),
                client.post("/v1/jobs", json={"prompt": "x"}),
            ):
                is_unavailable(response)
            seen = client.get("/readyz")
            assert seen.status_code == 503
            assert seen.json()["dependencies"]["database"] != "ok"
            postgres.start()
            until(lambda: client.get("/readyz").status_code == 200, 30, "the API to recover")
            assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"


def is_unavailable(response: httpx2.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "unavailable"
    assert int(response.headers["retry-after"]) > 0


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits for the database, shorter; and few connections."""
    limits = Limits(pool=1.0, connect=2, statement=2.0, silence=3.0)
    for name, kind in (("AsyncDatabase", AsyncDatabase), ("Database", Database)):
        monkeypatch.setattr(services, name, partial(kind, limits=limits, pool_size=2))


@pytest.mark.usefixtures("short_limits")
def test_without_a_free_connection_to_the_database_requests_are_refused_in_time(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    upgrade(postgres_url)
    other = Database(postgres_url)
    settings = settings_for(postgres_url, redis_url, tmp_path)
    with RunningApi(settings) as running, running.client("secret-0") as client:
        path = f"/v1/jobs/{submit(client)['id']}"

        def ask_while_nobody_can_read(session: Session) -> list[httpx2.Response]:
            session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            with ThreadPoolExecutor(12) as threads:
                return list(threads.map(lambda _: client.get(path), range(12)))

        answers = other.run(ask_while_nobody_can_read)
        for answer in answers:
            is_unavailable(answer)
        told = {answer.json()["error"]["message"] for answer in answers}
        assert any("in use" in message for message in told), told
        assert client.get(path).json()["status"] == "queued"
    other.close()


@pytest.mark.usefixtures("short_limits")
def test_a_partition_from_the_database_holds_no_request_and_passes(
    postgres: PostgreSQL, postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    upgrade(postgres_url)
    with Proxy(postgres.port) as proxy:
        settings = settings_for(url_through(postgres_url, proxy.port), redis_url, tmp_path)
        with RunningApi(settings) as running, running.client("secret-0") as client:
            path = f"/v1/jobs/{submit(client)['id']}"

            def submit_with_key() -> httpx2.Response:
                key = {"Idempotency-Key": "across-the-partition"}
                return client.post("/v1/jobs", json={"prompt": "x"}, headers=key)

            proxy.stall()
            with ThreadPoolExecutor(3) as threads:
                asked = [
                    threads.submit(submit_with_key),
                    threads.submit(client.get, path),
                    threads.submit(client.get, "/readyz"),
                ]
                assert client.get("/healthz").status_code == 200
                for answer in asked[:2]:
                    is_unavailable(answer.result())
                assert asked[2].result().json()["dependencies"]["database"] != "ok"
            proxy.heal()
            until(lambda: client.get(path).is_success, 20, "the API to recover")
            made = submit_with_key()
            assert made.is_success
            assert submit_with_key().json()["id"] == made.json()["id"]
            assert len(client.get("/v1/jobs").json()["data"]) == 2


# --- stopping ------------------------------------------------------------------------------------


def test_a_stopping_api_lets_its_waiters_go(
    own_valkey: Valkey, sqlite_url: str, tmp_path: Path
) -> None:
    upgrade(sqlite_url)
    following = threading.Event()

    def follow(client: httpx2.Client, job_id: str) -> list[str]:
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as response:
            following.set()
            return [event.event for event in events_of(response)]

    with ThreadPoolExecutor(2) as threads:
        with RunningApi(settings_for(sqlite_url, own_valkey.url, tmp_path)) as running:
            client = running.client("secret-0")
            job = submit(client)
            poll = threads.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait": 60})
            stream = threads.submit(follow, client, job["id"])
            assert following.wait(20)
            with redis.Redis.from_url(own_valkey.url) as own_redis:
                channel = f"visq:notify:{job['id']}"
                until(lambda: own_redis.pubsub_numsub(channel)[0][1], 20, "both to be waiting")
        assert poll.result().json()["status"] == "queued"
        assert stream.result() == []  # no `end`: it has not ended, and can be followed elsewhere
        client.close()
