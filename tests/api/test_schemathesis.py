"""The API keeps what its OpenAPI says, for whatever schemathesis thinks of."""

from __future__ import annotations

import re

import pytest
import schemathesis
import schemathesis.openapi
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error, positive_data_acceptance

from api.main import create_app
from tests.api.conftest import fresh_secret
from tests.api.running import PlayedWorker, RunningApi
from tests.api.test_jobs import submit
from visq.settings import Settings

EXAMPLES = 3
"""Random requests for each operation, beside those that schemathesis derives by rule."""

schema = schemathesis.openapi.from_dict(create_app(Settings(api_keys="a:b")).openapi())


@pytest.fixture(scope="module")
def key() -> str:
    return fresh_secret()


@pytest.fixture
def things(api: RunningApi, key: str) -> dict[str, str]:
    """One of each thing that a path can name; random ids find nothing."""
    worker = PlayedWorker(api.settings)
    with api.client(key) as client:
        job = submit(client, session={})
        batch = client.post(
            "/v1/batches", json={"items": [{"custom_id": "a", "prompt": "x"}]}
        ).json()
        [item] = client.get("/v1/jobs", params={"batch_id": batch["id"]}).json()["data"]
        form = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
        file = client.post("/v1/files", **form).json()
    for job_id in (job["id"], item["id"]):  # or their event streams would have no end
        worker.answer(job_id)
    worker.close()
    return {
        "job_id": job["id"],
        "session_id": job["session_id"],
        "batch_id": batch["id"],
        "file_id": file["id"],
    }


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_documented(
    case: schemathesis.Case, api: RunningApi, key: str, things: dict[str, str]
) -> None:
    for name, value in case.path_parameters.items():
        # Every other id that is one becomes that of something that exists.
        if re.fullmatch("[a-z]{3}_[0-9a-f]{31}[02468ace]", str(value)):
            case.path_parameters[name] = things[name]
    if "Prefer" in case.headers:
        case.headers["Prefer"] = "wait=0"  # nobody works here: the example would wait in vain
    if case.operation.path == "/v1/chat/completions" and isinstance(case.body, dict):
        seconds = case.body.get("expires_in")
        if seconds is None or isinstance(seconds, int | float):
            case.body["expires_in"] = min(seconds or 0.01, 0.01)  # for the same reason
    # What only our own validators know (`messages` or `prompt`, never both) is in no schema, so a
    # body that fits the schema may be refused.
    excluded = [positive_data_acceptance]
    response = case.call(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
    if response.status_code == 504:  # the chat has expired: nothing went wrong on the server
        excluded.append(not_a_server_error)
    case.validate_response(response, excluded_checks=excluded)
