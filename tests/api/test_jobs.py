"""``/v1/jobs``: what a caller can see and do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx2
import pytest

from models import jobs
from tests.api.running import PlayedWorker
from tests.waiting import until
from visq.types import Lane

ASK = {"prompt": "How many circles?", "images": ["s3://pictures/a.png"]}


def submit(client: httpx2.Client, **body: object) -> dict:
    response = client.post("/v1/jobs", json={"prompt": "How many circles?", **body})
    assert response.status_code == 202, response.text
    return response.json()


def test_a_submitted_job_is_accepted_and_can_be_looked_at(client: httpx2.Client) -> None:
    response = client.post("/v1/jobs", json=ASK | {"metadata": {"a": "b"}, "lane": "standard"})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["kind"] == "chat"
    assert job["lane"] == "standard"
    assert job["metadata"] == {"a": "b"}
    assert datetime.fromisoformat(job["created_at"]).utcoffset() is not None
    seen = client.get(response.headers["location"]).json()
    assert seen | {"waiting_for": None} == job


def test_as_many_images_as_a_message_has_room_for_are_taken(client: httpx2.Client) -> None:
    images = [f"s3://pictures/{number}.png" for number in range(256)]
    assert client.post("/v1/jobs", json=ASK | {"images": images[:255]}).status_code == 202
    response = client.post("/v1/jobs", json=ASK | {"images": images})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "images"


def test_logits_are_refused_at_the_submission(client: httpx2.Client) -> None:
    response = client.post("/v1/jobs", json=ASK | {"gen_config": {"output_logits": "all"}})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "gen_config.output_logits")
    assert client.get("/v1/jobs").json()["data"] == []


def test_an_unknown_job_is_not_found(client: httpx2.Client) -> None:
    response = client.get(f"/v1/jobs/job_{'0' * 32}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_an_id_that_is_none_is_an_invalid_request(client: httpx2.Client) -> None:
    response = client.get("/v1/jobs/nonsense")
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "job_id"


def test_the_answer_is_in_the_job(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.answer(job["id"], "Three.")
    seen = client.get(f"/v1/jobs/{job['id']}").json()
    assert seen["status"] == "succeeded"
    assert seen["result"]["text"] == "Three."
    assert seen["result"]["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "images": 0,
        "cached_tokens": 0,
    }
    assert seen["waiting_for"] is None


def test_a_failure_is_in_the_job(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.fail(worker.begin(job["id"]))
    seen = client.get(f"/v1/jobs/{job['id']}").json()
    assert seen["status"] == "failed"
    assert seen["error"] == {
        "code": "engine_error",
        "message": "it cannot",
        "param": None,
        "type": "server_error",
    }


# --- waiting -----------------------------------------------------------------------------------


def test_a_submission_can_wait_for_the_answer(client: httpx2.Client, worker: PlayedWorker) -> None:
    def work() -> None:
        [job] = until(lambda: client.get("/v1/jobs").json()["data"], 20, "the job")
        worker.answer(job["id"])

    thread = threading.Thread(target=work)
    thread.start()
    response = client.post("/v1/jobs", json=ASK, headers={"Prefer": "respond-async, wait=30"})
    thread.join()
    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=30"
    assert response.json()["result"]["text"] == "Three."


def test_a_submission_that_waited_in_vain_is_accepted_as_ever(client: httpx2.Client) -> None:
    response = client.post("/v1/jobs", json=ASK, headers={"Prefer": "wait=0"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "wait=0"
    assert response.json()["status"] == "queued"


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=-1", "return=minimal", "await=3", ""])
def test_a_preference_that_is_not_understood_is_ignored(client: httpx2.Client, prefer: str) -> None:
    response = client.post("/v1/jobs", json=ASK, headers={"Prefer": prefer})
    assert response.status_code == 202
    assert "preference-applied" not in response.headers


def test_a_long_poll_answers_when_the_job_ends(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    with ThreadPoolExecutor(2) as threads:
        polls = [
            threads.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait": 30})
            for _ in range(2)
        ]
        worker.say(claim, "Three")
        worker.succeed(claim)
        for poll in polls:
            assert poll.result().json()["status"] == "succeeded"


def test_a_long_poll_sees_an_end_of_which_no_note_came(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    with ThreadPoolExecutor(1) as threads:
        poll = threads.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait": 30})
        worker.succeed(claim, publish=False)
        assert poll.result().json()["status"] == "succeeded"


def test_a_long_poll_ends_with_the_job_as_it_is(client: httpx2.Client) -> None:
    job = submit(client)
    seen = client.get(f"/v1/jobs/{job['id']}", params={"wait": 0.1}).json()
    assert seen["status"] == "queued"


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon"])
def test_a_wait_out_of_range_is_refused(client: httpx2.Client, wait: str) -> None:
    response = client.get(f"/v1/jobs/job_{'0' * 32}", params={"wait": wait})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "wait"


def test_a_retried_job_is_waited_for_until_its_second_end(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    worker.fail(worker.begin(job["id"]))
    client.post(f"/v1/jobs/{job['id']}/retry")
    with ThreadPoolExecutor(1) as threads:
        poll = threads.submit(client.get, f"/v1/jobs/{job['id']}", params={"wait": 30})
        worker.answer(job["id"], "Four.")
        assert poll.result().json()["result"]["text"] == "Four."


# --- why a job waits ---------------------------------------------------------------------------


def test_a_job_says_that_there_is_no_worker(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.leave()
    until(
        lambda: client.get(f"/v1/jobs/{job['id']}").json()["waiting_for"]["reason"] == "worker",
        10,
        "the job to say so",
    )


def test_a_job_says_its_place_in_the_lane(client: httpx2.Client, worker: PlayedWorker) -> None:
    worker.announce()
    first, second = submit(client, lane="standard"), submit(client, lane="standard")

    def place(job: dict) -> int | None:
        return client.get(f"/v1/jobs/{job['id']}").json()["waiting_for"]["position"]

    until(lambda: place(first) is not None, 10, "the worker to be seen")
    assert place(second) - place(first) == 1  # others' jobs are before both
    claim = worker.claim(first["id"])
    assert client.get(f"/v1/jobs/{first['id']}").json()["waiting_for"] is None
    worker.succeed(claim)


def test_a_turn_says_which_turn_it_waits_for(client: httpx2.Client) -> None:
    first = submit(client, session={})
    second = submit(client, session_id=first["session_id"])
    assert second["status"] == "waiting"
    seen = client.get(f"/v1/jobs/{second['id']}").json()
    assert seen["waiting_for"]["reason"] == "turn"
    assert seen["waiting_for"]["job_id"] == first["id"]


def test_a_job_says_when_it_is_tried_again(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.fail(worker.begin(job["id"]), retryable=True)
    waiting_for = client.get(f"/v1/jobs/{job['id']}").json()["waiting_for"]
    assert waiting_for["reason"] == "retry"
    assert datetime.fromisoformat(waiting_for["at"]) > datetime.fromisoformat(job["created_at"])


# --- lists -------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_page_by_page(client: httpx2.Client) -> None:
    made = [submit(client)["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/jobs", params=params).json()
        assert len(page["data"]) <= 2
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


def test_jobs_are_filtered(client: httpx2.Client, worker: PlayedWorker) -> None:
    in_session = submit(client, session={}, lane="standard")
    done = submit(client)
    worker.answer(done["id"])

    def listed(**filters: str) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=filters).json()["data"]]

    assert listed(status="succeeded") == [done["id"]]
    assert listed(lane="standard") == [in_session["id"]]
    assert listed(session_id=in_session["session_id"]) == [in_session["id"]]
    assert listed(status="succeeded", lane="standard") == []
    assert listed(batch_id=f"bat_{'0' * 32}") == []


@pytest.mark.parametrize(
    "params", [{"stauts": "failed"}, {"status": "done"}, {"limit": "0"}, {"cursor": "x"}]
)
def test_a_filter_that_is_none_is_refused(client: httpx2.Client, params: dict[str, str]) -> None:
    response = client.get("/v1/jobs", params=params)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == next(iter(params))


# --- cancel, retry, history --------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    cancelled = client.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    until(lambda: worker.courier.redis.get(f"visq:job:{job['id']}"), 10, "its result in Redis")


def test_a_running_job_is_asked_to_stop(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    with worker.courier.redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe("visq:cancel")
        heard.get_message(timeout=5)
        assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "running"
        note = until(lambda: heard.get_message(timeout=1), 10, "the note to the workers")
    assert note["data"].decode() == job["id"]
    worker.stop(claim)
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_cancelling_an_ended_job_changes_nothing(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    worker.answer(job["id"])
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "succeeded"


def test_a_failed_job_is_tried_again(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.fail(worker.begin(job["id"]))
    retried = client.post(f"/v1/jobs/{job['id']}/retry")
    assert retried.status_code == 200
    assert retried.json()["status"] == "queued"
    assert retried.json()["error"] is None
    worker.answer(job["id"])
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"


def test_a_job_that_has_not_failed_is_not_tried_again(client: httpx2.Client) -> None:
    job = submit(client)
    response = client.post(f"/v1/jobs/{job['id']}/retry")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "not_retriable"


def test_the_history_shows_every_transition(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.answer(job["id"])
    page = client.get(f"/v1/jobs/{job['id']}/history").json()
    assert [(event["from_status"], event["to_status"]) for event in page["data"]] == [
        (None, "queued"),
        ("queued", "running"),
        ("running", "succeeded"),
    ]
    assert page["data"][1]["worker"] == "w1"


# --- idempotency -------------------------------------------------------------------------------


def test_a_repeat_with_the_same_key_is_the_same_job(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = client.post("/v1/jobs", json=ASK, headers=headers)
    # Another spelling of the same body: the order of the fields, and a default spelt out.
    again = client.post(
        "/v1/jobs", json={"kind": "chat", **dict(reversed(ASK.items()))}, headers=headers
    )
    assert again.status_code == 202
    assert again.json()["id"] == first.json()["id"]
    worker.answer(first.json()["id"])
    ended = client.post("/v1/jobs", json=ASK, headers=headers)
    assert ended.status_code == 200
    assert ended.json()["result"]["text"] == "Three."
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_the_same_key_with_another_body_is_a_conflict(client: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "order-1"}
    client.post("/v1/jobs", json=ASK, headers=headers)
    response = client.post("/v1/jobs", json=ASK | {"lane": "batch"}, headers=headers)
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "idempotency_conflict"


def test_two_submissions_at_the_same_time_with_one_key_make_one_job(
    client: httpx2.Client,
) -> None:
    body = ASK | {"session": {}}
    together = threading.Barrier(8)

    def send() -> httpx2.Response:
        together.wait()
        return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "order-1"})

    with ThreadPoolExecutor(8) as threads:
        responses = [each.result() for each in [threads.submit(send) for _ in range(8)]]
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len(client.get("/v1/jobs").json()["data"]) == 1
    assert len(client.get("/v1/sessions").json()["data"]) == 1


def test_another_tenant_may_use_the_same_key(
    client: httpx2.Client, stranger: httpx2.Client
) -> None:
    headers = {"Idempotency-Key": "order-1"}
    mine = client.post("/v1/jobs", json=ASK, headers=headers).json()
    theirs = stranger.post("/v1/jobs", json=ASK, headers=headers).json()
    assert mine["id"] != theirs["id"]


@pytest.mark.parametrize("key", ["", "two words", "x" * 256])
def test_a_malformed_key_is_refused(client: httpx2.Client, key: str) -> None:
    response = client.post("/v1/jobs", json=ASK, headers={"Idempotency-Key": key})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "Idempotency-Key"


# --- publishing --------------------------------------------------------------------------------


def test_a_job_is_in_the_broker_when_its_submission_is_answered(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    assert worker.database.read(jobs.get, job["id"]).publishes == 1
    assert worker.courier.broker.depth(Lane.INTERACTIVE) >= 1
