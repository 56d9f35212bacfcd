"""A store of each kind, on a real S3 endpoint and on a folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import S3Endpoint
from tests.visq.objects.reading import s3_settings
from visq.objects import ObjectStore, open_store
from visq.settings import Settings


@pytest.fixture
def s3_store(s3: S3Endpoint) -> Iterator[ObjectStore]:
    store = open_store(s3_settings(s3, upload_bucket=f"uploads-{uuid.uuid4().hex}"))
    yield store
    store.close()


@pytest.fixture
def folder_store(tmp_path: Path) -> ObjectStore:
    return open_store(Settings(object_store=(tmp_path / "a folder").as_uri()))


@pytest.fixture(params=["s3", "folder"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found
