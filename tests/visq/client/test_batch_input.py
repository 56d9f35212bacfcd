"""Items of a batch, in every form and number, on their way to the server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.api.running import RunningApi
from tests.visq.client.faulty import FaultyServer, LoseAnswer
from tests.waiting import until
from visq import AsyncClient, Client, errors
from visq.client import Batch, batch_input
from visq.types import BatchItem, BatchView

MANY = batch_input.INLINE_ITEMS + 1


@pytest.fixture
def few_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a handful of items are too many for a body."""
    monkeypatch.setattr(batch_input, "INLINE_ITEMS", 3)
    monkeypatch.setattr(batch_input, "CHUNK", 4)


def read(batch: Batch) -> BatchView:
    """When the server has read its file."""
    return until(lambda: batch.refresh().intake_done and batch.view, 60, "the file to be read")


def names(client: Client, batch: Batch) -> list[str]:
    found = sorted(client.jobs.list(batch_id=batch.id), key=lambda job: job.position or 0)
    return [job.custom_id or "" for job in found]


def test_items_that_are_too_many_for_a_body_go_as_a_file(client: Client, few_inline: None) -> None:
    numbered = ((f"Item {number}", []) for number in range(10))
    batch = client.batches.submit(numbered, lane="standard", dedupe=True)
    assert batch.view.input_file_id is not None
    assert (batch.view.lane, batch.view.dedupe) == ("standard", True)
    assert read(batch).counts.total == 10
    assert names(client, batch) == [str(number) for number in range(10)]


def test_more_items_than_a_body_may_hold_are_taken(client: Client) -> None:
    """Estimated only: ten thousand jobs would keep the tests beside this one waiting."""
    numbered = ((f"Item {number}", []) for number in range(MANY))
    assert client.batches.estimate(numbered).items == MANY


async def test_the_async_client_sends_a_file_too(
    api: RunningApi, secret: str, few_inline: None, answering: None
) -> None:
    async with AsyncClient(api.url, secret) as client:
        run = client.batches.run({"prompt": f"Item {number}"} for number in range(10))
        given = {job.custom_id async for job in run}
    assert given == {str(number) for number in range(10)}


def test_local_images_of_a_file_are_uploaded_once(
    faulty: FaultyServer, secret: str, few_inline: None, answering: None, tmp_path: Path
) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (2, 2), "red").save(path)
    bytes_of = io.BytesIO()
    Image.new("RGB", (2, 2), "blue").save(bytes_of, "PNG")
    with Client(faulty.url, secret) as client:
        items: list[Any] = [("What?", path)] * 9 + [("What?", bytes_of.getvalue())]
        batch = client.batches.submit(items)
        usages = [job.result.usage.images for job in batch.results() if job.result]
    assert usages == [1] * 10
    uploads = [seen for seen in faulty.seen if seen.path == "/v1/images"]
    assert len(uploads) == 2


def test_all_forms_of_items_may_be_in_a_file(
    client: Client, few_inline: None, answering: None
) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Fourth"}]}
    items: list[Any] = [
        ("First", []),
        {"custom_id": "b", "prompt": "Second"},
        BatchItem(custom_id="c", prompt="Third"),
        {"custom_id": "d", "url": "/v1/chat/completions", "method": "POST", "body": body},
    ]
    batch = client.batches.submit(items)
    told = [job.result.text for job in batch.results() if job.result]
    assert told == [f"You asked: {name}" for name in ("First", "Second", "Third", "Fourth")]


def test_a_line_of_openais_files_goes_as_a_file(client: Client, answering: None) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Why?"}]}
    line = {"custom_id": "d", "url": "/v1/chat/completions", "method": "POST", "body": body}
    [job] = client.batches.submit([line]).results()
    assert job.custom_id == "d"


def test_a_large_body_goes_as_a_file(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "INLINE_BYTES", 1000)
    batch = client.batches.submit([{"prompt": "x" * 2000}])
    assert batch.view.input_file_id is not None
    assert read(batch).counts.total == 1


def test_a_wrong_item_is_named_wherever_it_goes(client: Client, few_inline: None) -> None:
    items: list[Any] = [{"prompt": "x"}] * 7 + [{"prompt": "x", "gen_config": {"top_p": 2}}]
    for given, param in ((items[-2:], "items.1.gen_config.top_p"), (items, "items.7.gen_config.")):
        with pytest.raises(errors.InvalidRequest) as raised:
            client.batches.submit(given)
        assert (raised.value.param or "").startswith(param)
    assert list(client.batches.list()) == []


def test_a_lost_answer_makes_one_batch_of_a_file(
    faulty: FaultyServer, secret: str, few_inline: None
) -> None:
    with Client(faulty.url, secret) as client:
        faulty.faults = [LoseAnswer(), LoseAnswer()]  # of the first upload, and of the second
        batch = client.batches.submit([{"prompt": f"{number}"} for number in range(10)])
        assert [found.id for found in client.batches.list()] == [batch.id]
        assert read(batch).counts.total == 10
        assert names(client, batch) == [str(number) for number in range(10)]
    sent = [seen.body for seen in faulty.seen if seen.path == "/v1/files"]
    assert len(sent) == 3
    assert all(body.count(b'"prompt"') == 10 for body in sent), "each repeat sends all of it"


def test_every_option_reaches_the_server(client: Client) -> None:
    batch = client.batches.submit(
        [{"prompt": "x"}],
        output_uri="s3://out/a.jsonl",
        lane="standard",
        max_in_flight=7,
        expires_in=3600,
        on_item_error="stop",
        dedupe=True,
        metadata={"a": "b"},
        result_queue="q",
    )
    view = batch.view
    assert (view.output_uri, view.lane, view.max_in_flight) == ("s3://out/a.jsonl", "standard", 7)
    assert (view.on_item_error, view.dedupe, view.result_queue) == ("stop", True, "q")
    assert view.expires_at is not None
    assert view.metadata == {"a": "b"}


def test_an_estimate_stores_nothing(client: Client, few_inline: None) -> None:
    for count in (2, 10):
        told = client.batches.estimate(
            [{"prompt": f"{number}"} for number in range(count)], gen_config={"max_new_tokens": 5}
        )
        assert (told.items, told.invalid_items, told.max_completion_tokens) == (count, 0, 5 * count)
    assert list(client.batches.list()) == []
    assert client._runner._http.get("/v1/files").json()["data"] == []
    with pytest.raises(errors.ObjectNotFound):
        client.batches.estimate(input_uri="s3://nowhere/in.jsonl")


def test_errors_of_the_batch_routes_are_typed(client: Client) -> None:
    """They come in another form than those of the other routes."""
    with pytest.raises(errors.NotFound):
        client.batches.get("bat_" + "0" * 32)
    with pytest.raises(errors.InvalidRequest, match="prefix"):
        client.batches.submit(input_uri="s3://bucket/photos/")
    with pytest.raises(errors.InvalidRequest) as raised:
        client.batches.submit([{"prompt": "x", "images": ["file:///a.png"]}])
    assert raised.value.param == "items.0.images.0"
    with pytest.raises(errors.ObjectForbidden):
        client.batches.submit(input_uri="s3://visq-uploads/x.jsonl")
    client.batches.submit([{"prompt": "x"}], idempotency_key="k")
    with pytest.raises(errors.IdempotencyConflict):
        client.batches.submit([{"prompt": "y"}], idempotency_key="k")
    with Client(client.base_url, "not-a-key") as stranger, pytest.raises(errors.Unauthorized):
        stranger.batches.submit([{"prompt": "x"}])


def test_a_batch_in_openais_form_is_submitted(client: Client, answering: None) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "Why?"}]}
    line = {"custom_id": "d", "url": "/v1/chat/completions", "method": "POST", "body": body}
    file = client._runner._http.post(
        "/v1/files",
        files={"file": ("in.jsonl", json.dumps(line).encode())},
        data={"purpose": "batch"},
    ).json()
    batch = client.batches.submit(
        input_file_id=file["id"], endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert batch.wait(timeout=60).output_file_id is not None
