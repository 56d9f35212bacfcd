"""Large files through a real API process to a real S3 endpoint that sometimes fails."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from tests.deployment import API_KEY, Deployment
from tests.faults.store import LyingStore, Reset, Unheard
from tests.servers import S3Endpoint, Valkey
from tests.waiting import until

MB = 1_000_000
SIZE = 60 * MB
LIMIT = 70 * MB
BUCKET = "large-files"

pytestmark = pytest.mark.timeout(180)


class Noise(io.RawIOBase):
    """A file of `SIZE` bytes, none of which is in memory before it is read."""

    name = "noise.bin"

    def __init__(self, size: int = SIZE, at_half: Callable[[], object] = lambda: None) -> None:
        self._size = size
        self._position = 0
        self._at_half = at_half

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._size if whence == io.SEEK_END else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        before = self._position
        count = min(256 * 1024, self._size - before)
        self._position += count
        if before < self._size // 2 <= self._position:
            self._at_half()
        return bytes([before // 7 % 256]) * count


def hash_of(size: int = SIZE) -> str:
    noise, digest = Noise(size), hashlib.sha256()
    while piece := noise.read():
        digest.update(piece)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def lying(s3: S3Endpoint) -> Iterator[LyingStore]:
    with LyingStore(s3) as lying:
        yield lying


@pytest.fixture(scope="module")
def deployment(
    lying: LyingStore, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    settings = {
        **{name.removeprefix("VISQ_").lower(): v for name, v in lying.environment.items()},
        "broker_url": valkey.url,
        "redis_url": valkey.url,
        "upload_bucket": BUCKET,
        "max_file_bytes": str(LIMIT),
        "fetch_timeout_seconds": "2",
        "fetch_total_seconds": "4",
    }
    with Deployment(tmp_path_factory.mktemp("files"), settings) as deployment:
        yield deployment


@pytest.fixture
def ann(deployment: Deployment, lying: LyingStore) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{deployment.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client
        lying.heal()
        for file in client.files.list():
            client.files.delete(file.id)


@contextmanager
def memory_flat(deployment: Deployment) -> Iterator[None]:
    """The API's process takes no more than 40 MB meanwhile."""
    assert deployment.api is not None
    process = Path("/proc") / str(deployment.api.pid)

    def kilobytes(name: str) -> int:
        lines = (process / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    (process / "clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    yield
    grown = (kilobytes("VmHWM") - before) * 1024
    assert grown < 40 * MB, f"{grown / MB:.1f} MB"


def objects(s3: S3Endpoint) -> list[str]:
    return [each["Key"] for each in s3.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def unfinished(s3: S3Endpoint) -> int:
    return len(s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))


def test_memory_stays_flat_while_a_large_file_comes_and_goes(
    deployment: Deployment, ann: OpenAI, tmp_path: Path
) -> None:
    with memory_flat(deployment):
        file = ann.files.create(file=("noise.bin", Noise()), purpose="user_data")
    assert file.bytes == SIZE
    with memory_flat(deployment), ann.files.with_streaming_response.content(file.id) as response:
        response.stream_to_file(tmp_path / "back")
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == hash_of()


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing_in_the_store(
    deployment: Deployment, ann: OpenAI, s3: S3Endpoint
) -> None:
    ann.files.create(file=("first", b"makes the bucket"), purpose="user_data")

    def hang_up() -> None:
        until(lambda: unfinished(s3) == 1, 30, "the upload to begin")
        raise ConnectionAbortedError

    before = objects(s3)
    with pytest.raises(ConnectionAbortedError):
        ann.files.create(file=("noise.bin", Noise(at_half=hang_up)), purpose="user_data")
    until(lambda: unfinished(s3) == 0, 30, "the upload to be aborted")
    assert objects(s3) == before
    assert [file.filename for file in ann.files.list()] == ["first"]


def test_a_file_above_the_limit_is_refused_by_its_word_and_in_fact(
    deployment: Deployment, ann: OpenAI, s3: S3Endpoint
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        ann.files.create(file=("noise.bin", Noise(LIMIT + MB)), purpose="user_data")
    assert raised.value.status_code == 413
    assert raised.value.code == "payload_too_large"

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        noise = Noise(LIMIT + 1)
        while piece := noise.read():
            yield piece
        yield b"\r\n--b--\r\n"

    answer = httpx2.post(
        f"{deployment.url}/v1/files",
        content=chunks(),
        headers={
            "Authorization": f"Bearer {API_KEY}",
            "Content-Type": "multipart/form-data; boundary=b",
        },
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "file"
    assert unfinished(s3) == 0
    assert list(ann.files.list()) == []


def test_a_store_that_takes_no_more_is_unavailable_and_nothing_is_there(
    ann: OpenAI, lying: LyingStore, s3: S3Endpoint
) -> None:
    def fail() -> None:
        lying.lie(Unheard(), f"{BUCKET}/", method="PUT")

    with pytest.raises(openai.InternalServerError) as raised:
        ann.files.create(file=("noise.bin", Noise(at_half=fail)), purpose="user_data")
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"]
    assert unfinished(s3) == 0
    assert list(ann.files.list()) == []


def test_content_that_breaks_off_is_an_error_and_never_a_shorter_file(
    deployment: Deployment, ann: OpenAI, lying: LyingStore
) -> None:
    file = ann.files.create(file=("noise.bin", Noise()), purpose="user_data")
    size = 0
    with ann.files.with_streaming_response.content(file.id) as response:
        assert response.headers["content-length"] == str(SIZE)
        pieces = response.iter_bytes(MB)
        size += len(next(pieces))
        lying.lie(Reset(), f"{BUCKET}/")
        with pytest.raises(httpx2.RemoteProtocolError):
            size += sum(map(len, pieces))
    assert size < SIZE
    lying.heal()
    assert hashlib.sha256(ann.files.content(file.id).read()).hexdigest() == hash_of()
