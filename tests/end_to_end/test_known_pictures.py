"""Pictures of a conversation: read once by a worker whose model keeps them, and again after it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.deployment import Deployment
from tests.servers import Valkey
from visq import Client
from visq.objects import ObjectRef, open_store
from visq.settings import Settings
from visq.types import JobStatus as S
from visq.types import JobView

SHORT = {"max_new_tokens": 12}

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def deployment(tmp_path: Path, valkey: Valkey) -> Iterator[Deployment]:
    with Deployment(
        tmp_path, {"redis_url": valkey.url, "broker_url": valkey.url, "max_attempts": "1"}
    ) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


def circle() -> bytes:
    image = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 90, 80), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_unseen(path: Path, data: bytes) -> None:
    """Replace the bytes of an object so that its ETag stays: only who reads them can notice."""
    before = path.stat()
    assert before.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_ino == before.st_ino


def test_the_next_turn_does_not_read_its_picture_again_until_the_worker_is_a_new_one(
    client: Client, deployment: Deployment
) -> None:
    settings = Settings(data=deployment.folder)
    open_store(settings).put(ObjectRef("photos", "circle.png"), circle(), "image/png")
    [path] = deployment.folder.rglob("circle.png")
    session = client.sessions.create()
    first = session.chat("what is this?", images=["s3://photos/circle.png"], gen_config=SHORT)
    assert first.wait(60).status is S.SUCCEEDED

    def next_turn() -> JobView:
        return session.fork(1).chat("what color is the circle?", gen_config=SHORT).wait(60)

    write_unseen(path, bytes(len(circle())))
    answered = next_turn()
    assert answered.status is S.SUCCEEDED
    assert answered.result is not None
    assert answered.result.usage.images == 1

    deployment.workers[0].kill()
    deployment.start_worker()
    reads_it = next_turn()
    assert reads_it.error is not None
    assert reads_it.error.code == "image_undecodable"

    write_unseen(path, circle())
    again = next_turn()
    assert again.result is not None
    assert again.result.text == answered.result.text
    assert again.result.usage.images == 1
