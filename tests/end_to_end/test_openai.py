"""The released clients of OpenAI and LangChain, unmodified, against the whole of visq: only the
base URL is another."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion
from PIL import Image
from pydantic import BaseModel, ConfigDict

from tests.deployment import API_KEY, Deployment
from tests.servers import Valkey
from tests.waiting import until
from visq.objects import open_store, parse_uri
from visq.settings import Settings

pytestmark = pytest.mark.timeout(120)

DOC = Path(__file__).parents[2] / "docs" / "openai.md"

LONG = {"min_tokens": 1800}
"""An answer that lasts for some seconds."""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, valkey: Valkey) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("visq")
    settings = {"redis_url": valkey.url, "broker_url": valkey.url}
    with Deployment(folder, settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key=API_KEY) as client:
        yield client


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(colour: str = "red") -> str:
    return f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"


def asking(text: str, *images: str) -> list[Any]:
    parts: list[Any] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": parts}]


def chat(client: openai.OpenAI, text: str = "what color is it?", **fields: Any) -> ChatCompletion:
    given: dict[str, Any] = {"messages": asking(text), "temperature": 0, "max_tokens": 16}
    return client.chat.completions.create(model="small", **given | fields)


def said(answer: ChatCompletion) -> str:
    text = answer.choices[0].message.content
    assert text
    return text


def status_of(deployment: Deployment, job_id: str) -> str:
    url = f"{deployment.url}/v1/jobs/{job_id}"
    answer = httpx2.get(url, headers={"Authorization": f"Bearer {API_KEY}"})
    return str(answer.json()["status"])


def test_the_models_are_listed_and_found(client: openai.OpenAI) -> None:
    [model] = until(lambda: client.models.list().data, 10, "the model")
    assert (model.id, model.object, model.owned_by) == ("small", "model", "visq")
    assert client.models.retrieve("small") == model


def test_a_chat_is_answered_with_its_usage(client: openai.OpenAI, deployment: Deployment) -> None:
    first = chat(client, "what color is the large circle at the left of the small square? " * 8)
    assert first.usage is not None
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    again = chat(client, "what color is the large circle at the left of the small square? " * 8)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens
    assert said(again) == said(first)
    assert again._request_id is not None
    assert again.id == f"chatcmpl-{again._request_id.removeprefix('job_')}"
    assert status_of(deployment, again._request_id) == "succeeded"


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    whole = chat(client)
    stream = client.chat.completions.create(
        model="small",
        messages=asking("what color is it?"),
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == said(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_images_by_data_url_by_s3_and_by_an_upload_are_shown(
    client: openai.OpenAI, deployment: Deployment
) -> None:
    uri = "s3://photos/red.png"
    open_store(Settings(data=deployment.folder)).put(parse_uri(uri), png(), "image/png")
    uploaded = httpx2.post(
        f"{deployment.url}/v1/images",
        files={"file": ("red.png", png(), "image/png")},
        headers={"Authorization": f"Bearer {API_KEY}"},
    ).json()
    without = chat(client).usage
    assert without is not None
    answers = [
        chat(client, messages=asking("what color is it?", reference))
        for reference in (data_url(), uri, uploaded["id"])
    ]
    assert len({said(answer) for answer in answers}) == 1
    for answer in answers:
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > without.prompt_tokens
    both = chat(client, messages=asking("compare them", data_url(), uri))
    assert both.usage is not None


def test_several_choices_are_reproducible_by_a_seed(client: openai.OpenAI) -> None:
    sampled: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": -7}
    first, second = chat(client, **sampled), chat(client, **sampled)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    other = chat(client, **sampled | {"seed": 8})
    assert texts != [choice.message.content for choice in other.choices]


def test_log_probabilities_join_to_the_text_and_are_sorted(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    joined = bytes(byte for token in logprobs.content for byte in token.bytes or [])
    assert joined.decode().strip() == said(answer).strip()
    for token in logprobs.content:
        found = [each.logprob for each in token.top_logprobs]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        assert token.top_logprobs[0].token == token.token, "it is greedy"
    assert chat(client).choices[0].logprobs is None


def test_a_stream_has_its_log_probabilities_too(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="small", messages=asking("hello"), temperature=0, max_tokens=8, logprobs=True
    ) as stream:
        final = stream.get_final_completion()
    logprobs = final.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    joined = "".join(token.token for token in logprobs.content)
    assert joined.strip() == (final.choices[0].message.content or "").strip()


def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI) -> None:
    whole = said(chat(client, max_tokens=40))
    word = whole.split()[-1]
    answer = chat(client, max_tokens=40, stop=[word, "never said"])
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_number_of_tokens_is_limited(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=2, extra_body={"min_tokens": 2})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].finish_reason == "length"


class Shape(BaseModel):
    # The small model likes white space, of which JSON may have any amount; llguidance takes it out.
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}}
    )

    color: Literal["red", "blue"]
    sides: Literal[3, 4]


def test_the_answer_follows_a_schema(client: openai.OpenAI) -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "shape", "schema": Shape.model_json_schema()},
    }
    answer = said(chat(client, response_format=wanted, max_tokens=40))
    Shape.model_validate_json(answer)


def test_the_client_parses_an_answer_into_a_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="small",
        messages=asking("a shape", data_url()),
        response_format=Shape,
        temperature=0,
        max_tokens=40,
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)


def test_a_conversation_goes_on_with_the_answer_as_it_came(client: openai.OpenAI) -> None:
    messages = asking("what color is it?", data_url())
    first = chat(client, messages=messages)
    messages += [first.choices[0].message.model_dump(), *asking("and the shape?")]
    assert said(chat(client, messages=messages))


def test_a_session_is_continued_by_visqs_own_fields(client: openai.OpenAI) -> None:
    first = chat(client, messages=asking("what?", data_url()), extra_body={"session": {}})
    assert first.model_extra is not None
    session = first.model_extra["session_id"]
    second = chat(client, "and now?", extra_body={"session_id": session})
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_errors_are_the_clients_own(client: openai.OpenAI, deployment: Deployment) -> None:
    with pytest.raises(openai.AuthenticationError) as unknown:
        chat(client.with_options(api_key="wrong"))
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=asking("hello"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, "red " * 5000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as image:
        chat(client, messages=asking("what?", "s3://photos/none.png"))
    assert image.value.code == "image_not_found"
    with pytest.raises(openai.BadRequestError) as tools:
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (tools.value.code, tools.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.BadRequestError) as format_:
        chat(client, response_format={"type": "regex_schema", "regex_schema": "("})
    assert format_.value.param == "response_format"


def test_an_error_that_comes_later_ends_the_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="small",
        messages=asking("hello"),
        stream=True,
        extra_body={**LONG, "expires_in": 1.5},
    )
    with pytest.raises(openai.APIError) as late:
        list(stream)
    assert late.value.code == "job_expired"


def test_a_stream_that_is_closed_cancels_its_job(
    client: openai.OpenAI, deployment: Deployment
) -> None:
    stream = client.chat.completions.create(
        model="small", messages=asking("hello"), stream=True, extra_body=LONG
    )
    next(iter(stream))
    job_id = stream.response.headers["x-request-id"]
    assert status_of(deployment, job_id) == "running"
    stream.close()
    until(lambda: status_of(deployment, job_id) == "cancelled", 10, "the cancel")


def test_a_client_that_loses_its_patience_cancels_its_job(
    client: openai.OpenAI, deployment: Deployment
) -> None:
    with pytest.raises(openai.APITimeoutError):
        chat(
            client.with_options(timeout=0.5, max_retries=0),
            max_tokens=None,
            metadata={"test": "patience"},
            extra_body=LONG,
        )
    jobs = httpx2.get(
        f"{deployment.url}/v1/jobs?limit=1", headers={"Authorization": f"Bearer {API_KEY}"}
    )
    [job] = jobs.json()["data"]
    assert job["metadata"] == {"test": "patience"}
    until(lambda: status_of(deployment, job["id"]) == "cancelled", 10, "the cancel")


async def test_the_async_client_chats_and_streams(deployment: Deployment) -> None:
    async with openai.AsyncOpenAI(base_url=f"{deployment.url}/v1", api_key=API_KEY) as client:
        given: dict[str, Any] = {
            "model": "small",
            "messages": asking("what color is it?", data_url()),
            "temperature": 0,
            "max_tokens": 16,
        }
        whole = await client.chat.completions.create(**given)
        stream = await client.chat.completions.create(**given, stream=True)
        pieces = [c.delta.content or "" async for chunk in stream for c in chunk.choices]
        assert "".join(pieces) == said(whole)
        assert [model.id async for model in client.models.list()] == ["small"]


def test_langchain_invokes_and_streams_with_an_image(deployment: Deployment) -> None:
    model = ChatOpenAI(
        model="small",
        base_url=f"{deployment.url}/v1",
        api_key=API_KEY,
        temperature=0,
        max_tokens=16,
    )
    message = HumanMessage(content=asking("what color is it?", data_url())[0]["content"])
    whole = model.invoke([message])
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_tokens"] > 0
    pieces = list(model.stream([message], stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert any(piece.usage_metadata for piece in pieces)


def test_the_program_of_the_documentation_runs(
    deployment: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"<!-- chat -->\n```python\n(.*?)^```", DOC.read_text(), re.M | re.S)
    assert found
    uri = "s3://pictures/shapes.png"
    open_store(Settings(data=deployment.folder)).put(parse_uri(uri), png(), "image/png")
    program = found[1].replace("http://127.0.0.1:8710", deployment.url)
    exec(program.replace("your key of visq", API_KEY), {})
    assert capsys.readouterr().out.strip()
