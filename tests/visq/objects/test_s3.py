"""The S3 store: versions and buckets on moto; faults on an HTTP server that has them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.servers import S3Endpoint
from tests.visq.objects.reading import LIMIT, fetched, s3_settings
from visq.errors import (
    ConfigurationError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    Unavailable,
)
from visq.objects import ObjectRef, ObjectStore, open_store, parse_uri, s3_calls
from visq.settings import Settings

SECRET = "a-secret-that-no-message-may-hold"


def test_a_version_is_read_by_its_id(s3: S3Endpoint, s3_store: ObjectStore, bucket: str) -> None:
    client = s3.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = client.put_object(Bucket=bucket, Key="a", Body=b"one")["VersionId"]
    client.put_object(Bucket=bucket, Key="a", Body=b"two")
    assert fetched(s3_store, ObjectRef(bucket, "a", first)).data == b"one"
    assert fetched(s3_store, ObjectRef(bucket, "a")).data == b"two"
    with pytest.raises(ImageNotFound):
        s3_store.get(ObjectRef(bucket, "a", "no-such-version"), max_bytes=LIMIT)
    marker = client.delete_object(Bucket=bucket, Key="a")["VersionId"]
    with pytest.raises(ImageNotFound):
        s3_store.get(ObjectRef(bucket, "a"), max_bytes=LIMIT)
    with pytest.raises(ImageNotFound):
        s3_store.get(ObjectRef(bucket, "a", marker), max_bytes=LIMIT)


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_the_first_upload_makes_the_bucket_however_many_come_at_once(
    s3: S3Endpoint, region: str
) -> None:
    bucket = f"uploads-{uuid.uuid4().hex}"
    store = open_store(s3_settings(s3, upload_bucket=bucket, s3_region=region))
    refs = [ObjectRef(bucket, f"ann/{number}") for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda ref: store.put(ref, b"x", "image/png"), refs))
    assert all(fetched(store, ref).data == b"x" for ref in refs)
    store.close()


def test_only_the_upload_bucket_is_made(s3_store: ObjectStore) -> None:
    with pytest.raises(Unavailable, match="NoSuchBucket"):
        s3_store.put(parse_uri("s3://someone-elses/a"), b"x", "image/png")


def test_half_a_pair_of_credentials_is_a_configuration_error(s3: S3Endpoint) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_S3_SECRET_ACCESS_KEY"):
        open_store(s3_settings(s3, s3_secret_access_key=None))


# --- an S3 server with faults ------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], None]


class FaultyServer:
    """A real HTTP server whose answers a test sets; counts the requests."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests = 0
        self.released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests += 1
                owner.answers[min(owner.requests, len(owner.answers)) - 1](self)
                self.close_connection = True

            do_HEAD = do_PUT = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: tests print enough."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def store(self) -> ObjectStore:
        return open_store(
            Settings(
                object_store="s3",
                s3_endpoint_url=f"http://127.0.0.1:{self.server.server_port}",
                s3_access_key_id="an-access-key",
                s3_secret_access_key=SECRET,
                fetch_timeout_seconds=0.5,
            )
        )

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(s3_calls, "_BACKOFF_SECONDS", 0.01)
    server = FaultyServer()
    yield server
    server.close()


def body(data: bytes, *, announced: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", '"1"')
        handler.send_header("Content-Length", str(len(data) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def without_length(data: bytes) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def error(status: int, code: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        text = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(text)

    return answer


def silence(server: FaultyServer, before: bytes | None) -> Answer:
    """Say nothing more, after `before` of a longer body or at once."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if before is not None:
            body(before, announced=len(before) + 1)(handler)
            handler.wfile.flush()
        server.released.wait(60)

    return answer


REF = parse_uri("s3://pictures/cat.jpg")


def test_a_body_cut_off_once_is_read_again(faulty: FaultyServer) -> None:
    faulty.answers = [body(b"half", announced=8), body(b"all of it")]
    assert fetched(faulty.store(), REF).data == b"all of it"
    assert faulty.requests == 2


def test_a_body_that_is_always_cut_off_is_a_failed_fetch_and_never_a_short_image(
    faulty: FaultyServer,
) -> None:
    faulty.answers = [body(b"half", announced=8)]
    with pytest.raises(ImageFetchFailed, match=r"s3://pictures/cat\.jpg") as raised:
        faulty.store().get(REF, max_bytes=LIMIT)
    assert raised.value.retryable
    assert faulty.requests == 4, "tries of ours and of boto3 must not multiply"


def test_the_limit_holds_when_the_server_announces_no_length(faulty: FaultyServer) -> None:
    faulty.answers = [without_length(bytes(3_000_000))]
    with pytest.raises(ImageTooLarge):
        faulty.store().get(REF, max_bytes=LIMIT)


def test_an_announced_length_over_the_limit_is_refused_unread(faulty: FaultyServer) -> None:
    faulty.answers = [silence(faulty, bytes(LIMIT))]  # LIMIT + 1 announced, and never sent
    with pytest.raises(ImageTooLarge):
        faulty.store().get(REF, max_bytes=LIMIT)


@pytest.mark.parametrize("before", [None, b"half"])
def test_a_silent_server_is_a_failed_fetch(faulty: FaultyServer, before: bytes | None) -> None:
    faulty.answers = [silence(faulty, before)]
    with pytest.raises(ImageFetchFailed, match=r"s3://pictures/cat\.jpg"):
        faulty.store().get(REF, max_bytes=LIMIT)


def test_a_server_error_is_tried_again(faulty: FaultyServer) -> None:
    faulty.answers = [error(503, "SlowDown"), error(500, "InternalError"), body(b"all of it")]
    assert fetched(faulty.store(), REF).data == b"all of it"


def test_a_server_that_keeps_failing_is_a_failed_fetch(faulty: FaultyServer) -> None:
    faulty.answers = [error(500, "InternalError")]
    with pytest.raises(ImageFetchFailed, match="InternalError"):
        faulty.store().get(REF, max_bytes=LIMIT)
    assert faulty.requests == 4
    with pytest.raises(Unavailable, match="InternalError"):
        faulty.store().put(REF, b"x", "image/png")
    assert faulty.requests == 8


@pytest.mark.parametrize("text", [b"", b"<html>no gateway</html>", b"\xff\0<<<"])
def test_an_error_that_is_not_of_s3_is_a_failed_fetch(faulty: FaultyServer, text: bytes) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(502)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    faulty.answers = [answer]
    with pytest.raises(ImageFetchFailed):
        faulty.store().get(REF, max_bytes=LIMIT)


def test_what_is_no_http_is_a_failed_fetch(faulty: FaultyServer) -> None:
    faulty.answers = [lambda handler: handler.wfile.write(b"220 mail.example.com ESMTP\r\n")]
    with pytest.raises(ImageFetchFailed):
        faulty.store().get(REF, max_bytes=LIMIT)


def test_a_dead_server_is_a_failed_fetch_and_unavailable(faulty: FaultyServer) -> None:
    store = faulty.store()
    faulty.close()
    with pytest.raises(ImageFetchFailed):
        store.get(REF, max_bytes=LIMIT)
    with pytest.raises(Unavailable):
        store.put(REF, b"x", "image/png")
    with pytest.raises(Unavailable):
        store.ping()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_forbidden_at_once_and_tells_no_secret(
    faulty: FaultyServer, status: int
) -> None:
    faulty.answers = [error(status, "AccessDenied")]
    store = faulty.store()
    with pytest.raises(ImageForbidden, match=r"s3://pictures/cat\.jpg") as raised:
        store.get(REF, max_bytes=LIMIT)
    assert faulty.requests == 1
    assert SECRET not in str(raised.value)
    with pytest.raises(ImageForbidden):
        store.put(REF, b"x", "image/png")
    with pytest.raises(Unavailable):
        store.ping()
