"""Large objects of an S3 store that breaks off, falls silent, or says no."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.faults.store import (
    Answer,
    LyingStore,
    Refuse,
    Reset,
    Shorten,
    Silence,
    Slow,
    Truncate,
    Unheard,
)
from tests.servers import S3Endpoint
from tests.visq.objects.reading import s3_settings
from visq.errors import ObjectForbidden, ObjectNotFound, Unavailable
from visq.objects import ObjectRef, ObjectStore, open_store
from visq.objects.s3_reading import READ_BYTES
from visq.objects.s3_writing import PART_BYTES

DATA = bytes(range(256)) * ((PART_BYTES + READ_BYTES) // 256)
"""Three ranges to read, two parts to write."""
TOTAL = 3.0
"""Seconds that one range or part may take."""

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def lying(s3: S3Endpoint) -> Iterator[LyingStore]:
    with LyingStore(s3) as lying:
        yield lying


@pytest.fixture
def store(
    s3: S3Endpoint, lying: LyingStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectStore]:
    """A store behind the liar, which tells the truth until the test says otherwise."""
    monkeypatch.setattr("visq.objects.s3_calls._BACKOFF_SECONDS", 0.01)
    store = open_store(
        s3_settings(
            s3, s3_endpoint_url=lying.url, fetch_timeout_seconds=1, fetch_total_seconds=TOTAL
        )
    )
    yield store
    lying.heal()
    store.close()


@pytest.fixture
def ref(bucket: str) -> ObjectRef:
    return ObjectRef(bucket, "large")


@pytest.fixture
def name(ref: ObjectRef) -> str:
    """As the liar knows it."""
    return f"{ref.bucket}/{ref.key}"


@pytest.fixture
def written(s3: S3Endpoint, ref: ObjectRef) -> ObjectRef:
    s3.client().put_object(Bucket=ref.bucket, Key=ref.key, Body=DATA)
    return ref


def read(store: ObjectStore, ref: ObjectRef) -> bytes:
    with store.open(ref) as file:
        return b"".join(iter(lambda: file.read(1_000_000), b""))


def write(store: ObjectStore, ref: ObjectRef) -> None:
    with store.write(ref, "text/plain") as file:
        file.write(DATA)


def unfinished(s3: S3Endpoint, ref: ObjectRef) -> int:
    return len(s3.client().list_multipart_uploads(Bucket=ref.bucket).get("Uploads", []))


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Truncate(0.5), Reset(0.9), Reset(), Refuse(503, "SlowDown"), Slow(first_byte=1.5)],
    ids=repr,
)
def test_a_range_that_breaks_off_is_read_again(
    lying: LyingStore, store: ObjectStore, written: ObjectRef, name: str, fault: object
) -> None:
    with store.open(written) as file:
        assert file.read(10) == DATA[:10]
        lying.lie(fault, name, times=1)  # type: ignore[arg-type]
        assert file.read() == DATA[10:]
    assert lying.count(name) == 4


@pytest.mark.parametrize(
    "fault",
    [
        *(Truncate(0.5), Reset(), Refuse(500, "InternalError"), Silence()),
        *(Shorten(), Slow(between=0.5, piece=100_000), Slow(between=0.5, headers=True)),
    ],
    ids=repr,
)
def test_a_store_that_does_not_recover_is_unavailable_and_never_the_end_of_the_object(
    lying: LyingStore, store: ObjectStore, written: ObjectRef, name: str, fault: object
) -> None:
    with store.open(written) as file:
        assert file.read(10) == DATA[:10]
        lying.lie(fault, name)  # type: ignore[arg-type]
        assert len(file.read(READ_BYTES - 10)) == READ_BYTES - 10
        with pytest.raises(Unavailable, match=str(written)) as raised:
            file.read(10)
        assert raised.value.retryable
        lying.heal()
        assert file.read() == DATA[READ_BYTES:], "what failed can be read when the store is back"


@dataclass(frozen=True)
class Whole:
    """The whole object, whatever range was asked for."""

    def __call__(self, answer: Answer) -> None:
        answer.status, answer.body = 200, DATA
        answer.headers.pop("Content-Range", None)
        answer.pass_on()


def test_a_store_that_does_not_know_ranges_is_not_misunderstood(
    lying: LyingStore, store: ObjectStore, written: ObjectRef, name: str
) -> None:
    lying.lie(Whole(), name)
    with store.open(written) as file, pytest.raises(Unavailable, match="another part"):
        file.read()


@pytest.mark.parametrize("deleted", [True, False])
def test_an_object_that_goes_away_while_it_is_read_is_no_end(
    s3: S3Endpoint, lying: LyingStore, store: ObjectStore, written: ObjectRef, deleted: bool
) -> None:
    with store.open(written) as file:
        assert file.read(10) == DATA[:10]
        if deleted:
            s3.client().delete_object(Bucket=written.bucket, Key=written.key)
        else:
            lying.lie(Refuse(403, "AccessDenied"), f"{written.bucket}/")
        with pytest.raises(ObjectNotFound if deleted else ObjectForbidden):
            file.read()


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("fault", [Reset(), Refuse(503, "SlowDown")], ids=repr)
def test_a_request_whose_answer_is_lost_is_made_again(
    lying: LyingStore, store: ObjectStore, ref: ObjectRef, name: str, fault: object, method: str
) -> None:
    lying.lie(fault, name, times=2, method=method)  # type: ignore[arg-type]
    write(store, ref)
    assert read(store, ref) == DATA


@pytest.mark.parametrize("fault", [Reset(), Refuse(503, "SlowDown")], ids=repr)
def test_a_completion_whose_answer_is_lost_is_none_the_less_one(
    s3: S3Endpoint,
    lying: LyingStore,
    store: ObjectStore,
    ref: ObjectRef,
    name: str,
    fault: object,
) -> None:
    with store.write(ref, "text/plain") as file:
        file.write(DATA)
        lying.lie(fault, name, times=1, method="POST")  # type: ignore[arg-type]
        # (Some stores have forgotten the upload by then; moto has not.)
        lying.lie(Refuse(404, "NoSuchUpload"), name, times=1, method="POST")
    assert read(store, ref) == DATA
    assert unfinished(s3, ref) == 0


def test_an_upload_that_somebody_else_aborted_is_no_success(
    s3: S3Endpoint, store: ObjectStore, written: ObjectRef
) -> None:
    [upload, client] = [store.write(written, "text/plain"), s3.client()]
    file = upload.__enter__()
    file.write(DATA)
    [found] = client.list_multipart_uploads(Bucket=written.bucket)["Uploads"]
    client.abort_multipart_upload(
        Bucket=written.bucket, Key=written.key, UploadId=found["UploadId"]
    )
    with pytest.raises(Unavailable):
        upload.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Refuse(500, "InternalError"), Unavailable),
        (Reset(), Unavailable),
        (Silence(), Unavailable),
        (Refuse(403, "AccessDenied"), ObjectForbidden),
    ],
    ids=repr,
)
@pytest.mark.parametrize("size", [10, len(DATA)])
def test_a_store_that_takes_no_part_gets_no_object(
    s3: S3Endpoint,
    lying: LyingStore,
    store: ObjectStore,
    ref: ObjectRef,
    name: str,
    fault: object,
    error: type[Exception],
    size: int,
) -> None:
    lying.lie(fault, name, method="PUT")  # type: ignore[arg-type]
    with pytest.raises(error, match=str(ref)), store.write(ref, "text/plain") as file:
        file.write(DATA[:size])
    assert unfinished(s3, ref) == 0


def test_an_upload_that_cannot_even_be_aborted_does_not_appear_later(
    s3: S3Endpoint, lying: LyingStore, store: ObjectStore, ref: ObjectRef, name: str
) -> None:
    lying.lie(Unheard(), name, method="DELETE")
    with pytest.raises(ZeroDivisionError), store.write(ref, "text/plain") as file:  # noqa: PT012
        file.write(DATA)
        _ = 1 / 0
    del file
    gc.collect()
    assert unfinished(s3, ref) == 1
    with pytest.raises(ObjectNotFound):
        store.stat(ref)


def test_a_store_that_is_gone_is_unavailable(s3: S3Endpoint, ref: ObjectRef) -> None:
    with LyingStore(s3) as lying:
        settings = s3_settings(s3, s3_endpoint_url=lying.url, fetch_total_seconds=1)
    store = open_store(settings)
    for use in (
        lambda: store.open(ref),
        lambda: store.stat(ref),
        lambda: store.delete(ref),
        lambda: write(store, ref),
        lambda: list(store.list(ref.bucket, "")),
    ):
        with pytest.raises(Unavailable):
            use()
    store.close()
