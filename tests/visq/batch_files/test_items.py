"""Lines as items: each wrong one is named, and nothing else than `ItemError` comes of any line."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visq.batch_files.items import ItemError, item_of
from visq.batch_files.lines import Line
from visq.errors import (
    InvalidRequest,
    LineTooLong,
    MalformedBody,
    ModelNotFound,
    UnsupportedParameter,
)
from visq.types import BatchItem, NewSession

SESSION = "ses_" + "0" * 32


def native(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "prompt": "hello"} | fields


def openai(body: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    asked = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    return {**line, "body": asked | (body or {}), **fields}


def as_line(value: object) -> Line:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Line(7, 100, data)


def read(value: object, models: Collection[str] | None = None) -> BatchItem:
    return item_of(as_line(value), models=models)


def refused(value: object, models: Collection[str] | None = None) -> ItemError:
    line = value if isinstance(value, Line) else as_line(value)
    with pytest.raises(ItemError) as caught:
        item_of(line, models=models)
    assert caught.value.error.message.startswith("line 7: ")
    return caught.value


def test_a_line_of_visq_is_an_item_as_in_a_request() -> None:
    fields = native(images=["s3://bucket/a.png"], gen_config={"n": 2}, metadata={"k": "v"})
    item = read(fields)
    assert item == BatchItem.model_validate(fields)
    assert item.model_fields_set == fields.keys()


def test_a_line_of_openai_is_an_item() -> None:
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "https://host.example/a.png"}},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 5,
        "metadata": {"k": "v"},
    }
    item = read(openai(body))
    assert item.custom_id == "a"
    assert item.messages is not None
    assert [part.type for part in item.messages[0].parts()] == ["text", "image_url"]
    assert item.gen_config.max_new_tokens == 5
    assert item.metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        (openai({"session_id": SESSION}), "session_id", SESSION),
        (openai({"session": {}}), "session", NewSession()),
        (openai(after="b"), "after", "b"),
        (native(after="b"), "after", "b"),
        (openai({"stream": False}), "session", None),
        (openai({"stream": None, "lane": None}), "session", None),
        (native(custom_id="x" * 128), "custom_id", "x" * 128),
        (openai(custom_id="x" * 128), "custom_id", "x" * 128),
    ],
)
def test_fields_that_both_forms_have(line: object, field: str, value: object) -> None:
    assert getattr(read(line), field) == value


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"hello", "it is not JSON: Expecting value at line 1, column 1"),
        (b'{"custom_id": "a", "prompt": "x"', "it is not JSON"),
        (b'{"custom_id": "a", "prompt": "x"} {}', "Extra data"),
        (b"{'custom_id': 'a'}", "it is not JSON"),
        (b'{"custom_id": "a", "prompt": "caf\xe9"}', "it is not UTF-8 at byte 33"),
        ('{"custom_id": "a", "prompt": "x"}'.encode("utf-16"), "it is not UTF-8 at byte 0"),
        (b'{"custom_id": "a", "prompt": "x", "gen_config": {"top_p": NaN}}', "it has no NaN"),
        (b'{"custom_id": "a", "gen_config": {"top_p": -Infinity}}', "it has no -Infinity"),
        (b'{"custom_id": "a", "prompt": "\0"}', "it is not JSON: Invalid control character"),
        (b"[" * 100_000, "nested too deeply"),
        (
            b'{"custom_id": "a", "gen_config": ' + b"[" * 500 + b"]" * 500 + b"}",
            "recursion limit exceeded",
        ),
    ],
)
def test_what_is_no_json(data: bytes, said: str) -> None:
    error = refused(data)
    assert isinstance(error.error, MalformedBody)
    assert said in error.error.message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[]", "it is not a JSON object"),
        (b"null", "it is not a JSON object"),
        (b'"text"', "it is not a JSON object"),
        (b'{"custom_id": "a", "prompt": "\\u0000"}', "U+0000"),
        (b'{"custom_id": "a", "prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"custom_id": "\\udc00", "prompt": "x"}', "half of a surrogate pair"),
        (b'{"custom_id": "a", "prompt": "x", "gen_config": {"top_p": 1e999}}', "too large"),
        (
            b'{"custom_id": "a", "prompt": "x", "gen_config": {"n": 99999999999999999999}}',
            "64 bits",
        ),
    ],
)
def test_what_cannot_be_stored(data: bytes, said: str) -> None:
    error = refused(data)
    assert type(error.error) is InvalidRequest
    assert said in error.error.message


@pytest.mark.parametrize(
    ("line", "param", "custom_id"),
    [
        ({"prompt": "x"}, "custom_id", None),
        (native(custom_id=None), "custom_id", None),
        (native(custom_id=5), "custom_id", None),
        (native(custom_id=""), "custom_id", None),
        (native(custom_id="x" * 129), "custom_id", None),
        (openai(custom_id="x" * 129), "custom_id", None),
        ({"custom_id": "a"}, None, "a"),
        (native(promt="x"), "promt", "a"),
        (native(images="s3://bucket/a.png"), "images", "a"),
        (native(gen_config={"n": "2"}), "gen_config.n", "a"),
        (native(lane="batch"), "lane", "a"),
        (native(session_id="a", after="b"), "session_id", "a"),
        (openai(method="GET"), "method", "a"),
        (openai(url="/v1/embeddings"), "url", "a"),
        (openai(prompt="x"), "prompt", "a"),
        (openai(id="x"), "id", "a"),
        (openai({"stream": True}), "body.stream", "a"),
        (openai({"lane": "interactive"}), "body.lane", "a"),
        (openai({"expires_in": 5}), "body.expires_in", "a"),
        (openai({"temprature": 1}), "body.temprature", "a"),
        (openai({"temperature": 3}), "body.temperature", "a"),
        (openai({"messages": []}), "body.messages", "a"),
        (openai({"messages": [{"role": "assistant", "content": "x"}]}), "body.messages", "a"),
        (openai({"messages": [{"role": "user"}]}), "body.messages.0.content", "a"),
        (openai({"top_logprobs": 3}), "body.top_logprobs", "a"),
        (openai({"session_id": SESSION, "session": {}}), "body", "a"),
        (openai({"session_id": SESSION}, after="b"), "body", "a"),
        (openai({"session": {}}, after="b"), "body", "a"),
        (openai(body=None) | {"body": None}, "body", "a"),
        (openai(body=None) | {"body": "{}"}, "body", "a"),
    ],
)
def test_what_is_wrong_is_named_and_whose_it_is(
    line: object, param: str | None, custom_id: str | None
) -> None:
    error = refused(line)
    assert isinstance(error.error, InvalidRequest)
    assert (error.error.param, error.custom_id) == (param, custom_id)


def test_of_two_sessions_none_is_chosen() -> None:
    fields = native(session_id=SESSION, session={})
    assert "give one of `session_id`, `session` and `after`" in refused(fields).error.message


@pytest.mark.parametrize(
    "line",
    [
        native(gen_config={"output_logits": "all"}),
        openai({"tools": [{"type": "function"}]}),
        openai({"messages": [{"role": "tool", "content": "x"}]}),
    ],
)
def test_what_is_known_and_not_supported(line: object) -> None:
    error = refused(line)
    assert type(error.error) is UnsupportedParameter
    assert error.error.param is not None
    assert error.custom_id == "a"


def test_a_model_that_nobody_serves_is_an_error_of_its_item() -> None:
    error = refused(openai(), models=["one", "two"])
    assert type(error.error) is ModelNotFound
    assert "'small'" in error.error.message
    assert "served: `one`, `two`" in error.error.message
    assert (error.error.param, error.custom_id) == ("body.model", "a")


@pytest.mark.parametrize("models", [None, [], ["small", "other"]])
def test_a_model_is_served_or_nobody_knows(models: Collection[str] | None) -> None:
    assert read(openai(), models).custom_id == "a"


def test_a_line_that_is_too_long_is_an_error_of_its_item() -> None:
    error = refused(Line(7, 100, None))
    assert type(error.error) is LineTooLong
    assert error.custom_id is None


def test_a_fault_that_the_reader_found_is_the_error_of_the_item() -> None:
    error = refused(Line(7, 100, b'{"custom_id": "a"}', "images: not a finite number"))
    assert type(error.error) is InvalidRequest
    assert error.error.message == "line 7: images: not a finite number"
    assert error.custom_id == "a"


NAMES = ["body", "url", "method", "role", "content", "type", "text", "model", "image_url"]
TEXTS = ["user", "a", "POST", "/v1/chat/completions", SESSION, "s3://bucket/key", "\ud800"]
WORDS = st.sampled_from([*BatchItem.model_fields, *NAMES, *TEXTS])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
BODY = ["model", "messages", "n", "stop", "session", "session_id", "response_format", "logprobs"]


@settings(deadline=None)
@given(
    whole=st.sampled_from([native(), openai()]),
    changes=st.dictionaries(WORDS, VALUES, max_size=3),
    body=st.dictionaries(st.sampled_from(BODY) | WORDS, VALUES, max_size=3),
)
def test_of_any_object_comes_an_item_or_an_item_error(
    whole: dict[str, Any], changes: dict[str, Any], body: dict[str, Any]
) -> None:
    line = whole | changes
    if isinstance(line.get("body"), dict):
        line["body"] = line["body"] | body
    read_or_refused(json.dumps(line).encode())


@settings(deadline=None)
@given(data=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_of_any_bytes_comes_an_item_or_an_item_error(data: bytes) -> None:
    read_or_refused(data)


def read_or_refused(data: bytes) -> None:
    said = None
    try:
        item_of(as_line(data))
    except ItemError as error:
        said = error.error.message
    assert said is None or said.startswith("line 7: ")
