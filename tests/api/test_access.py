"""Keys and tenants: who gets in, and what exists for whom."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from api import examples
from api.main import create_app
from api.routes.models import MODELS
from tests.api.running import RunningApi
from tests.api.test_images import upload
from tests.api.test_jobs import submit
from visq.settings import Settings
from visq.types import (
    BatchView,
    ImageView,
    JobEventView,
    JobView,
    ModelView,
    Page,
    SessionView,
)

OPERATIONS = [
    (method.upper(), path)
    for path, operations in create_app(Settings(api_keys="a:b")).openapi()["paths"].items()
    for method in operations
]
GUARDED = [(method, path) for method, path in OPERATIONS if path.startswith("/v1/")]
OF_ONE_THING = [
    (method, path) for method, path in GUARDED if "{" in path and not path.startswith("/v1/models")
]
"""Models are everybody's."""


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", "Basic dTpw", "Bearer secret-0, Bearer secret-1", "é"],
)
def test_no_path_is_open_without_a_key(
    api: RunningApi, method: str, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    response = httpx2.request(method, api.url + filled(path, {}), headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json()["error"]["code"] in ("unauthorized", "invalid_api_key")


def filled(path: str, ids: dict[str, str]) -> str:
    zeros = {"job_id": "job_", "session_id": "ses_", "batch_id": "bat_", "file_id": "fil_"}
    return re.sub(r"{(\w+)}", lambda m: ids.get(m[1]) or zeros.get(m[1], "") + "0" * 32, path)


@pytest.fixture
def things(client: httpx2.Client) -> dict[str, str]:
    """One of each thing that a path can name, of the tenant of `client`."""
    job = submit(client, session={})
    batch = client.post("/v1/batches", json={"items": [{"custom_id": "a", "prompt": "x"}]}).json()
    form = {"purpose": "user_data"}
    file = client.post("/v1/files", data=form, files={"file": ("a.txt", b"a")}).json()
    return {
        "job_id": job["id"],
        "session_id": job["session_id"],
        "batch_id": batch["id"],
        "file_id": file["id"],
    }


@pytest.mark.parametrize(("method", "path"), OF_ONE_THING)
def test_another_tenants_things_are_not_found(
    client: httpx2.Client,
    stranger: httpx2.Client,
    things: dict[str, str],
    method: str,
    path: str,
) -> None:
    response = stranger.request(method, filled(path, things))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    # The answer is that of a thing that never was, but for the id.
    never = stranger.request(method, filled(path, {}))
    assert without_ids(never) == without_ids(response)
    # Nothing happened to it.
    assert client.get(f"/v1/jobs/{things['job_id']}").json()["status"] == "queued"
    assert client.get(f"/v1/sessions/{things['session_id']}").json()["turns"] == 1
    assert client.get(f"/v1/batches/{things['batch_id']}").json()["status"] == "in_progress"
    assert client.get(f"/v1/files/{things['file_id']}").status_code == 200


def without_ids(response: httpx2.Response) -> str:
    return re.sub(r"[a-z]{3}_[0-9a-f]{32}", "ID", response.text)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/sessions", "/v1/batches", "/v1/files"])
def test_lists_hold_the_tenants_own_things(
    stranger: httpx2.Client, client: httpx2.Client, things: dict[str, str], path: str
) -> None:
    assert client.get(path).json()["data"]
    assert stranger.get(path).json()["data"] == []


def test_filters_do_not_reach_across_tenants(
    stranger: httpx2.Client, things: dict[str, str]
) -> None:
    for name in ("session_id", "batch_id"):
        assert stranger.get("/v1/jobs", params={name: things[name]}).json()["data"] == []


def test_a_session_of_another_tenant_cannot_be_continued(
    stranger: httpx2.Client, things: dict[str, str]
) -> None:
    body = {"prompt": "x", "session_id": things["session_id"]}
    assert stranger.post("/v1/jobs", json=body).status_code == 404


def test_references_to_things_of_others_are_refused_in_bodies(
    client: httpx2.Client, stranger: httpx2.Client
) -> None:
    image = upload(client)
    for reference in (image["id"], image["uri"]):
        item: dict[str, Any] = {"custom_id": "a", "prompt": "x", "images": [reference]}
        assert stranger.post("/v1/batches", json={"items": [item]}).status_code == 400


# --- paths and methods ---------------------------------------------------------------------------


def test_an_unknown_path_is_an_error_of_the_same_shape(client: httpx2.Client) -> None:
    for path in ("/nowhere", "/v1/jobs/", "/v1"):
        response = client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"


def test_another_method_is_an_error_of_the_same_shape(client: httpx2.Client) -> None:
    response = client.put("/v1/jobs", json={})
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "POST"}
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_health_needs_no_key(api: RunningApi) -> None:
    assert httpx2.get(f"{api.url}/healthz").json() == {"status": "ok"}


@pytest.fixture
def document(api: RunningApi) -> dict[str, Any]:
    return httpx2.get(f"{api.url}/openapi.json").json()


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    names = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            names.add(operation["operationId"])
            assert operation["summary"], path
            assert operation["tags"], path
            if "requestBody" in operation and path not in ("/v1/images", "/v1/files"):
                content = operation["requestBody"]["content"]["application/json"]
                assert content["examples"], path
    assert len(names) == len(OPERATIONS)


def test_the_examples_are_valid(document: dict[str, Any], client: httpx2.Client) -> None:
    """What `/docs` offers can be sent; only the ids in it are of nothing."""
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody", {})
        content = body.get("content", {}).get("application/json")
        if content and "{" not in path:
            for name, example in content["examples"].items():
                value = example["value"]
                if path == "/v1/chat/completions":
                    value = {**value, "expires_in": 0.01}  # nobody works here: it would wait
                response = client.post(path, json=value)
                code = (response.json().get("error") or {}).get("code")
                expected = ("not_found", "image_not_found", "object_not_found", "job_expired")
                assert code in (None, *expected), (path, name, response.text)


@pytest.mark.parametrize(
    ("view", "example"),
    [
        (JobView, examples.JOB),
        (JobView, examples.WAITING_JOB),
        (JobView, examples.ENDED_JOB),
        (Page[JobEventView], examples.HISTORY),
        (SessionView, examples.SESSION),
        (BatchView, examples.BATCH),
        (ImageView, examples.IMAGE),
        (Page[ModelView], MODELS),
    ],
)
def test_the_examples_of_answers_are_complete(view: type[BaseModel], example: Any) -> None:
    shown = view.model_validate_json(json.dumps(example), extra="forbid").model_dump(mode="json")
    assert shown.keys() == example.keys()
