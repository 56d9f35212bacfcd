"""Chat completion requests as the released client sends them, and what they ask of visq."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as theirs
from pydantic import ValidationError

from visq.errors import InvalidRequest, UnsupportedParameter
from visq.openai.messages import ChatMessage
from visq.openai.requests import MEANS_NOTHING, ChatCompletionRequest, Refused, to_job, to_prompt
from visq.types import MAX_INT64, ImagePart, ImageUrl, Lane, TextPart

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "small", "messages": HELLO} | fields
    return ChatCompletionRequest.model_validate_json(json.dumps(body), strict=True)


def test_without_fields_it_samples_at_temperature_1_until_the_context_is_full() -> None:
    config = to_prompt(parse()).gen_config
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 1.0, 1.0, 0)
    assert config.max_new_tokens is None


@pytest.mark.parametrize(
    ("given", "field", "wanted"),
    [
        ({"temperature": 0}, "do_sample", False),
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"max_tokens": 7}, "max_new_tokens", 7),
        ({"max_tokens": 7, "max_completion_tokens": 9}, "max_new_tokens", 9),
        ({"stop": "a"}, "stop_words", ["a"]),
        ({"stop": ["a", "b"]}, "stop_words", ["a", "b"]),
        ({"stop": []}, "stop_words", None),
        ({"seed": 5}, "random_seed", 5),
        ({"seed": -1}, "random_seed", MAX_INT64),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs", 3),
        ({"logprobs": False}, "logprobs", None),
        ({"n": 3}, "n", 3),
        ({"n": None}, "n", 1),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 4}, "top_k", 4),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"min_tokens": 2}, "min_new_tokens", 2),
        ({"response_format": {"type": "text"}}, "response_format", None),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            {"type": "json_object"},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
                }
            },
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        ),
    ],
)
def test_each_field_becomes_ours(given: dict[str, Any], field: str, wanted: object) -> None:
    assert getattr(to_prompt(parse(**given)).gen_config, field) == wanted


def test_messages_of_all_roles_with_text_and_images() -> None:
    said = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ann"},
        # As `message.model_dump()` of an answer gives it.
        {
            "role": "assistant",
            "content": "hello",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "s3://b/k", "detail": "high"}},
                {"type": "image_url", "image_url": "https://example.com/a.png"},
            ],
        },
    ]
    messages = to_prompt(parse(messages=said)).messages
    assert messages is not None
    assert [(each.role, each.content) for each in messages] == [
        ("system", "be brief"),
        ("user", [TextPart(text="hi")]),
        ("assistant", "hello"),
        (
            "user",
            [
                ImagePart(image_url=ImageUrl(url="s3://b/k")),
                ImagePart(image_url=ImageUrl(url="https://example.com/a.png")),
            ],
        ),
    ]


@pytest.mark.parametrize("field", sorted(Refused.model_fields))
def test_what_would_change_the_answer_is_refused_by_name(field: str) -> None:
    to_prompt(parse(**{field: None}))
    for value in MEANS_NOTHING.get(field, ()):
        to_prompt(parse(**{field: value}))
    with pytest.raises(UnsupportedParameter) as refusal:
        to_prompt(parse(**{field: [{"type": "function"}]}))
    assert refusal.value.param == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "5", "tool_call_id": "x"}, "messages.0.role"),
        ({"role": "function", "content": "5", "name": "f"}, "messages.0.role"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages.0.tool_calls"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages.0.audio"),
    ],
)
def test_messages_of_tools_are_unsupported(message: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        to_prompt(parse(messages=[message, *HELLO]))
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"session": {}, "session_id": f"ses_{'0' * 32}"}, "session"),
    ],
)
def test_contradictions_are_invalid_and_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        to_job(parse(**fields))
    assert refusal.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"temprature": 1},
        {"temperature": 2.5},
        {"top_logprobs": 21, "logprobs": True},
        {"n": 0},
        {"stop": ""},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"response_format": {"type": "rhymes"}},
        {"model": 5},
    ],
)
def test_what_does_not_fit_is_no_request(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parse(**fields)


def test_what_is_ignored_changes_nothing() -> None:
    ignored = {"user": "u", "store": True, "service_tier": "flex", "prompt_cache_key": "k"}
    assert to_job(parse(**ignored)) == to_job(parse())


def test_a_job_has_visqs_own_fields() -> None:
    job = to_job(
        parse(session={}, lane="standard", expires_in=5, metadata={"a": "b"}, adapter_name="x")
    )
    assert (job.lane, job.expires_in, job.metadata) == (Lane.STANDARD, 5, {"a": "b"})
    assert job.session is not None
    assert job.adapter_name == "x"
    assert to_job(parse()).lane is Lane.INTERACTIVE


def test_every_field_of_the_released_client_is_known() -> None:
    names = theirs.CompletionCreateParamsBase.__annotations__
    assert set(names) - set(ChatCompletionRequest.model_fields) == set()


def test_an_answer_of_the_released_client_can_be_sent_back() -> None:
    assert set(ChatCompletionMessage.model_fields) - set(ChatMessage.model_fields) == set()
