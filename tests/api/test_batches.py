"""``/v1/batches``."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from models import jobs
from tests.api.running import PlayedWorker
from tests.waiting import until


def submit(client: httpx2.Client, count: int = 3, **more: Any) -> dict[str, Any]:
    items = [{"custom_id": f"item-{n}", "prompt": f"question {n}"} for n in range(count)]
    response = client.post("/v1/batches", json={"items": items, **more})
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/batches/{response.json()['id']}"
    return response.json()


def job_ids(client: httpx2.Client, batch: dict[str, Any]) -> list[str]:
    """In the order of the items."""
    page = client.get("/v1/jobs", params={"batch_id": batch["id"], "limit": 100}).json()
    return [job["id"] for job in sorted(page["data"], key=lambda job: job["custom_id"])]


def test_a_batch_counts_its_items_as_they_end(client: httpx2.Client, worker: PlayedWorker) -> None:
    batch = submit(client, metadata={"a": "b"})
    assert batch["status"] == "in_progress"
    assert batch["counts"] == {
        "total": 3,
        "succeeded": 0,
        "failed": 0,
        "cancelled": 0,
        "expired": 0,
    }
    first, second, third = job_ids(client, batch)
    worker.answer(first)
    worker.fail(worker.begin(second))
    seen = client.get(f"/v1/batches/{batch['id']}").json()
    assert (seen["counts"]["succeeded"], seen["counts"]["failed"]) == (1, 1)
    assert seen["status"] == "in_progress"
    worker.answer(third)
    seen = client.get(f"/v1/batches/{batch['id']}").json()
    assert seen["status"] == "completed"
    assert seen["finished_at"] is not None
    assert seen["metadata"] == {"a": "b"}


def test_items_are_jobs_with_the_batch_config_unless_they_have_their_own(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    items = [
        {"custom_id": "a", "prompt": "x"},
        {"custom_id": "b", "prompt": "x", "gen_config": {"max_new_tokens": 9}},
    ]
    body = {"items": items, "gen_config": {"max_new_tokens": 5}}
    batch = client.post("/v1/batches", json=body).json()
    for job_id, expected in zip(job_ids(client, batch), [5, 9], strict=True):
        worker.claim(job_id)
        assert worker.claimed.prompt.gen_config.max_new_tokens == expected


def test_results_can_be_read_while_the_batch_runs(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    batch = submit(client, 5)
    ids = job_ids(client, batch)
    for number in (3, 0, 1):
        worker.answer(ids[number], f"answer {number}")
    url = f"/v1/batches/{batch['id']}/results"
    page = client.get(url, params={"limit": 2}).json()
    assert [item["custom_id"] for item in page["data"]] == ["item-0", "item-1"]
    assert page["data"][0]["result"]["text"] == "answer 0"
    page = client.get(url, params={"cursor": page["next_cursor"]}).json()
    assert [item["custom_id"] for item in page["data"]] == ["item-3"]
    assert page["next_cursor"] is None


def test_a_cancelled_batch_ends_without_starting_another_item(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    batch = submit(client)
    ids = job_ids(client, batch)
    claim = worker.begin(ids[0])
    cancelled = client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["status"] == "cancelling"
    until(
        lambda: worker.database.read(jobs.get, ids[0]).cancel_requested_at,
        10,
        "the running item to be asked to stop",
    )
    worker.stop(claim)
    ended = until(
        lambda: (
            batch
            if (batch := client.get(f"/v1/batches/{cancelled['id']}").json())["finished_at"]
            else None
        ),
        20,
        "the batch to end",
    )
    assert ended["status"] == "cancelled"
    assert ended["counts"]["cancelled"] == 3


def test_the_first_items_get_into_the_broker_by_themselves(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    batch = submit(client)
    for job_id in job_ids(client, batch):
        until(lambda id_=job_id: worker.database.read(jobs.get, id_).publishes, 20, "publishing")


def test_batches_are_listed_newest_first(client: httpx2.Client) -> None:
    made = [submit(client, 1)["id"] for _ in range(3)]
    page = client.get("/v1/batches", params={"limit": 2}).json()
    assert [batch["id"] for batch in page["data"]] == [made[2], made[1]]
    page = client.get("/v1/batches", params={"cursor": page["next_cursor"]}).json()
    assert [batch["id"] for batch in page["data"]] == [made[0]]


def test_a_repeat_with_the_same_key_is_the_same_batch(client: httpx2.Client) -> None:
    body = {"items": [{"custom_id": "a", "prompt": "x"}]}
    headers = {"Idempotency-Key": "run-1"}
    first = client.post("/v1/batches", json=body, headers=headers)
    again = client.post("/v1/batches", json=body, headers=headers)
    assert again.json() == first.json()
    other = client.post("/v1/batches", json=body | {"lane": "standard"}, headers=headers)
    assert other.status_code == 409
    assert len(client.get("/v1/batches").json()["data"]) == 1


def test_a_batch_is_taken_whole_or_not_at_all(client: httpx2.Client) -> None:
    items = [
        {"custom_id": "a", "prompt": "x"},
        {"custom_id": "b", "prompt": "x", "images": ["http://example.org/a.png"]},
    ]
    response = client.post("/v1/batches", json={"items": items})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "items.1.images.0"
    assert client.get("/v1/batches").json()["data"] == []
    assert client.get("/v1/jobs").json()["data"] == []


LOGITS = {"output_logits": "generation"}


@pytest.mark.parametrize(
    ("item", "batch", "param"),
    [
        ({}, {"gen_config": LOGITS}, "gen_config.output_logits"),
        ({"gen_config": LOGITS}, {}, "items.1.gen_config.output_logits"),
    ],
)
def test_logits_are_refused_at_the_submission(
    client: httpx2.Client, item: dict[str, Any], batch: dict[str, Any], param: str
) -> None:
    items = [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "prompt": "x", **item}]
    response = client.post("/v1/batches", json={"items": items, **batch})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


def test_a_name_given_twice_is_refused(client: httpx2.Client) -> None:
    item = {"custom_id": "a", "prompt": "x"}
    response = client.post("/v1/batches", json={"items": [item, item]})
    assert response.status_code == 400
    assert "given twice" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("GET", "/results"), ("POST", "/cancel")]
)
def test_an_unknown_batch_is_not_found(client: httpx2.Client, method: str, path: str) -> None:
    response = client.request(method, f"/v1/batches/bat_{'0' * 32}{path}")
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("input_uri", "output_uri"),
    [
        ("s3://data/in.jsonl", "s3://data/in.jsonl"),
        ("s3://data/out.errors.jsonl", "s3://data/out.jsonl"),
    ],
)
def test_an_output_does_not_replace_the_input(
    client: httpx2.Client, input_uri: str, output_uri: str
) -> None:
    body = {"input_uri": input_uri, "output_uri": output_uri}
    response = client.post("/v1/batches", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "output_uri"
    assert "would replace the input" in error["message"]
