"""What the tests of the stores share."""

from __future__ import annotations

from tests.servers import S3Endpoint
from visq.objects import FetchedObject, ObjectRef, ObjectStore
from visq.settings import Settings

LIMIT = 1_000_000


def s3_settings(s3: S3Endpoint, **changes: object) -> Settings:
    return Settings.model_validate(
        {
            "object_store": "s3",
            "s3_endpoint_url": s3.url,
            "s3_region": s3.region,
            "s3_access_key_id": s3.access_key,
            "s3_secret_access_key": s3.secret_key,
            "fetch_timeout_seconds": 10,
            **changes,
        }
    )


def fetched(store: ObjectStore, ref: ObjectRef) -> FetchedObject:
    answer = store.get(ref, max_bytes=LIMIT)
    assert isinstance(answer, FetchedObject)
    return answer
