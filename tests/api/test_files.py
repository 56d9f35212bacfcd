"""Files, by OpenAI's own client and without it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from api.form_stream import FormStream
from models import files
from models.database import Database, db_now
from models.tables import StoredFile
from tests.api.conftest import fresh_secret
from tests.api.running import RunningApi
from tests.waiting import until
from visq.errors import ObjectNotFound
from visq.objects import open_store, parse_uri

LINES = b"".join(b'{"custom_id": "%d"}\n' % number for number in range(150_000))
assert len(LINES) > 2 * 1024 * 1024

MakeClient = Callable[[str], OpenAI]


@pytest.fixture
def make_client(api: RunningApi) -> Iterator[MakeClient]:
    made: list[OpenAI] = []

    def make(secret: str) -> OpenAI:
        made.append(OpenAI(base_url=f"{api.url}/v1", api_key=secret, max_retries=0))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def ann(make_client: MakeClient, secret: str) -> OpenAI:
    """OpenAI's client of a tenant that has nothing yet; `client` is the same tenant's."""
    return make_client(secret)


@pytest.fixture
def database(api: RunningApi) -> Iterator[Database]:
    database = Database(api.settings.database)
    yield database
    database.close()


def uri_of(database: Database, file_id: str) -> str:
    found = database.read(lambda session: session.get(StoredFile, file_id))
    assert found is not None
    return found.uri


def uploading(api: RunningApi) -> list[Path]:
    """What the folder store has not finished."""
    folder = api.settings.data / "objects" / ".incoming"
    return list(folder.iterdir()) if folder.is_dir() else []


def stored(api: RunningApi, secret: str) -> list[str]:
    """The objects of the tenant with this key."""
    tenant = secret.replace("secret", "tenant")
    try:
        found = list(open_store(api.settings).list(api.settings.upload_bucket, f"{tenant}/"))
    except ObjectNotFound:
        return []
    return [each.key for each in found]


# --- OpenAI's client ---------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was(ann: OpenAI, api: RunningApi, secret: str) -> None:
    file = ann.files.create(file=("photos.jsonl", LINES), purpose="batch")
    assert file.id.startswith("fil_")
    assert (file.object, file.status, file.purpose) == ("file", "processed", "batch")
    assert (file.filename, file.bytes, file.expires_at) == ("photos.jsonl", len(LINES), None)
    assert ann.files.retrieve(file.id) == file
    content = ann.files.content(file.id)
    assert content.read() == LINES
    assert content.response.headers["content-length"] == str(len(LINES))
    assert ann.files.wait_for_processing(file.id) == file
    assert stored(api, secret) == [f"{secret.replace('secret', 'tenant')}/files/{file.id}"]


def test_content_is_streamed_to_a_file(ann: OpenAI, tmp_path: Path) -> None:
    file = ann.files.create(file=("photos.jsonl", LINES), purpose="user_data")
    with ann.files.with_streaming_response.content(file.id) as response:
        response.stream_to_file(tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == LINES


@pytest.mark.parametrize("data", [b"", b"\r\n--", b"\0\xff" * 1000, b"x\r\n" * 500_000])
def test_any_bytes_come_back(ann: OpenAI, data: bytes) -> None:
    file = ann.files.create(file=("a.bin", data), purpose="user_data")
    assert file.bytes == len(data)
    assert ann.files.content(file.id).read() == data


def test_a_path_and_an_open_file_are_uploaded(ann: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "Äpfel und 🍐.jsonl"
    path.write_bytes(b"{}\n")
    with path.open("rb") as opened:
        for sent in (path, opened):
            file = ann.files.create(file=sent, purpose="batch")
            assert file.filename == path.name
            found = ann.files.content(file.id).response.headers["content-disposition"]
            assert found == "attachment; filename*=UTF-8''%C3%84pfel%20und%20%F0%9F%8D%90.jsonl"


def test_files_are_listed_page_by_page(ann: OpenAI) -> None:
    made = [ann.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(3)]
    made += [ann.files.create(file=(f"{n}", b"x"), purpose="vision").id for n in range(2)]
    assert [file.id for file in ann.files.list()] == made[::-1]
    assert [file.id for file in ann.files.list(order="asc", limit=2)] == made
    assert [file.id for file in ann.files.list(limit=2)] == made[::-1]
    assert [file.id for file in ann.files.list(purpose="vision")] == made[:2:-1]
    assert [file.id for file in ann.files.list(after=made[1], order="asc")] == made[2:]
    page = ann.files.list(limit=2)
    assert (page.has_more, len(page.data)) == (True, 2)
    assert list(ann.files.list(purpose="batch_output")) == []


def test_a_page_names_its_ends(ann: OpenAI, client: httpx2.Client) -> None:
    empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert client.get("/v1/files").json() == empty
    made = [ann.files.create(file=(f"{n}", b"x"), purpose="batch").id for n in range(2)]
    page = client.get("/v1/files", params={"order": "asc"}).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (*made, False)


def test_a_deleted_file_is_gone_and_its_bytes_too(
    ann: OpenAI, api: RunningApi, database: Database
) -> None:
    file = ann.files.create(file=("a", b"x"), purpose="batch")
    uri = uri_of(database, file.id)
    gone = ann.files.delete(file.id)
    assert (gone.id, gone.object, gone.deleted) == (file.id, "file", True)
    for use in (ann.files.retrieve, ann.files.content, ann.files.delete):
        with pytest.raises(openai.NotFoundError):
            use(file.id)
    assert list(ann.files.list()) == []
    with pytest.raises(ObjectNotFound):
        open_store(api.settings).stat(parse_uri(uri))


def test_what_a_batch_wrote_elsewhere_stays_there(
    ann: OpenAI, api: RunningApi, database: Database
) -> None:
    file = ann.files.create(file=("a", b"x"), purpose="batch")
    ref = parse_uri("s3://pictures/out.jsonl")
    store = open_store(api.settings)
    store.put(ref, b"the output", "application/jsonl")
    moved = update(StoredFile).where(StoredFile.id == file.id).values(uri=ref.uri)
    database.run(lambda session: session.execute(moved))
    assert ann.files.content(file.id).read() == b"the output"
    ann.files.delete(file.id)
    assert store.stat(ref).size == len(b"the output")


def test_a_file_whose_bytes_are_gone_says_so(
    ann: OpenAI, api: RunningApi, database: Database
) -> None:
    file = ann.files.create(file=("a", b"x"), purpose="batch")
    open_store(api.settings).delete(parse_uri(uri_of(database, file.id)))
    with pytest.raises(openai.NotFoundError) as raised:
        ann.files.content(file.id)
    assert raised.value.code == "object_not_found"
    ann.files.delete(file.id)


def test_a_file_that_has_expired_is_there_for_nobody(ann: OpenAI, database: Database) -> None:
    file = ann.files.create(
        file=("a", b"x"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at is not None
    assert file.expires_at - file.created_at in (3600, 3601)  # each is cut to whole seconds
    stays = ann.files.create(file=("b", b"x"), purpose="batch")
    past = update(StoredFile).where(StoredFile.id == file.id).values(expires_at=db_now(-1))
    database.run(lambda session: session.execute(past))
    for use in (ann.files.retrieve, ann.files.content, ann.files.delete):
        with pytest.raises(openai.NotFoundError):
            use(file.id)
    assert [each.id for each in ann.files.list()] == [stays.id]
    expired = database.read(files.expired, 1000)
    assert file.id in [each.id for each in expired]
    assert stays.id not in [each.id for each in expired]
    database.run(files.remove, file.id)
    assert file.id not in [each.id for each in database.read(files.expired, 1000)]


def test_files_of_another_tenant_are_not_there(ann: OpenAI, make_client: MakeClient) -> None:
    stranger = make_client(fresh_secret())
    theirs = stranger.files.create(file=("a", b"theirs"), purpose="batch")
    for use in (ann.files.retrieve, ann.files.content, ann.files.delete):
        with pytest.raises(openai.NotFoundError):
            use(theirs.id)
    assert list(ann.files.list()) == []
    assert stranger.files.content(theirs.id).read() == b"theirs"


@pytest.mark.parametrize(
    "file_id", ["file-abc123", "fil_1", f"fil_{'0' * 32}", "a\0b", "..a", "ä" * 40]
)
def test_another_id_is_not_found(ann: OpenAI, file_id: str) -> None:
    with pytest.raises(openai.NotFoundError):
        ann.files.retrieve(file_id)


def test_a_file_needs_a_key(make_client: MakeClient) -> None:
    with pytest.raises(openai.AuthenticationError):
        make_client("another").files.create(file=("a", b"x"), purpose="batch")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"expires_after": {"anchor": "created_at", "seconds": 10}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at", "seconds": "x"}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"file": ("x" * 256, b"x")}, "file"),
    ],
)
def test_a_wrong_field_is_a_bad_request_and_leaves_nothing(
    ann: OpenAI, api: RunningApi, secret: str, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ann.files.create(**{"file": ("a", b"x"), "purpose": "batch", **options})
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"
    assert list(ann.files.list()) == []
    assert uploading(api) == []
    assert stored(api, secret) == []


# --- forms that OpenAI's client does not send --------------------------------------------------


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """Parts by what stands in their Content-Disposition behind ``form-data; ``."""
    head = b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
    return b"".join(head % (name.encode(), value) for name, value in parts) + end


FILE = 'name="file"; filename="a.jsonl"'
PURPOSE = ('name="purpose"', b"batch")


def post(client: httpx2.Client, body: bytes, kind: str = "multipart/form-data; boundary=b") -> Any:
    return client.post("/v1/files", content=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_fields_may_come_before_and_after_the_file(
    client: httpx2.Client, ann: OpenAI, order: list[int]
) -> None:
    parts = [(FILE, LINES), PURPOSE]
    answer = post(client, form(*(parts[number] for number in order)))
    assert answer.status_code == 200, answer.text
    assert ann.files.content(answer.json()["id"]).read() == LINES


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (form(PURPOSE), "invalid_request", "file"),
        (form((FILE, b"x")), "invalid_request", "purpose"),
        (form((FILE, b"x"), (FILE, b"y"), PURPOSE), "invalid_request", "file"),
        (form((FILE, b"x"), PURPOSE, PURPOSE), "invalid_request", "purpose"),
        (form(('name="file"', b"x"), PURPOSE), "invalid_request", "file"),
        (form(('name="other"; filename="a"', b"x"), PURPOSE), "invalid_request", "other"),
        (form(('name="file"; filename=""', b"x"), PURPOSE), "invalid_request", "file"),
        (form(('name="file"; filename="a\tb"', b"x"), PURPOSE), "invalid_request", "file"),
        (form((FILE, b"x"), ('name="purpose"', bytes(5000))), "invalid_request", "purpose"),
        (form((FILE, b"x"), ("", b"batch")), "malformed_body", None),
        (form((FILE, b"x"), PURPOSE, end=b""), "malformed_body", None),
        (form((FILE, b"x"), PURPOSE, end=b"--b"), "malformed_body", None),
        (form(*((f'name="{n}"', b"") for n in range(20)), (FILE, b"x")), "malformed_body", None),
        (b"", "malformed_body", None),
        (b"purpose=batch", "malformed_body", None),
        (b"--b\r\n" + b"X: y\r\n" * 100, "malformed_body", None),
        (b"--b\r\nX: " + b"y" * 100_000, "malformed_body", None),
    ],
)
def test_a_wrong_form_is_refused_and_leaves_nothing(
    client: httpx2.Client,
    api: RunningApi,
    secret: str,
    body: bytes,
    code: str,
    param: str | None,
) -> None:
    answer = post(client, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert client.get("/v1/files").json()["data"] == []
    assert uploading(api) == []
    assert stored(api, secret) == []


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        (f"multipart/form-data; boundary={'b' * 500}", 400),
        ("application/json", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
    ],
)
def test_what_is_no_form_is_refused(client: httpx2.Client, kind: str, status: int) -> None:
    assert post(client, form((FILE, b"x"), PURPOSE), kind).status_code == status


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "order=up", "colour=red"])
def test_a_wrong_question_is_refused(client: httpx2.Client, query: str) -> None:
    assert client.get(f"/v1/files?{query}").status_code == 400


def test_a_form_may_come_in_any_pieces() -> None:
    data = b"\r\n--c\r\n--b-\r" * 20
    body = form((FILE, data), PURPOSE)
    for size in (1, 2, 3, 7, 50, len(body)):
        stream = FormStream("multipart/form-data; boundary=b")
        pieces = [stream.feed(body[at : at + size]) for at in range(0, len(body), size)]
        assert b"".join(pieces) == data
        assert stream.end() == "a.jsonl"
        assert stream.fields == {"purpose": "batch"}


def test_a_client_that_hangs_up_leaves_nothing(
    api: RunningApi, client: httpx2.Client, secret: str
) -> None:
    body = form((FILE, LINES), PURPOSE)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    url = httpx2.URL(api.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + body[: len(body) // 2])
        until(lambda: len(uploading(api)) == 1, 30, "the upload to begin")
    until(lambda: uploading(api) == [], 30, "the upload to be given up")
    assert client.get("/v1/files").json()["data"] == []
    assert stored(api, secret) == []
