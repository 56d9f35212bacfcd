"""``dry_run``: batches are counted and estimated, and nothing of them is stored."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest

from api.estimates import TOLD_APART, Distinct, Size, prompt_tokens, seconds_per_item
from models.latest import Asked, Run
from tests.api.running import PlayedWorker, RunningApi
from tests.waiting import until
from visq.objects import ObjectStore, open_store, parse_uri
from visq.types import Prompt

PIXEL = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
HOUR = datetime(2026, 1, 5, 9, tzinfo=UTC)


@pytest.fixture
def store(api: RunningApi) -> Iterator[ObjectStore]:
    opened = open_store(api.settings)
    yield opened
    opened.close()


def estimate(client: httpx2.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/batches", json={**body, "dry_run": True})
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "batch.estimate"
    assert client.get("/v1/batches").json()["data"] == []
    return response.json()


def put(store: ObjectStore, uri: str, *lines: object, packed: bool = False) -> str:
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    store.put(parse_uri(uri), gzip.compress(data) if packed else data, "application/octet-stream")
    return uri


def test_inline_items_are_counted_and_not_stored(client: httpx2.Client) -> None:
    items = [
        {"custom_id": "a", "prompt": "What?", "images": ["s3://pictures/a.png", PIXEL]},
        {"custom_id": "b", "prompt": "What?", "images": ["s3://pictures/a.png"]},
        {"custom_id": "c", "prompt": "What?", "gen_config": {"max_new_tokens": 5, "n": 2}},
        {"custom_id": "d", "prompt": "What?", "images": ["nowhere.png"]},
    ]
    told = estimate(client, items=items, gen_config={"max_new_tokens": 100})
    assert told["items"] == 4
    assert told["invalid_items"] == 1
    [error] = told["errors"]
    assert (error["code"], error["param"], error["line"]) == ("invalid_request", "images.0", 4)
    assert (told["images"], told["distinct_images"]) == (3, 2)
    assert told["max_completion_tokens"] == 210
    assert told["prompt_tokens"] is None
    assert told["seconds"] is None


def test_an_answer_without_a_limit_has_none(client: httpx2.Client) -> None:
    items = [{"custom_id": "a", "prompt": "What?", "gen_config": {"max_new_tokens": None}}]
    assert estimate(client, items=items)["max_completion_tokens"] is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_with_its_wrong_lines(
    client: httpx2.Client, store: ObjectStore, packed: bool
) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 7}
    uri = put(
        store,
        "s3://data/estimate.jsonl",
        {"custom_id": "a", "prompt": "What?", "images": ["s3://pictures/a.png"]},
        b"{not JSON",
        b"",
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "a", "prompt": "Again?"},
        packed=packed,
    )
    told = estimate(client, input_uri=uri)
    assert (told["items"], told["invalid_items"], told["images"]) == (4, 2, 1)
    assert [(error["code"], error["line"]) for error in told["errors"]] == [
        ("malformed_body", 2),
        ("duplicate_custom_id", 5),
    ]
    assert told["max_completion_tokens"] == 512 + 7


def test_the_first_errors_are_shown(client: httpx2.Client, store: ObjectStore) -> None:
    uri = put(store, "s3://data/wrong.jsonl", *[{"custom_id": "a"}] * 50)
    told = estimate(client, input_uri=uri)
    assert told["invalid_items"] == 50
    assert [error["line"] for error in told["errors"]] == list(range(1, 21))
    assert told["max_completion_tokens"] == 0


def test_a_prefix_and_an_uploaded_file_are_counted(
    client: httpx2.Client, store: ObjectStore
) -> None:
    for name in ("a.png", "b.jpg", "notes.txt"):
        put(store, f"s3://data/photos/{name}", b"any")
    told = estimate(client, input_uri="s3://data/photos/", prompt="What is it?")
    assert (told["items"], told["images"], told["distinct_images"]) == (2, 2, 2)
    line = b'{"custom_id": "a", "prompt": "What?"}\n'
    file = client.post(
        "/v1/files", files={"file": ("in.jsonl", line)}, data={"purpose": "batch"}
    ).json()
    assert estimate(client, input_file_id=file["id"])["items"] == 1


def test_what_is_no_input_is_an_error(client: httpx2.Client, store: ObjectStore) -> None:
    cut = gzip.compress(b'{"custom_id": "a", "prompt": "What?"}\n' * 1000)[:-20]
    store.put(parse_uri("s3://data/cut.jsonl.gz"), cut, "application/gzip")
    for uri, status, code in (
        ("s3://data/none.jsonl", 404, "object_not_found"),
        ("s3://data/cut.jsonl.gz", 400, "batch_input_invalid"),
        ("s3://visq-uploads/other/files/fil_1", 403, "object_forbidden"),
    ):
        answer = client.post("/v1/batches", json={"input_uri": uri, "dry_run": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), uri


def test_the_latest_jobs_say_what_it_will_take(client: httpx2.Client, worker: PlayedWorker) -> None:
    for _ in range(5):
        job = client.post("/v1/jobs", json={"prompt": "What?", "kind": "generate"}).json()
        worker.answer(job["id"])
    items = [{"custom_id": str(number), "prompt": "What?"} for number in range(10)]
    told = estimate(client, items=items)
    assert told["prompt_tokens"] == 70, "7 of each played answer"
    assert told["seconds"] is None, "nobody is there"
    worker.announce()
    # The API looks at its workers every two seconds.
    told = until(
        lambda: (seen := estimate(client, items=items))["seconds"] is not None and seen,
        10,
        "the worker to be seen",
        every=0.2,
    )
    assert told["seconds"] > 0


# --- estimating ------------------------------------------------------------------------------


def asked(characters: int, images: int, tokens: int) -> Asked:
    names = [f"s3://pictures/{number}.png" for number in range(images)]
    return Asked(Prompt(prompt="x" * characters, images=names), tokens)


def test_characters_and_images_are_told_apart() -> None:
    known = [asked(c, i, 2 * c + 30 * i) for c, i in ((10, 0), (20, 1), (5, 2), (40, 1), (8, 3))]
    assert prompt_tokens(known, Size(100, 10)) == 500


def test_jobs_that_are_all_alike_are_a_measure_for_such() -> None:
    known = [asked(20, 1, 261)] * 10
    assert prompt_tokens(known, Size(20 * 50, 50)) == 261 * 50
    assert prompt_tokens([asked(10, 0, 7)] * 10, Size(100, 0)) == 70


def test_too_few_jobs_and_jobs_without_images_are_none() -> None:
    assert prompt_tokens([asked(10, 0, 7)] * 4, Size(10, 0)) is None
    assert prompt_tokens([asked(10, 0, 7)] * 10, Size(10, 1)) is None


def runs(*spans: tuple[float, float], worker: str = "w1") -> list[Run]:
    return [
        Run(HOUR + timedelta(seconds=start), HOUR + timedelta(seconds=end), worker)
        for start, end in spans
    ]


def test_idle_time_is_no_pace() -> None:
    """Ten runs, two at a time, in two bursts of five seconds each."""
    spans = [(at + n, at + n + 1) for at in (0, 100) for n in range(5)]
    assert seconds_per_item(runs(*spans, *spans), 1) == pytest.approx(0.5)


def test_the_pace_is_that_of_the_workers_that_are_there() -> None:
    spans = [(float(n), float(n + 1)) for n in range(10)]
    both = runs(*spans) + runs(*spans, worker="w2")
    assert seconds_per_item(both, 2) == pytest.approx(0.5)
    assert seconds_per_item(both, 1) == pytest.approx(1.0)
    assert seconds_per_item(both, 0) is None
    assert seconds_per_item(both[:3], 1) is None


def test_too_many_to_tell_apart_are_not_counted() -> None:
    distinct = Distinct()
    assert [distinct.has(text) for text in ("a", "b", "a")] == [False, False, True]
    assert distinct.count == 2
    for number in range(TOLD_APART):
        distinct.has(str(number))
    assert distinct.count is None
    assert not distinct.has("a")
