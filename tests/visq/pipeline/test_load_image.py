"""`load_image`: every form of a reference, and what it does not let in."""

from __future__ import annotations

import base64
import io
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.servers import S3Endpoint
from visq import load_image
from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ImageUndecodable,
    InvalidRequest,
    VisqError,
)
from visq.objects import ObjectRef
from visq.objects.folder import FolderStore
from visq.pipeline import EngineConfig, pipeline
from visq.vl.encoding import as_png
from visq.vl.reading import ReadingRules, name_of, read_bytes


def png(size: tuple[int, int] = (6, 4), color: str = "red", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG", **options)
    return data.getvalue()


PNG = png()


class Site(BaseHTTPRequestHandler):
    """Answers by the path; remembers the hosts that it was asked for."""

    hosts: list[str] = []  # noqa: RUF012  # one server for the module

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        path, _, rest = self.path.partition("?")
        match path:
            case "/image.png":
                self._answer(200, PNG)
            case "/to":
                self.send_response(302)
                self.send_header("Location", rest)
                self.end_headers()
            case "/again":
                self._answer(500 if len(self.hosts) == 1 else 200, PNG)
            case "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    for _ in range(100_000):
                        self.wfile.write(b"x" * 4096)
                except OSError:
                    return
            case _:
                self._answer(int(path.removeprefix("/")), b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=site.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{site.server_port}"
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture
def site(server: str) -> str:
    Site.hosts.clear()
    return server


def is_red(image: Image.Image) -> bool:
    return image.mode == "RGB" and image.size == (6, 4) and image.getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_is_loaded_from_any_reference(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    monkeypatch.setenv("VISQ_OBJECT_STORE", (tmp_path / "objects").as_uri())
    FolderStore(tmp_path / "objects").put(ObjectRef("bucket", "red.png"), PNG, "image/png")
    references: list[Any] = [
        str(path),
        path,
        path.as_uri(),
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        "s3://bucket/red.png",
        Image.open(path),
    ]
    for reference in references:
        assert is_red(load_image(reference)), reference
    assert is_red(load_image(f"{site}/image.png", allow_private=True))


def test_an_object_is_read_from_s3(
    s3: S3Endpoint, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.client().put_object(Bucket=bucket, Key="red.png", Body=PNG)
    assert is_red(load_image(f"s3://{bucket}/red.png"))
    with pytest.raises(ImageNotFound, match=f"s3://{bucket}/none.png"):
        load_image(f"s3://{bucket}/none.png")


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(png(exif=exif))
    assert load_image(tmp_path / "turned.png").size == (4, 6)


def test_transparency_lies_on_white() -> None:
    assert load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ("/nowhere/a.png", ImageNotFound, "/nowhere/a.png"),
        ("", ImageNotFound, "not a file"),
        ("a\0b", ImageNotFound, "not a file"),
        ("/tmp", ImageNotFound, "/tmp"),
        ("ftp://a.test/b.png", InvalidRequest, "ftp"),
        ("s3://bucket", InvalidRequest, "empty key"),
        ("data:image/png,abc", InvalidRequest, "base64"),
        ("data:image/png;base64,!!", ImageUndecodable, "base64"),
        ("data:image/png;base64,AAAA", ImageUndecodable, "image data URL is not a picture"),
        (7, InvalidRequest, "int"),
    ],
)
def test_what_is_no_picture_is_a_clear_error(
    reference: Any, error: type[VisqError], says: str
) -> None:
    with pytest.raises(error, match=says):
        load_image(reference)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageNotFound, match="not a file"):
        load_image(tmp_path / "pipe")


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path,
) -> None:
    before = Image.MAX_IMAGE_PIXELS
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png((3000, 3000))[:200])  # the rest is not needed to know
    with pytest.raises(ImageTooLarge, match="more than 1000000 pixels"):
        load_image(bomb, max_pixels=1_000_000)
    with pytest.raises(ImageTooLarge, match="PIL image has more than 10 pixels"):
        load_image(Image.new("RGB", (4, 4)), max_pixels=10)
    assert before == Image.MAX_IMAGE_PIXELS  # Pillow's limit is the whole program's


def test_more_bytes_than_allowed_are_not_read(site: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    data_url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    for reference in (path, data_url, f"{site}/endless"):
        with pytest.raises(ImageTooLarge, match="more than 50 bytes"):
            load_image(reference, max_bytes=50, allow_private=True)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0"]
)
def test_addresses_that_are_not_public_are_refused(host: str) -> None:
    with pytest.raises(ImageForbidden, match="not public"):
        load_image(f"http://{host}:1/a.png")


def test_each_hop_of_a_redirect_is_checked(site: str) -> None:
    port = site.rpartition(":")[2]
    rules = ReadingRules(10**6, 10**6, allow_private=True, allowed_domains=frozenset(["127.0.0.1"]))
    assert read_bytes(f"{site}/to?/image.png", rules) == PNG
    with pytest.raises(ImageForbidden, match="localhost, which is not one of"):
        read_bytes(f"{site}/to?http://localhost:{port}/image.png", rules)
    with pytest.raises(ImageForbidden, match="something else than http"):
        read_bytes(f"{site}/to?file:///etc/passwd", rules)
    with pytest.raises(ImageForbidden, match="more than 3 times"):
        read_bytes(f"{site}/to?/to?/to?/to?/image.png", rules)
    assert read_bytes(f"{site}/to?/to?/to?/image.png", rules) == PNG


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = site.rpartition(":")[2]
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **more: Any) -> Any:
        looked_up.append(host)
        return real("127.0.0.1" if host == "pictures.test" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert is_red(load_image(f"http://pictures.test:{port}/image.png", allow_private=True))
    assert looked_up.count("pictures.test") == 1
    assert Site.hosts == [f"pictures.test:{port}"]


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, ImageNotFound), (403, ImageForbidden), (418, ImageFetchFailed)],
)
def test_what_the_server_says_is_said(site: str, status: int, error: type[VisqError]) -> None:
    with pytest.raises(error, match=f"{site}/{status}"):
        load_image(f"{site}/{status}?secret=1", allow_private=True)


def test_a_failure_is_tried_again(site: str) -> None:
    assert is_red(load_image(f"{site}/again", allow_private=True))


def test_a_server_that_is_not_there_is_a_failed_fetch() -> None:
    with pytest.raises(ImageFetchFailed, match="ConnectError"):
        load_image("http://127.0.0.1:1/a.png", allow_private=True)
    with pytest.raises(ImageFetchFailed, match="not found"):
        load_image("http://nobody.invalid/a.png")


def test_messages_hold_no_secret_and_no_megabytes() -> None:
    assert name_of("https://me:word@a.test/b.png?signature=1") == "https://a.test/b.png"
    assert name_of("data:image/png;base64,AAAA") == "data URL"


def test_a_pipeline_reads_only_from_the_domains_that_it_was_told(site: str) -> None:
    config = EngineConfig(device="cpu")
    with pipeline("small", config, allowed_media_domains=["pictures.test"]) as pipe:
        response = pipe(("what?", f"{site}/image.png"))
    assert response.error_code == "image_forbidden"
    assert "allowed_media_domains" in response.error_message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_a_picture_of_any_mode_becomes_a_file_that_shows_the_same(mode: str) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    image = image if image.mode == mode else image.convert(mode)
    url = f"data:image/png;base64,{base64.b64encode(as_png(image)).decode()}"
    assert np.array_equal(np.asarray(load_image(url)), np.asarray(load_image(image)))
