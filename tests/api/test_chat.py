"""``/v1/chat/completions`` over real sockets, with a worker that the test plays."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.api.conftest import settings_for
from tests.api.running import PlayedWorker, RunningApi
from tests.waiting import until
from visq.streams import notify_channel

ASK: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "How many?"}]}
PATH = "/v1/chat/completions"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def later() -> Iterator[Callable[..., Future[Any]]]:
    """Does something in another thread."""
    with ThreadPoolExecutor(4) as executor:
        yield executor.submit


def ask(client: httpx2.Client, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return client.post(PATH, json=ASK | fields, headers=headers)


def only_job(client: httpx2.Client) -> str:
    """The id of the one job of this tenant, when it is there."""
    [job] = until(lambda: client.get("/v1/jobs").json()["data"], 10, "the job")
    return str(job["id"])


def status_of(client: httpx2.Client, job_id: str) -> str:
    return str(client.get(f"/v1/jobs/{job_id}").json()["status"])


class Stream:
    """A streamed answer, read chunk by chunk."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Any]:
        for line in self._lines:
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)

    def text(self, chunks: list[Any], index: int = 0) -> str:
        said = [choice for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"]]
        return "".join(c["delta"].get("content") or "" for c in said if c["index"] == index)


def test_a_chat_waits_for_its_job_and_tells_the_answer(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    asked = later(ask, client)
    job_id = only_job(client)
    assert not asked.done()
    worker.answer(job_id, "Three.")
    response = asked.result(20)
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == job_id
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Three.",
        "refusal": None,
    }
    assert client.get(f"/v1/jobs/{job_id}").json()["lane"] == "interactive"


def test_a_stream_tells_what_is_said_as_it_is_said(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    claimed = later(lambda: worker.begin(only_job(client)))
    more = {"stream": True, "stream_options": {"include_usage": True}}
    said = later(lambda: worker.say(claimed.result(), "Thr"))
    with client.stream("POST", PATH, json=ASK | more) as response:
        said.result(20)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"] == claimed.result().job_id
        stream = Stream(response)
        chunks = iter(stream)
        role = next(chunks)
        assert role["choices"][0]["delta"]["role"] == "assistant"
        first = next(chunks)
        assert first["choices"][0]["delta"] == {"content": "Thr"}
        assert first["usage"] is None
        worker.say(claimed.result(), "ee.")
        worker.succeed(claimed.result(), "Three.")
        *rest, done = chunks
    assert stream.text([first, *rest]) == "Three."
    assert rest[-2]["choices"][0]["finish_reason"] == "stop"
    assert rest[-1]["choices"] == []
    assert rest[-1]["usage"]["total_tokens"] == 9
    assert done == "[DONE]"


def test_several_choices_are_told_by_their_index(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    def answer() -> None:
        claim = worker.begin(only_job(client))
        worker.say(claim, "Four", index=1)
        worker.say(claim, "Three", index=0)
        worker.succeed(claim, "Three.", "Four.")

    working = later(answer)
    with client.stream("POST", PATH, json=ASK | {"stream": True, "n": 2}) as response:
        stream = Stream(response)
        chunks = list(stream)
    working.result(20)
    assert [stream.text(chunks, index) for index in (0, 1)] == ["Three.", "Four."]
    ends = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["finish_reason"]]
    assert [end["index"] for end in ends] == [0, 1]


# --- a worker that dies ---------------------------------------------------------------------------


def two_attempts(client: httpx2.Client, worker: PlayedWorker, first: str, second: str) -> None:
    """The worker says `first` and dies; the next attempt answers `second`."""
    job_id = only_job(client)
    claim = worker.begin(job_id)
    worker.say(claim, first)
    worker.hand_back(claim)
    again = worker.begin(job_id)
    worker.say(again, second[:4])
    worker.succeed(again, second)


def test_another_attempt_that_says_the_same_goes_on_with_the_stream(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    working = later(two_attempts, client, worker, "Three ci", "Three circles.")
    with client.stream("POST", PATH, json=ASK | {"stream": True}) as response:
        stream = Stream(response)
        chunks = list(stream)
    working.result(20)
    assert stream.text(chunks) == "Three circles."
    assert chunks[-1] == "[DONE]"


def test_another_attempt_that_says_otherwise_ends_the_stream_with_an_error(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    working = later(two_attempts, client, worker, "Three ci", "Four circles.")
    with client.stream("POST", PATH, json=ASK | {"stream": True}) as response:
        chunks = list(Stream(response))
    working.result(20)
    assert chunks[-1]["error"]["code"] == "engine_crashed"
    assert chunks[-1]["error"]["type"] == "server_error"


def test_a_job_that_samples_has_a_seed_so_that_another_attempt_says_the_same(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    asked = later(ask, client)
    claim = worker.claim(only_job(client))
    assert worker.claimed.prompt.gen_config.do_sample
    assert worker.claimed.prompt.gen_config.random_seed is not None
    worker.succeed(claim)
    assert asked.result(20).status_code == 200


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_fails_before_it_says_anything_is_an_http_error(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]], stream: bool
) -> None:
    asked = later(ask, client, stream=stream)
    job_id = only_job(client)
    worker.fail(worker.begin(job_id))
    response = asked.result(20)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "it cannot",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert response.headers["x-should-retry"] == "false", "visq has tried it often enough"
    assert response.headers["x-request-id"] == job_id


def test_a_job_that_fails_later_is_an_error_in_the_stream(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    def half() -> None:
        claim = worker.begin(only_job(client))
        worker.say(claim, "Thr")
        worker.fail(claim)

    working = later(half)
    with client.stream("POST", PATH, json=ASK | {"stream": True}) as response:
        assert response.status_code == 200
        chunks = list(Stream(response))
    working.result(20)
    assert chunks[-1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_is_cancelled_or_expires_is_an_error(
    client: httpx2.Client, later: Callable[..., Future[Any]], stream: bool
) -> None:
    expired = ask(client, stream=stream, expires_in=0.01)
    assert (expired.status_code, expired.json()["error"]["code"]) == (504, "job_expired")
    asked = later(ask, client, stream=stream)
    [job] = until(
        lambda: client.get("/v1/jobs", params={"status": "queued"}).json()["data"], 10, "the job"
    )
    client.post(f"/v1/jobs/{job['id']}/cancel")
    cancelled = asked.result(20)
    assert (cancelled.status_code, cancelled.json()["error"]["code"]) == (499, "job_cancelled")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"temperature": 3}, 400, "invalid_request", "temperature"),
        ({"temprature": 1}, 400, "invalid_request", "temprature"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"messages": []}, 400, "invalid_request", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            400,
            "invalid_request",
            "messages.0.content.0.image_url.url",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": "data:image/png;base64,AA"}],
                    }
                ]
            },
            400,
            "image_undecodable",
            "messages.0.content.0.image_url.url",
        ),
        ({"session_id": f"ses_{'0' * 32}"}, 404, "not_found", "session_id"),
    ],
)
def test_a_wrong_request_is_told_as_openai_tells_it(
    client: httpx2.Client, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    response = ask(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"


def test_a_model_that_no_worker_serves_is_not_found(
    api: RunningApi, client: httpx2.Client, worker: PlayedWorker
) -> None:
    # A fresh API: the other one looks at the workers every two seconds only.
    worker.announce("small")
    settings = settings_for(api.settings.database, api.settings.redis, api.settings.data)
    with RunningApi(settings) as other:
        url, headers = other.url, client.headers
        response = httpx2.post(url + PATH, json=ASK | {"model": "gpt-4"}, headers=headers)
        found = httpx2.get(f"{url}/v1/models/small", headers=headers)
        missing = httpx2.get(f"{url}/v1/models/some/other", headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert "small" in error["message"]
    assert found.json()["owned_by"] == "visq"
    assert found.json()["created"] > 1_700_000_000
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert "some/other" in missing.json()["error"]["message"]


def test_without_a_worker_a_chat_waits_for_one(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    asked = later(ask, client, model="of-a-worker-that-is-to-come")
    worker.answer(only_job(client))
    assert asked.result(20).status_code == 200


# --- idempotency ----------------------------------------------------------------------------------


def test_a_repeat_with_the_same_key_has_the_same_answer(
    client: httpx2.Client, worker: PlayedWorker, later: Callable[..., Future[Any]]
) -> None:
    key = {"Idempotency-Key": "chat-1"}
    asked = later(ask, client, key)
    worker.answer(only_job(client))
    first, second = asked.result(20), ask(client, key)
    assert first.json() == second.json()
    assert len(client.get("/v1/jobs").json()["data"]) == 1
    other = ask(client, key, temperature=0)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"


# --- clients that hang up -------------------------------------------------------------------------


class Caller:
    """A client on a bare socket, which can leave at any moment."""

    def __init__(self, api: RunningApi, secret: str, key: str | None = None, **fields: Any) -> None:
        host, port = api.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        body = json.dumps(ASK | fields).encode()
        lines = [
            f"POST {PATH} HTTP/1.1",
            f"Host: {host}",
            f"Authorization: Bearer {secret}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *([] if key is None else [f"Idempotency-Key: {key}"]),
        ]
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def read_until(self, text: bytes) -> None:
        got = b""
        while text not in got:
            piece = self.socket.recv(65536)
            assert piece, f"the connection ended with {got!r}"
            got += piece

    def hang_up(self) -> None:
        self.socket.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_its_job_waits_cancels_it(
    api: RunningApi, client: httpx2.Client, secret: str, stream: bool
) -> None:
    caller = Caller(api, secret, stream=stream)
    job_id = only_job(client)
    caller.hang_up()
    until(lambda: status_of(client, job_id) == "cancelled", 10, "the cancel")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_its_job_runs_stops_it(
    api: RunningApi, client: httpx2.Client, worker: PlayedWorker, secret: str, stream: bool
) -> None:
    caller = Caller(api, secret, stream=stream)
    job_id = only_job(client)
    told: list[str] = []
    heard = threading.Thread(target=_listen, args=(worker, job_id, told))
    heard.start()
    claim = worker.begin(job_id)
    worker.say(claim, "Thr")
    if stream:
        caller.read_until(b'"content":"Thr"')
    caller.hang_up()
    heard.join(20)
    assert told == [job_id], "the worker is told to stop"
    worker.stop(claim)
    assert status_of(client, job_id) == "cancelled"


def _listen(worker: PlayedWorker, job_id: str, told: list[str]) -> None:
    """Hear as a worker does which job is to stop."""
    with worker.courier.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("visq:cancel")
        for note in pubsub.listen():
            if job_id in note["data"].decode():
                told.append(job_id)
                return


@pytest.mark.parametrize("stream", [False, True])
def test_with_a_key_the_job_goes_on_and_the_client_can_come_back(
    api: RunningApi,
    client: httpx2.Client,
    worker: PlayedWorker,
    secret: str,
    stream: bool,
    later: Callable[..., Future[Any]],
) -> None:
    def waiting() -> int:
        [(_, count)] = worker.courier.redis.pubsub_numsub(notify_channel(job_id))
        return int(count)

    caller = Caller(api, secret, "k", stream=stream)
    job_id = only_job(client)
    until(lambda: waiting() == 1, 10, "the API to wait for the job")
    caller.hang_up()
    until(lambda: waiting() == 0, 10, "the API to notice that the client has left")
    again = later(ask, client, {"Idempotency-Key": "k"}, stream=stream)
    until(lambda: waiting() == 1, 10, "the API to wait for the job again")
    assert status_of(client, job_id) == "queued"
    worker.answer(job_id, "Three.")
    assert "Three." in again.result(20).text


def test_a_client_that_has_its_answer_cancels_nothing(
    api: RunningApi, client: httpx2.Client, worker: PlayedWorker, secret: str
) -> None:
    caller = Caller(api, secret, stream=True)
    job_id = only_job(client)
    worker.answer(job_id)
    caller.read_until(b"[DONE]")
    caller.hang_up()
    assert status_of(client, job_id) == "succeeded"
    history = client.get(f"/v1/jobs/{job_id}/history").json()["data"]
    assert history[-1]["to_status"] == "succeeded"


def test_a_silent_stream_begins_and_is_kept_alive(
    api: RunningApi,
    client: httpx2.Client,
    secret: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.events.KEEP_ALIVE_SECONDS", 0.05)
    caller = Caller(api, secret, stream=True)
    job_id = only_job(client)
    caller.read_until(b": keep-alive")
    caller.hang_up()
    until(lambda: status_of(client, job_id) == "cancelled", 10, "the cancel")


@pytest.mark.parametrize("stream", [False, True])
def test_an_api_that_stops_says_so_and_cancels_the_job(
    api: RunningApi, client: httpx2.Client, later: Callable[..., Future[Any]], stream: bool
) -> None:
    settings = settings_for(api.settings.database, api.settings.redis, api.settings.data)
    with RunningApi(settings) as other:
        asked = later(
            httpx2.post,
            other.url + PATH,
            json=ASK | {"stream": stream},
            headers=client.headers,
            timeout=30,
        )
        job_id = only_job(client)
    response = asked.result(20)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert int(response.headers["retry-after-ms"]) > 0
    assert status_of(client, job_id) == "cancelled"
