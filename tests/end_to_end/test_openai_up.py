"""OpenAI's released client, unmodified, against ``visq up``: chat, and batches of good files and of
ten kinds of broken ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai.types import Batch

from tests.end_to_end.test_openai import asking, data_url
from tests.waiting import until
from visq.embedded.connection import ConnectionInfo
from visq.embedded.processes import end, free_port, start_tethered

pytestmark = pytest.mark.timeout(240)

ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConnectionInfo]:
    """``visq up``, as a newcomer starts it."""
    data = tmp_path_factory.mktemp("up")
    own = {name: value for name, value in os.environ.items() if not name.startswith("VISQ_")}
    process = start_tethered(
        [sys.executable, "-m", "visq", "up", "--data", data],
        log=data / "up.log",
        env=own
        | {
            "VISQ_PORT": str(free_port()),
            "VISQ_ENGINE_THREADS": "1",
            "VISQ_MAX_LINE_BYTES": "1000000",
        },
    )

    def runs() -> ConnectionInfo | None:
        assert process.poll() is None, (data / "up.log").read_text()
        return ConnectionInfo.read(data)

    info = until(runs, 120, "visq up")
    assert info is not None
    yield info
    assert end(process, 60, signal.SIGINT), "visq up must end at Ctrl-C"


@pytest.fixture
def client(up: ConnectionInfo) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key=up.api_key) as client:
        yield client


def line(custom_id: str, text: str = "hi", *, model: str = "small", **more: Any) -> dict[str, Any]:
    content: Any = text
    if "image" in more:
        content = [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": more.pop("image")}},
        ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body | {"temperature": 0} | more,
    }


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def submit(client: openai.OpenAI, data: bytes, name: str = "in.jsonl", **more: Any) -> Batch:
    file = client.files.create(file=(name, io.BytesIO(data)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        **more,
    )


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    found = until(look, 120, "the batch to end", every=0.2)
    assert found is not None
    return found


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def test_a_chat_with_an_image_is_answered_and_streamed(
    client: openai.OpenAI, up: ConnectionInfo
) -> None:
    asked: Any = {"messages": asking("what color is it?", data_url()), "temperature": 0}
    answer = client.chat.completions.create(model="small", max_tokens=8, **asked)
    text = answer.choices[0].message.content
    assert text
    stream = client.chat.completions.create(model="small", max_tokens=8, stream=True, **asked)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == text
    langchain: Any = ChatOpenAI
    chat = langchain(base_url=f"{up.url}/v1", api_key=up.api_key, model="small", temperature=0)
    assert chat.bind(max_tokens=8).invoke([HumanMessage(asked["messages"][0]["content"])]).text


def test_a_batch_is_answered_in_input_order_with_its_errors_apart(client: openai.OpenAI) -> None:
    good = [line(f"r{n}", "How many?", image=data_url()) for n in range(5)]
    wrong = [line("bad", n=0), line("r1")]
    batch = submit(client, jsonl(*good[:3], *wrong, *good[3:]), metadata={"for": "a test"})
    assert batch.status in ("validating", "in_progress")
    assert batch.object == "batch"
    assert batch.endpoint == "/v1/chat/completions"
    found = ended(client, batch)
    assert found.status == "completed"
    assert found.request_counts is not None
    counts = found.request_counts
    assert (counts.total, counts.completed, counts.failed) == (7, 5, 2)
    assert found.completed_at is not None
    assert found.completed_at >= found.created_at
    assert found.metadata == {"for": "a test"}
    assert found.usage is not None
    assert found.usage.output_tokens > 0

    answers = lines_of(client, found.output_file_id)
    assert [each["custom_id"] for each in answers] == ["r0", "r1", "r2", "r3", "r4"]
    for each in answers:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        body = each["response"]["body"]
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["usage"]["total_tokens"] > 0
    errors = {each["custom_id"]: each for each in lines_of(client, found.error_file_id)}
    assert errors["bad"]["response"]["status_code"] == 400
    assert errors["bad"]["response"]["body"]["error"]["type"] == "invalid_request_error"
    duplicate = next(each for name, each in errors.items() if name != "bad")
    assert duplicate["response"]["body"]["error"]["code"] == "duplicate_custom_id"


def test_batches_are_listed_newest_first_page_by_page(client: openai.OpenAI) -> None:
    made = [submit(client, jsonl(line("a"))).id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=2)]
    assert listed[:3] == made[::-1]
    first = client.batches.list(limit=2)
    assert first.has_more
    assert [batch.id for batch in first.data] == made[:0:-1]


def test_a_batch_is_cancelled(client: openai.OpenAI) -> None:
    many = [line(f"r{n}", max_tokens=200) for n in range(300)]
    batch = submit(client, jsonl(*many))
    until(
        lambda: client.batches.retrieve(batch.id).status == "in_progress",
        60,
        "it to be in progress",
    )
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    found = ended(client, batch)
    assert found.status == "cancelled"
    assert found.cancelled_at is not None
    assert found.request_counts is not None
    assert found.request_counts.completed < found.request_counts.total


def test_a_batch_expires_by_its_window(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("in.jsonl", io.BytesIO(jsonl(*[line(f"r{n}") for n in range(400)]))), purpose="batch"
    )
    body: Any = {"completion_window": "1s"}
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", **body)
    found = ended(client, batch)
    assert found.status == "expired"
    assert found.expired_at is not None


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", io.BytesIO(jsonl(line("a")))), purpose="batch")
    create: Any = client.batches.create
    window = {"completion_window": "24h"}
    with pytest.raises(openai.NotFoundError):
        create(input_file_id="fil_" + "0" * 32, endpoint="/v1/chat/completions", **window)
    with pytest.raises(openai.BadRequestError) as refused:
        create(input_file_id=file.id, endpoint="/v1/embeddings", **window)
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="window"):
        create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="soon")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("bat_" + "0" * 32)
    with pytest.raises(openai.NotFoundError):
        client.batches.cancel("bat_" + "0" * 32)


GOOD = line("good")

BROKEN_LINES = {
    "bad JSON": (b'{"custom_id": "x", \n', "malformed_body", "line 2"),
    "wrong encoding": (
        json.dumps(line("x", "caf\u00e9"), ensure_ascii=False).encode("latin-1") + b"\n",
        "malformed_body",
        "UTF-8",
    ),
    "10 MB line": (jsonl(line("x", "long " * 2_000_000)), "line_too_long", "line 2"),
    "missing custom_id": (jsonl({**line("x"), "custom_id": None}), "invalid_request", "custom_id"),
    "unknown model": (jsonl(line("x", model="gpt-99")), "model_not_found", "gpt-99"),
}
"""Between two good lines; what the item's error says."""


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_line_is_an_error_of_its_own(client: openai.OpenAI, kind: str) -> None:
    broken, code, said = BROKEN_LINES[kind]
    found = ended(client, submit(client, jsonl(GOOD) + broken + jsonl(line("also good"))))
    assert found.status == "completed"
    answers = lines_of(client, found.output_file_id)
    assert [each["custom_id"] for each in answers] == ["good", "also good"]
    [error] = lines_of(client, found.error_file_id)
    told = error["response"]["body"]["error"]
    assert told["code"] == code
    assert said in told["message"]


UNREADABLE = {
    "empty": (b"", "nothing"),
    "truncated gzip": (gzip.compress(jsonl(*[GOOD] * 50))[:60], "cut off"),
    "binary": (b"\x7fELF\0\1\2\3" * 100, "binary"),
}
"""What the batch's error says."""


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_cannot_be_read_fails_the_batch(client: openai.OpenAI, kind: str) -> None:
    data, said = UNREADABLE[kind]
    found = ended(client, submit(client, data))
    assert found.status == "failed"
    assert found.errors is not None
    assert found.errors.data
    assert found.errors.data[0].code == "batch_input_invalid"
    assert said in str(found.errors.data[0].message)
    assert found.output_file_id is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + jsonl(GOOD, line("b")),
        jsonl(GOOD, line("b")).replace(b"\n", b"\r\n"),
        gzip.compress(jsonl(GOOD, line("b"))),
        b"\n" + jsonl(GOOD) + b"\n\n" + jsonl(line("b")).rstrip(),
    ],
    ids=["BOM", "CRLF", "gzip", "blank lines and no last newline"],
)
def test_other_ways_to_write_the_same_file_are_read(client: openai.OpenAI, data: bytes) -> None:
    found = ended(client, submit(client, data))
    answers = lines_of(client, found.output_file_id)
    assert [each["custom_id"] for each in answers] == ["good", "b"]
    assert found.error_file_id is None


def test_the_files_of_a_batch_are_files_like_others(client: openai.OpenAI, tmp_path: Path) -> None:
    found = ended(client, submit(client, jsonl(GOOD)))
    assert found.output_file_id is not None
    output = client.files.retrieve(found.output_file_id)
    content = client.files.content(found.output_file_id)
    content.write_to_file(tmp_path / "out.jsonl")
    assert output.bytes == (tmp_path / "out.jsonl").stat().st_size
    assert output.purpose == "batch_output"
    assert client.files.delete(output.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(output.id)
