"""Object names, access, and the two stores, each against the real thing: moto, a folder, faults."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import S3Endpoint
from visq.errors import (
    ConfigurationError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    InvalidRequest,
    Unavailable,
)
from visq.objects import (
    FetchedObject,
    NotModified,
    ObjectRef,
    ObjectStore,
    check_access,
    open_store,
    parse_uri,
)
from visq.settings import Settings

LIMIT = 1_000_000
SECRET = "a-secret-that-no-message-may-hold"

UNUSUAL_KEYS = [
    "Äpfel und 🍐.jpg",
    "100%20off%.png",
    "why?not=1&x#y.gif",
    "back\\..\\slash.png",
    "/leading//double/trailing/",
    "...",
    "%~looks-like-a-hash",
    "a" * 600,
    "semi;colon:'quote\"<>|*.png",
]


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


def fetched(store: ObjectStore, ref: ObjectRef) -> FetchedObject:
    answer = store.get(ref, max_bytes=LIMIT)
    assert isinstance(answer, FetchedObject)
    return answer


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "bucket", "key", "version"),
    [
        ("s3://pictures/cat.jpg", "pictures", "cat.jpg", None),
        ("s3://pictures/cat.jpg?versionId=a.B_c-1", "pictures", "cat.jpg", "a.B_c-1"),
        ("s3://pictures/a?b=c", "pictures", "a?b=c", None),
        ("s3://pictures/a%20b c#d", "pictures", "a%20b c#d", None),
        ("s3://a.b-c/x/y/", "a.b-c", "x/y/", None),
    ],
)
def test_a_uri_is_bucket_key_and_version(
    uri: str, bucket: str, key: str, version: str | None
) -> None:
    ref = parse_uri(uri)
    assert (ref.bucket, ref.key, ref.version_id) == (bucket, key, version)
    assert ref.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "cat.jpg",
        "S3://pictures/cat.jpg",
        "file:///etc/passwd",
        "http://pictures/cat.jpg",
        "data:image/png;base64,AAAA",
        "s3://pictures",
        "s3://pictures/",
        "s3:///cat.jpg",
        "s3://ab/cat.jpg",
        "s3://Pictures/cat.jpg",
        "s3://user:pass@pictures/cat.jpg",
        "s3://-pictures/cat.jpg",
        "s3://pic..tures/cat.jpg",
        "s3://.incoming/cat.jpg",
        "s3://pictures/../secret",
        "s3://pictures/a/./b",
        "s3://pictures/a/..",
        "s3://pictures/a\0b",
        "s3://pictures/a\nb",
        "s3://pictures/\ud800",
        "s3://pictures/" + "ä" * 513,
        "s3://pictures/a?versionId=",
        "s3://pictures/a?versionId=b c",
        "s3://pictures/a?versionId=b?versionId=c",
    ],
)
def test_what_is_not_an_object_name_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_uri(uri)


def test_a_refused_signed_url_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse_uri(f"https://pictures.example.com/cat.jpg?X-Amz-Signature={SECRET}")
    assert SECRET not in str(raised.value)


@given(st.text(min_size=1, max_size=80), st.none() | st.from_regex(r"\A[A-Za-z0-9._-]{1,40}\Z"))
def test_every_reference_that_exists_survives_its_uri(key: str, version: str | None) -> None:
    try:
        ref = ObjectRef("pictures", key, version)
    except InvalidRequest:
        return
    assert parse_uri(ref.uri) == ref


# --- access ------------------------------------------------------------------------------------


def test_a_tenant_reads_only_its_own_uploads() -> None:
    settings = Settings(upload_bucket="uploads", s3_buckets="uploads,pictures")
    check_access(parse_uri("s3://uploads/ann/1"), "ann", settings)
    for uri in ("s3://uploads/bob/1", "s3://uploads/annabel/1", "s3://uploads/ann"):
        with pytest.raises(ImageForbidden, match=uri):
            check_access(parse_uri(uri), "ann", settings)


@pytest.mark.parametrize(
    ("listed", "uri", "allowed"),
    [
        ("", "s3://anything/x", True),
        ("pictures", "s3://pictures/x", True),
        ("pictures", "s3://pictures2/x", False),
        (" other , pictures/team-a/ ", "s3://pictures/team-a/x", True),
        ("pictures/team-a", "s3://pictures/team-ab/x", False),
        ("pictures/team-a", "s3://pictures/x", False),
        ("pictures", "s3://visq-uploads/ann/x", True),
    ],
)
def test_jobs_read_only_the_listed_buckets(listed: str, uri: str, allowed: bool) -> None:
    settings = Settings(s3_buckets=listed)
    if allowed:
        check_access(parse_uri(uri), "ann", settings)
    else:
        with pytest.raises(ImageForbidden):
            check_access(parse_uri(uri), "ann", settings)


# --- both stores -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", UNUSUAL_KEYS)
def test_an_object_comes_back_under_whatever_key(
    store: ObjectStore, key: str, s3: S3Endpoint
) -> None:
    bucket = s3.create_bucket()
    store.put(ObjectRef(bucket, key), key.encode(), "image/png")
    assert fetched(store, ObjectRef(bucket, key)).data == key.encode()


def test_an_unchanged_object_is_not_read_again(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "cat.jpg")
    store.put(ref, b"one", "image/jpeg")
    etag = fetched(store, ref).etag
    assert store.get(ref, max_bytes=LIMIT, if_none_match=etag) == NotModified()
    store.put(ref, b"two", "image/jpeg")
    again = store.get(ref, max_bytes=LIMIT, if_none_match=etag)
    assert isinstance(again, FetchedObject)
    assert again.data == b"two"


def test_a_missing_object_and_a_missing_bucket_are_not_found(
    store: ObjectStore, bucket: str
) -> None:
    for uri in (f"s3://{bucket}/nothing", "s3://no-such-bucket/cat.jpg"):
        with pytest.raises(ImageNotFound, match=uri):
            store.get(parse_uri(uri), max_bytes=LIMIT)


def test_an_object_of_the_limit_is_read_and_a_larger_one_refused(
    store: ObjectStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "cat.jpg")
    store.put(ref, bytes(1000), "image/jpeg")
    assert isinstance(store.get(ref, max_bytes=1000), FetchedObject)
    with pytest.raises(ImageTooLarge, match=r"s3://.*cat\.jpg.*999 bytes"):
        store.get(ref, max_bytes=999)


def test_an_empty_object_is_read(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "empty")
    store.put(ref, b"", "image/png")
    assert fetched(store, ref).data == b""


def test_a_store_that_works_answers_a_ping(store: ObjectStore) -> None:
    store.ping()


def test_many_threads_write_one_key_and_none_sees_a_mixture(
    store: ObjectStore, bucket: str
) -> None:
    ref = ObjectRef(bucket, "contested")
    bodies = [bytes([number]) * 50_000 for number in range(8)]
    store.put(ref, bodies[0], "image/png")
    with ThreadPoolExecutor(16) as threads:
        writes = [threads.submit(store.put, ref, body, "image/png") for body in bodies * 3]
        reads = [threads.submit(fetched, store, ref) for _ in range(24)]
        assert all(read.result().data in bodies for read in reads)
        for write in writes:
            write.result()


# --- the folder --------------------------------------------------------------------------------


def test_a_file_put_into_the_folder_answers_to_its_name(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "pets").mkdir(parents=True)
    (tmp_path / "pictures" / "pets" / "Äpfel 100%.jpg").write_bytes(b"here")
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    assert fetched(store, parse_uri("s3://pictures/pets/Äpfel 100%.jpg")).data == b"here"


@given(st.text(min_size=1, max_size=300))
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    from visq.objects.folder import FolderStore

    try:
        ref = ObjectRef("pictures", key)
    except InvalidRequest:
        return
    root = Path("/the/root")
    path = FolderStore(root)._path(ref)
    assert Path(os.path.normpath(path)).is_relative_to(root / "pictures")
    assert all(len(part.encode()) <= 255 for part in path.parts)


def test_a_symbolic_link_out_of_the_folder_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    bucket = tmp_path / "objects" / "pictures"
    bucket.mkdir(parents=True)
    (bucket / "link").symlink_to(tmp_path / "secret")
    (bucket / "up").symlink_to(tmp_path)
    store = open_store(Settings(object_store=(tmp_path / "objects").as_uri()))
    for uri in ("s3://pictures/link", "s3://pictures/up/secret"):
        with pytest.raises(ImageForbidden, match=uri):
            store.get(parse_uri(uri), max_bytes=LIMIT)
    with pytest.raises(ImageForbidden):
        store.put(parse_uri("s3://pictures/up/new"), b"x", "image/png")
    assert not (tmp_path / "new").exists()


def test_folders_and_pipes_are_not_objects(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "pictures" / "pipe")
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    for name in ("folder", "pipe", "folder/none", "pipe/none"):
        with pytest.raises(ImageNotFound):
            store.get(ObjectRef("pictures", name), max_bytes=LIMIT)


def test_a_folder_keeps_no_versions(folder_store: ObjectStore) -> None:
    folder_store.put(parse_uri("s3://pictures/a"), b"x", "image/png")
    with pytest.raises(ImageNotFound, match="no versions"):
        folder_store.get(parse_uri("s3://pictures/a?versionId=1"), max_bytes=LIMIT)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    store.put(parse_uri("s3://pictures/a"), b"x", "image/png")
    with pytest.raises(Unavailable, match="s3://pictures/a/b"):
        store.put(parse_uri("s3://pictures/a/b"), b"y", "image/png")
    assert list((tmp_path / ".incoming").iterdir()) == []
    assert fetched(store, parse_uri("s3://pictures/a")).data == b"x"


def test_a_folder_that_cannot_be_made_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(Settings(object_store=(tmp_path / "file" / "objects").as_uri()))
    with pytest.raises(Unavailable):
        store.ping()


@pytest.mark.parametrize(
    "url", ["gs://bucket", "file:relative", "file://host/folder", "folder", "S3"]
)
def test_a_store_of_another_kind_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_store(Settings(object_store=url))


# --- S3 ----------------------------------------------------------------------------------------


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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

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
def faulty() -> Iterator[FaultyServer]:
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


def test_a_body_cut_off_twice_is_a_failed_fetch_and_never_a_short_image(
    faulty: FaultyServer,
) -> None:
    faulty.answers = [body(b"half", announced=8)]
    with pytest.raises(ImageFetchFailed, match=r"s3://pictures/cat\.jpg") as raised:
        faulty.store().get(REF, max_bytes=LIMIT)
    assert raised.value.retryable


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
