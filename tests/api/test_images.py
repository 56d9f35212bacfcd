"""Uploads, and image references in jobs and batches: what is taken, and what the worker gets."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx2
import pytest

from tests.api.running import PlayedWorker, RunningApi
from visq.objects import FetchedObject, open_store, parse_uri
from visq.references import image_type
from visq.types import ImagePart

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SHA256 = hashlib.sha256(PNG).hexdigest()
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def upload(client: httpx2.Client, data: bytes = PNG) -> dict[str, Any]:
    response = client.post("/v1/images", content=data, headers={"Content-Type": "image/png"})
    assert response.status_code == 201, response.text
    return response.json()


def stored(api: RunningApi, uri: str) -> bytes:
    found = open_store(api.settings).get(parse_uri(uri), max_bytes=10_000_000)
    assert isinstance(found, FetchedObject)
    return found.data


def images_for_worker(
    client: httpx2.Client, worker: PlayedWorker, body: dict[str, Any]
) -> list[ImagePart]:
    """The image parts that a worker gets for a job with this body."""
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    worker.claim(response.json()["id"])
    return [
        part
        for message in worker.claimed.prompt.as_messages()
        for part in message.parts()
        if isinstance(part, ImagePart)
    ]


# --- uploads -----------------------------------------------------------------------------------


def test_an_upload_is_stored_under_its_content(client: httpx2.Client, api: RunningApi) -> None:
    image = upload(client)
    assert image["sha256"] == SHA256
    assert image["size"] == len(PNG)
    assert image["uri"].endswith(f"/{SHA256}")
    assert stored(api, image["uri"]) == PNG


def test_an_upload_may_be_a_form(client: httpx2.Client) -> None:
    response = client.post("/v1/images", files={"file": ("a.png", PNG, "image/png")})
    assert response.status_code == 201
    assert response.json() == upload(client)  # the same bytes are the same image


def test_the_same_bytes_of_another_tenant_are_another_image(
    client: httpx2.Client, stranger: httpx2.Client
) -> None:
    mine, theirs = upload(client), upload(stranger)
    assert mine["id"] != theirs["id"]
    assert mine["uri"] != theirs["uri"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8\xff\xe0....", "image/jpeg"),
        (PNG, "image/png"),
        (b"GIF89a......", "image/gif"),
        (b"RIFF\n\0\0\0WEBPVP8 ", "image/webp"),
        (b"BM......", "image/bmp"),
    ],
)
def test_the_first_bytes_say_what_kind_of_image_it_is(data: bytes, kind: str) -> None:
    assert image_type(data) == kind


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", b"RIFF\n\0\0\0WAVEfmt ", b"<svg/>"])
def test_what_is_no_image_is_refused(client: httpx2.Client, data: bytes) -> None:
    response = client.post("/v1/images", content=data, headers={"Content-Type": "image/png"})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "image_undecodable"


def test_a_form_without_a_file_is_refused(client: httpx2.Client) -> None:
    response = client.post("/v1/images", files={"picture": ("a.png", PNG, "image/png")})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "file"
    response = client.post("/v1/images", data={"file": "text"}, files={"x": ("a", b"", "x/y")})
    assert response.status_code == 422


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nbroken"),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
        ),
    ],
)
def test_a_broken_form_is_refused(client: httpx2.Client, kind: str, body: bytes) -> None:
    response = client.post("/v1/images", content=body, headers={"Content-Type": kind})
    assert response.status_code in (400, 422)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", None])
def test_an_upload_of_another_type_is_refused(client: httpx2.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post("/v1/images", content=PNG, headers=headers)
    assert response.status_code == 415


# --- references --------------------------------------------------------------------------------


def test_an_s3_name_is_passed_on(client: httpx2.Client, worker: PlayedWorker) -> None:
    [part] = images_for_worker(
        client, worker, {"prompt": "?", "images": ["s3://pictures/a b%20.png?versionId=v1"]}
    )
    assert part.image_url.url == "s3://pictures/a b%20.png?versionId=v1"
    assert part.sha256 is None


@pytest.mark.parametrize("form", ["short", "raw"])
def test_a_url_is_passed_on_as_it_is_and_not_asked_for(
    client: httpx2.Client, worker: PlayedWorker, form: str
) -> None:
    url = "https://nobody.invalid/a%20b.png?X-Amz-Signature=1%2F2"
    body = {"prompt": "?", "images": [url], "do_preprocess": form == "short"}
    [part] = images_for_worker(client, worker, body)
    assert (part.image_url.url, part.sha256) == (url, None)


def test_an_item_of_a_batch_takes_urls_by_the_same_rules(client: httpx2.Client) -> None:
    item = {"custom_id": "a", "prompt": "?", "images": ["https://nobody.invalid/a.png"]}
    response = client.post("/v1/batches", json={"items": [item]})
    assert response.status_code == 202, response.text
    item["images"] = ["http://nobody.invalid/a.png"]
    error = client.post("/v1/batches", json={"items": [item]}).json()["error"]
    assert (error["code"], error["param"]) == ("image_forbidden", "items.0.images.0")


@pytest.mark.parametrize("form", ["short", "messages", "raw"])
@pytest.mark.parametrize("reference", ["id", "data"])
def test_a_reference_with_known_bytes_becomes_a_name_in_the_store(
    client: httpx2.Client, worker: PlayedWorker, api: RunningApi, form: str, reference: str
) -> None:
    url = upload(client)["id"] if reference == "id" else DATA_URL
    text = {"type": "text", "text": "?"}
    body: dict[str, Any] = {
        "short": {"prompt": "?", "images": [url]},
        "messages": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": url}}, text],
                }
            ]
        },
        "raw": {"prompt": "?", "images": [url], "do_preprocess": False},
    }[form]
    [part] = images_for_worker(client, worker, body)
    assert stored(api, part.image_url.url) == PNG
    if form != "raw":
        assert part.sha256 == SHA256


def test_images_keep_their_order(client: httpx2.Client, worker: PlayedWorker) -> None:
    names = ["s3://pictures/b.png", DATA_URL, "s3://pictures/a.png", "s3://pictures/b.png"]
    parts = images_for_worker(client, worker, {"prompt": "?", "images": names})
    urls = [part.image_url.url for part in parts]
    assert [urls[0], urls[2], urls[3]] == [names[0], names[2], names[3]]
    assert urls[1].endswith(SHA256)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "img_1",
        "ftp://example.org/a.png",
        "a.png",
        "S3://pictures/a.png",
        "s3://",
        "s3://pictures",
        "s3://pictures/../other/a.png",
        "s3://Pictures/a.png",
        "data:text/plain;base64,aGVsbG8=",
        "data:image/png,rawbytes",
        "https://",
        "https://me:word@example.org/a.png",
        "https://example.org/a b.png",
        "https://example.org/" + "a" * 8192,
    ],
)
def test_other_references_are_refused(client: httpx2.Client, url: str) -> None:
    response = client.post("/v1/jobs", json={"prompt": "?", "images": ["s3://pictures/a", url]})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["param"] == "images.1"


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]:8710/v1/jobs",
        "http://example.org/a.png",
    ],
)
def test_a_url_that_leads_where_no_image_is_read_is_forbidden(
    client: httpx2.Client, url: str
) -> None:
    body = {"prompt": "?", "images": ["s3://pictures/a", f"{url}?signature=1"]}
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("image_forbidden", "images.1")
    assert "signature" not in error["message"]


@pytest.mark.parametrize(
    "payload",
    ["", "aGVsbG8=", "not base64!", base64.b64encode(PNG).decode() + "\n", "iVBORw0KGgo"],
)
def test_a_data_url_without_an_image_is_refused(client: httpx2.Client, payload: str) -> None:
    response = client.post(
        "/v1/jobs", json={"prompt": "?", "images": [f"data:image/png;base64,{payload}"]}
    )
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "image_undecodable"


def test_an_unknown_upload_is_not_found(client: httpx2.Client, stranger: httpx2.Client) -> None:
    theirs = upload(stranger)
    for image_id in (f"img_{'0' * 32}", theirs["id"]):
        response = client.post("/v1/jobs", json={"prompt": "?", "images": [image_id]})
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "image_not_found"


def test_the_name_of_another_tenants_upload_is_forbidden(
    client: httpx2.Client, stranger: httpx2.Client
) -> None:
    theirs = upload(stranger)
    response = client.post("/v1/jobs", json={"prompt": "?", "images": [theirs["uri"]]})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "image_forbidden"


def test_an_upload_with_another_hash_than_the_request_gives_is_refused(
    client: httpx2.Client,
) -> None:
    part = {"type": "image_url", "image_url": {"url": DATA_URL}, "sha256": "0" * 64}
    response = client.post("/v1/jobs", json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 422
    assert response.json()["error"] == {
        "code": "image_changed",
        "type": "invalid_request_error",
        "message": "this image has not the SHA-256 that the request gives",
        "param": "messages.0.content.0.sha256",
    }


def test_a_repeat_with_a_data_url_is_the_same_job(client: httpx2.Client) -> None:
    body = {"prompt": "?", "images": [DATA_URL]}
    headers = {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json=body, headers=headers).json()
    assert client.post("/v1/jobs", json=body, headers=headers).json()["id"] == first["id"]


def test_items_of_a_batch_may_have_images_of_every_form(
    client: httpx2.Client, worker: PlayedWorker, api: RunningApi
) -> None:
    image = upload(client)
    urls = [DATA_URL, image["id"], "s3://pictures/a.png"]
    items = [
        {"custom_id": str(number), "prompt": "?", "images": [urls[number % 3]]}
        for number in range(30)
    ]
    batch = client.post("/v1/batches", json={"items": items}).json()
    page = client.get("/v1/jobs", params={"batch_id": batch["id"], "limit": 100}).json()
    for job in page["data"]:
        worker.claim(job["id"])
        [message] = worker.claimed.prompt.as_messages()
        [part] = [part for part in message.parts() if isinstance(part, ImagePart)]
        if int(job["custom_id"]) % 3 == 2:
            assert part.image_url.url == "s3://pictures/a.png"
        else:
            assert (part.image_url.url, part.sha256) == (image["uri"], SHA256)
