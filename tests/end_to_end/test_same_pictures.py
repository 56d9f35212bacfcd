"""A batch that shows few pictures many times: each is read, decoded and encoded once."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from tests.deployment import Deployment
from tests.servers import S3Endpoint, Valkey
from tests.waiting import until
from visq import Client
from visq.embedded.processes import free_port
from visq.pixels import NAME_PREFIX, SHARED_MEMORY
from visq.types import JobStatus as S

ITEMS = 30
COLOURS = ("red", "green", "blue")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def deployment(tmp_path: Path, valkey: Valkey, s3: S3Endpoint) -> Iterator[Deployment]:
    settings = {
        name.removeprefix("VISQ_").lower(): value for name, value in s3.environment.items()
    } | {
        "redis_url": valkey.url,
        "broker_url": valkey.url,
        "concurrency": "8",
        "log_level": "DEBUG",
        "metrics_port": str(free_port()),
    }
    with Deployment(tmp_path, settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (120, 90), colour).save(buffer, "PNG")
    return buffer.getvalue()


def answers_of(s3: S3Endpoint, bucket: str) -> list[int]:
    """The statuses with which the store has answered those who asked for objects of `bucket`."""
    asked = re.compile(rf'"GET /{bucket}/[a-z0-9]+\.png HTTP/1\.1" (\d+)')
    return [int(status) for status in asked.findall(s3.log.read_text(errors="replace"))]


def counted(deployment: Deployment) -> dict[str, float]:
    """The engine's counters."""
    url = f"http://127.0.0.1:{deployment.environment['VISQ_METRICS_PORT']}/metrics"
    text = httpx2.get(url, trust_env=False).text
    found = re.findall(r"^visq_engine_(\w+)_total ([0-9.e+]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_thirty_items_on_three_pictures_are_three_reads_three_decodes_and_three_encodings(
    client: Client, deployment: Deployment, s3: S3Endpoint, bucket: str
) -> None:
    for colour in COLOURS:
        s3.client().put_object(Bucket=bucket, Key=f"{colour}.png", Body=png(colour))
    encoded = counted(deployment).get("encoded_images", 0.0)
    batch = client.batches.submit(
        [
            {
                "custom_id": str(number),
                "prompt": f"what is this? ({number})",
                "images": [f"s3://{bucket}/{COLOURS[number % 3]}.png"],
            }
            for number in range(ITEMS)
        ],
        gen_config={"max_new_tokens": 4},
    )
    until(lambda: batch.refresh().counts.finished == ITEMS, 120, "the batch to end", every=0.2)
    assert [view.status for view in batch.results()] == [S.SUCCEEDED] * ITEMS

    answers = answers_of(s3, bucket)
    assert answers.count(200) == 3
    assert set(answers) <= {200, 304}, "the others were asked about, and not read"
    [worker] = deployment.workers
    decoded = re.findall(r"decoding image ([0-9a-f]{64})", worker.log.read_text())
    assert len(decoded) == len(set(decoded)) == 3
    counters = until(
        lambda: (
            found if (found := counted(deployment)).get("requests_finished", 0.0) >= ITEMS else None
        ),
        20,
        "the engine's report",
    )
    assert counters["encoded_images"] - encoded == 3

    pixels = f"{NAME_PREFIX.removeprefix('/')}{worker.process.pid}-*"
    assert len(list(SHARED_MEMORY.glob(pixels))) == 3, "they are kept for others"
    worker.terminate()
    worker.process.wait(60)
    assert list(SHARED_MEMORY.glob(pixels)) == []
