"""The API and the answering worker of the client's tests, for its commands."""

from __future__ import annotations

from tests.visq.client.conftest import (  # noqa: F401  # fixtures
    answering,
    api,
    client,
    secret,
    worker,
)
