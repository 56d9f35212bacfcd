"""The API keeps what its OpenAPI says, for whatever schemathesis thinks of."""

from __future__ import annotations

import pytest
import schemathesis
import schemathesis.openapi
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import positive_data_acceptance

from api.main import create_app
from tests.api.conftest import fresh_secret
from tests.api.running import RunningApi
from visq.settings import Settings

EXAMPLES = 20
"""Random requests for each operation, beside those that schemathesis derives by rule."""

schema = schemathesis.openapi.from_dict(create_app(Settings(api_keys="a:b")).openapi())


@pytest.fixture(scope="module")
def key() -> str:
    return fresh_secret()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_documented(case: schemathesis.Case, api: RunningApi, key: str) -> None:
    case.call_and_validate(
        base_url=api.url,
        headers={"Authorization": f"Bearer {key}"},
        # What only our own validators know (`messages` or `prompt`, never both) is in no schema,
        # so a body that fits the schema may be refused.
        excluded_checks=[positive_data_acceptance],
        timeout=30,
    )
