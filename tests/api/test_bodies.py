"""What a body may be: strict JSON, of a bounded size, of the right type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.api.conftest import settings_for
from tests.api.running import RunningApi
from visq.errors import InvalidRequest, MalformedBody
from visq.types import JobRequest
from visq.validation import parse

JSON = {"Content-Type": "application/json"}


def post(client: httpx2.Client, body: bytes | str, path: str = "/v1/jobs") -> httpx2.Response:
    return client.post(path, content=body, headers=JSON)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"prompt": "x"} trailing',
        b'{"prompt": NaN}',
        b'{"gen_config": {"top_p": Infinity}}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a\nb"}',
        '{"prompt": "x"}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"prompt": "x", "gen_config": {"response_format": '
        + b'{"a":' * 400
        + b"1"
        + b"}" * 400
        + b"}}",
    ],
)
def test_what_is_not_json_is_malformed(client: httpx2.Client, body: bytes) -> None:
    response = post(client, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "malformed_body"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("[]", None),
        ("null", None),
        ('"text"', None),
        ("{}", None),
        ('{"prompt": "x", "promt": "y"}', "promt"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt": "x", "gen_config": {"max_new_tokens": "5"}}', "gen_config.max_new_tokens"),
        ('{"prompt": "x", "gen_config": {"max_new_tokens": true}}', "gen_config.max_new_tokens"),
        ('{"prompt": "x", "gen_config": {"top_p": 2}}', "gen_config.top_p"),
        ('{"prompt": "x", "lane": "express"}', "lane"),
        ('{"prompt": "x", "expires_in": 0}', "expires_in"),
        ('{"prompt": "x", "metadata": {"a": 1}}', "metadata.a"),
        ('{"messages": [{"role": "user"}]}', "messages.0.content"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "messages.0.content.0.text",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "video"}]}]}',
            "messages.0.content.0",
        ),
        ('{"prompt": "x", "expires_in": 1e999}', None),
        ('{"prompt": "x", "expires_in": 123456789012345678901234567890}', None),
        (f'{{"prompt": "x", "expires_in": {"9" * 5000}}}', None),
        ('{"prompt": "a\\u0000b"}', None),
        ('{"prompt": "a\\ud800b"}', None),
        ('{"prompt": "x", "metadata": {"a\\u0000": "b"}}', None),
        ('{"prompt": "x", "gen_config": {"response_format": {"a": ["\\udfff"]}}}', None),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(
    client: httpx2.Client, body: str, param: str | None
) -> None:
    response = post(client, body)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["param"] == param
    assert len(error["message"]) < 300


def test_what_looks_like_a_forbidden_character_is_kept(client: httpx2.Client) -> None:
    text = "\\u0000 \\ud800 \U0001f600 \ue000 \x7f"
    response = client.post("/v1/jobs", json={"prompt": "x", "metadata": {"a": text}})
    assert response.json()["metadata"] == {"a": text}
    body = json.dumps({"prompt": "x", "metadata": {"a": "\U0001f600"}})
    assert "\\ud83d\\ude00" in body
    assert post(client, body).json()["metadata"] == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None]
)
def test_another_content_type_is_refused(client: httpx2.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post("/v1/jobs", content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.visq+json"]
)
def test_every_spelling_of_json_is_taken(client: httpx2.Client, kind: str) -> None:
    response = client.post("/v1/jobs", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert response.status_code == 202


@pytest.mark.parametrize(
    "path", ["/v1/jobs/{zero}", "/v1/jobs?cursor={zero}", "/v1/sessions/{zero}/messages"]
)
@pytest.mark.parametrize("character", ["%00", "%ED%A0%80", "%F0%9F%98%80", "%0A"])
def test_strange_characters_in_the_address_are_refused(
    client: httpx2.Client, path: str, character: str
) -> None:
    response = client.get(path.format(zero=f"job_{character}"))
    assert response.status_code == 422


# --- size --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_api(api: RunningApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    """An API that takes 10,000 bytes at most."""
    folder: Path = tmp_path_factory.mktemp("small")
    limits = {"max_body_bytes": 10_000, "max_upload_bytes": 10_000}
    settings = settings_for(api.settings.database, api.settings.redis, folder, **limits)
    with RunningApi(settings) as running:
        yield running


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/jobs", "application/json"),
        ("/v1/batches", "application/json"),
        ("/v1/sessions", "application/json"),
        ("/v1/images", "image/png"),
        ("/v1/images", "multipart/form-data; boundary=b"),
    ],
)
def test_too_large_a_body_is_refused_however_it_is_sent(
    small_api: RunningApi, secret: str, path: str, kind: str, chunked: bool
) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = (head if "form" in kind else b"") + b" " * 20_000

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    with small_api.client(secret) as client:
        response = client.post(
            path, content=chunks() if chunked else body, headers={"Content-Type": kind}
        )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


def test_a_data_url_with_too_large_an_image_is_refused(
    api: RunningApi, secret: str, tmp_path: Path
) -> None:
    settings = settings_for(
        api.settings.database, api.settings.redis, tmp_path, max_upload_bytes=100
    )
    with RunningApi(settings) as running, running.client(secret) as client:
        url = "data:image/png;base64," + "A" * 200
        response = client.post("/v1/jobs", json={"prompt": "?", "images": [url]})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "image_too_large"


# --- the parser itself -------------------------------------------------------------------------


def test_a_large_body_is_parsed_as_a_small_one(client: httpx2.Client) -> None:
    response = client.post("/v1/jobs", json={"prompt": "x" * 900_000})
    assert response.status_code == 202
    response = client.post("/v1/jobs", json={"prompt": "x" * 1_000_001})
    assert response.json()["error"]["param"] == "prompt"


def test_the_most_precise_problem_is_reported() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}], "x": 1}
    with pytest.raises(InvalidRequest) as caught:
        parse(JobRequest, json.dumps(body).encode())
    assert caught.value.param == "messages.0.content.0.text"


def test_the_position_of_broken_json_is_reported() -> None:
    with pytest.raises(MalformedBody, match="line 2, column 1"):
        parse(JobRequest, b'{"prompt": "x",\n}')
