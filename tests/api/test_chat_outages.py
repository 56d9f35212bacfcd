"""Chats that wait while a server of visq is away."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migrations.run import upgrade
from tests.api.conftest import settings_for
from tests.api.running import PlayedWorker, RunningApi
from tests.api.test_chat import ASK, PATH, Stream, ask, only_job
from tests.servers import PostgreSQL, Valkey
from tests.waiting import until
from visq.streams import notify_channel

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that the test may kill."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


def test_a_stream_ends_from_the_row_when_redis_dies_under_it(
    own_valkey: Valkey, sqlite_url: str, tmp_path: Path
) -> None:
    upgrade(sqlite_url)
    settings = settings_for(sqlite_url, own_valkey.url, tmp_path)
    with (
        RunningApi(settings) as api,
        api.client("secret-0") as client,
        ThreadPoolExecutor(1) as threads,
    ):
        worker = PlayedWorker(settings)

        def begin() -> object:
            claim = worker.begin(only_job(client))
            worker.say(claim, "Thr")
            return claim

        begun = threads.submit(begin)
        with client.stream("POST", PATH, json=ASK | {"stream": True}) as response:
            stream = Stream(response)
            chunks = iter(stream)
            before = [next(chunks), next(chunks)]
            own_valkey.kill()
            worker.succeed(begun.result(), "Three.", publish=False)
            rest = list(chunks)
        worker.close()
    assert stream.text([*before, *rest]) == "Three."
    assert rest[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_outlives_an_outage_of_the_database(
    servers_dir: Path, own_valkey: Valkey, tmp_path: Path, stream: bool
) -> None:
    with PostgreSQL(servers_dir / f"postgres-of-chats-{stream}") as postgres:
        url = postgres.create_database()
        upgrade(url)
        settings = settings_for(url, own_valkey.url, tmp_path)
        with (
            RunningApi(settings) as api,
            api.client("secret-0") as client,
            ThreadPoolExecutor(1) as threads,
        ):
            worker = PlayedWorker(settings)
            asked = threads.submit(ask, client, stream=stream)
            job_id = only_job(client)
            channel = notify_channel(job_id)
            until(lambda: worker.courier.redis.pubsub_numsub(channel)[0][1], 20, "the chat to wait")
            postgres.kill()
            worker.courier.redis.publish(channel, "end")  # the API looks, and finds no database
            until(lambda: client.get("/readyz").status_code == 503, 30, "the outage")
            postgres.start()
            until(lambda: client.get("/readyz").status_code == 200, 30, "the API to recover")
            assert not asked.done()
            worker.answer(job_id, "Three.")
            response = asked.result(30)
            worker.close()
    assert response.status_code == 200
    assert "Three." in response.text
