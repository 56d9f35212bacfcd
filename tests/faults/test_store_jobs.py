"""Jobs whose pictures lie in a store that fails: tried again where that may help, failed with a
stable code where not; and the engine is nobody's while pictures are fetched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from hashlib import sha256

import pytest
from PIL import Image

from tests.deployment import Deployment
from tests.faults.store import Fault, LyingStore, Shorten, Silence, Slow
from tests.servers import S3Endpoint, Valkey
from tests.waiting import until
from visq import Client
from visq.client import Session
from visq.types import ImagePart, JobEventView
from visq.types import JobStatus as S

SHORT = {"max_new_tokens": 4}
BUCKET = "pictures-of-jobs"
RUNS = 6
"""Jobs that the worker holds at a time."""

pytestmark = pytest.mark.timeout(180)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Pictures:
    """A bucket behind the proxy."""

    def __init__(self, s3: S3Endpoint) -> None:
        self._client = s3.client()
        s3.create_bucket(BUCKET)

    def put(self, key: str, data: bytes) -> str:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture(scope="module")
def pictures(s3: S3Endpoint) -> Pictures:
    return Pictures(s3)


@pytest.fixture(scope="module")
def lying(s3: S3Endpoint) -> Iterator[LyingStore]:
    with LyingStore(s3) as lying:
        yield lying


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, lying: LyingStore
) -> Iterator[Deployment]:
    store = {name.removeprefix("VISQ_").lower(): v for name, v in lying.environment.items()}
    settings = {
        "redis_url": valkey.url,
        "broker_url": valkey.url,
        "concurrency": str(RUNS),
        "fetch_timeout_seconds": "0.5",
        "fetch_total_seconds": "1.5",
        "max_attempts": "3",
        **store,
    }
    with Deployment(tmp_path_factory.mktemp("visq"), settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def well(lying: LyingStore) -> Iterator[LyingStore]:
    """The store, which tells the truth until the test says otherwise."""
    yield lying
    lying.heal()


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


def states(history: list[JobEventView]) -> list[S]:
    return [event.to_status for event in history]


@pytest.mark.parametrize("fault", [Silence(), Slow(between=0.2), Shorten()], ids=repr)
def test_a_job_whose_picture_does_not_come_is_tried_again_and_succeeds_when_the_store_is_well(
    well: LyingStore, client: Client, pictures: Pictures, fault: Fault
) -> None:
    # (A name of its own: the worker keeps what it has read.)
    url = pictures.put(key := f"{type(fault).__name__}.png", png("red"))
    well.lie(fault, f"{BUCKET}/{key}")
    job = client.jobs.submit(prompt="what is this?", images=[url], gen_config=SHORT)
    until(lambda: states(job.history()).count(S.QUEUED) == 2, 20, "the first failure")
    well.heal()
    view = job.wait(60)
    assert view.status is S.SUCCEEDED
    assert view.result is not None
    assert view.result.usage.images == 1
    history = job.history()
    assert states(history) == [S.QUEUED, S.RUNNING, S.QUEUED, S.RUNNING, S.SUCCEEDED]
    assert "could not be fetched" in (history[2].reason or "")


def test_a_store_that_stays_away_is_a_failed_job_after_its_attempts(
    well: LyingStore, client: Client, pictures: Pictures
) -> None:
    url = pictures.put("away.png", png("red"))
    well.lie(Silence(), f"{BUCKET}/")
    view = client.jobs.submit(prompt="?", images=[url], gen_config=SHORT).wait(60)
    assert view.status is S.FAILED
    assert view.attempt == 3
    assert view.error is not None
    assert view.error.code == "image_fetch_failed"


def test_a_picture_that_is_gone_fails_its_job_at_the_first_attempt(
    well: LyingStore, client: Client, pictures: Pictures
) -> None:
    url = pictures.put("gone.png", png("red"))
    pictures.delete("gone.png")
    view = client.jobs.submit(prompt="?", images=[url], gen_config=SHORT).wait(60)
    assert (view.status, view.attempt) == (S.FAILED, 1)
    assert view.error is not None
    assert view.error.code == "image_not_found"


def shown(session: Session) -> list[str | None]:
    """The hashes of the session's pictures."""
    return [
        part.sha256
        for stored in session.messages()
        for part in stored.content
        if isinstance(part, ImagePart)
    ]


def test_a_picture_that_changes_between_submit_and_run_is_seen_as_it_is_at_the_run(
    well: LyingStore, client: Client, pictures: Pictures
) -> None:
    """And the session remembers what was seen: a later change is found."""
    url = pictures.put("changing.png", png("red"))
    well.lie(Silence(), f"{BUCKET}/changing.png")
    session = client.sessions.create()
    job = session.chat("what is this?", images=[url], gen_config=SHORT)
    until(lambda: S.RUNNING in states(job.history()), 20, "the first attempt")
    pictures.put("changing.png", png("blue"))
    well.heal()
    assert job.wait(60).status is S.SUCCEEDED
    assert shown(session) == [sha256(png("blue")).hexdigest()]

    pictures.put("changing.png", png("green"))
    view = session.chat("and now?", gen_config=SHORT).wait(60)
    assert view.error is not None
    assert (view.error.code, view.attempt) == ("image_changed", 1)


def test_jobs_without_pictures_there_are_answered_while_others_wait_for_the_store(
    well: LyingStore, client: Client, pictures: Pictures
) -> None:
    """The engine is not held, nor are the worker's threads that are left."""
    urls = [pictures.put(f"{number}.png", png("red")) for number in range(RUNS - 2)]
    other = pictures.put("other.png", png("red"))
    for number in range(RUNS - 2):
        well.lie(Slow(first_byte=0.9), f"{BUCKET}/{number}.png")
    slow = [client.jobs.submit(prompt="?", images=[url], gen_config=SHORT) for url in urls]
    until(lambda: sum(well.inside.values()) >= len(urls), 20, "all of them to fetch", 0.005)
    for images in ([], [other]):
        view = client.jobs.submit(prompt="hello", images=images, gen_config=SHORT).wait(20)
        assert view.status is S.SUCCEEDED
    assert all(job.refresh().status in (S.RUNNING, S.QUEUED) for job in slow)
    well.heal()
    assert all(job.wait(60).status is S.SUCCEEDED for job in slow)
