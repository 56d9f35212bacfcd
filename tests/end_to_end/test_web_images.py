"""Jobs with pictures of the web, through the API and a real worker."""

from __future__ import annotations

import io
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.deployment import Deployment
from tests.servers import Valkey
from tests.website import Visit, Website
from visq import Client
from visq.types import JobStatus as S
from visq.types import JobView

SHORT = {"max_new_tokens": 8}
SECRET = "signature=s3cret"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[Website]:
    with Website() as site:
        yield site


@pytest.fixture
def site(server: Website) -> Website:
    server.asked.clear()
    server.pages.clear()
    return server


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, server: Website
) -> Iterator[Deployment]:
    settings = {
        "redis_url": valkey.url,
        "broker_url": valkey.url,
        "max_attempts": "2",
        "image_url_hosts": server.host,
        "log_level": "DEBUG",
    }
    with Deployment(tmp_path_factory.mktemp("visq"), settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


def circle(colour: str = "red") -> bytes:
    image = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 90, 80), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: Client, *urls: str) -> JobView:
    return client.jobs.submit(
        "what color is the circle?", images=list(urls), gen_config=SHORT
    ).wait(60)


def error_of(job: JobView) -> str:
    """The code of a failed job, whose message shows no secret."""
    assert job.error is not None
    assert "s3cret" not in job.error.message
    return job.error.code


def test_a_picture_of_the_web_answers_as_the_same_one_from_an_upload_does(
    client: Client, site: Website
) -> None:
    site.show("/circle.png", circle())
    of_web = ask(client, site.url(f"/circle.png?{SECRET}"))
    assert of_web.status is S.SUCCEEDED, of_web.error
    of_upload = ask(client, client.images.upload(circle()).id)
    assert of_web.result is not None
    assert of_upload.result is not None
    assert of_web.result.text == of_upload.result.text != ""
    assert of_web.result.usage.images == 1


def test_a_server_that_fails_once_costs_no_job(client: Client, site: Website) -> None:
    def page(visit: Visit) -> None:
        visit.answer(500) if len(site.asked) < 4 else visit.answer(200, circle())

    job = ask(client, site.page("/failing.png", page))
    assert (job.status, job.attempt) == (S.SUCCEEDED, 2)


def test_a_picture_that_cannot_be_had_fails_its_job_with_a_code(
    client: Client, site: Website, deployment: Deployment
) -> None:
    with Website() as inside:
        inside.show("/a", circle())
        site.redirect("/inside", f"http://{inside.host}/a?{SECRET}")
        codes = {
            path: error_of(ask(client, site.url(f"{path}?{SECRET}")))
            for path in ("/missing", "/inside")
        }
        assert inside.asked == []
    assert codes == {"/missing": "image_not_found", "/inside": "image_forbidden"}


def test_a_picture_with_another_sha256_than_the_given_one_is_not_shown(
    client: Client, site: Website
) -> None:
    url = f"{site.show('/sha.png', circle())}?{SECRET}"

    def asked(data: bytes) -> JobView:
        part = {
            "type": "image_url",
            "image_url": {"url": url},
            "sha256": sha256(data).hexdigest(),
        }
        message = {"role": "user", "content": [part, {"type": "text", "text": "what is this?"}]}
        return client.jobs.submit(messages=[message], gen_config=SHORT).wait(60)

    assert asked(circle()).status is S.SUCCEEDED
    assert error_of(asked(circle("blue"))) == "image_changed"


@pytest.mark.parametrize("etag", ['"{}"', None])
def test_a_picture_of_a_session_that_changed_is_found_with_and_without_etags(
    client: Client, site: Website, etag: str | None
) -> None:
    path = f"/session-{etag is None}.png"
    site.show(path, circle(), etag and etag.format(1))
    session = client.sessions.create()
    url = site.url(f"{path}?{SECRET}")
    first = session.chat("what is this?", images=[url], gen_config=SHORT).wait(60)
    assert first.status is S.SUCCEEDED
    second = session.chat("what color is the circle?", gen_config=SHORT).wait(60)
    assert second.status is S.SUCCEEDED
    site.show(path, circle("blue"), etag and etag.format(2))
    third = session.chat("what color is it?", gen_config=SHORT).wait(60)
    assert error_of(third) == "image_changed"
    known = site.asked[1].headers.get("if-none-match")
    assert known == (etag and etag.format(1))


def test_no_log_shows_the_query_of_a_url(deployment: Deployment) -> None:
    """Of all that the tests above did, at the level ``DEBUG``."""
    logs = list(Path(deployment.folder).rglob("*.log"))
    text = "".join(path.read_text() for path in logs)
    assert "job" in text
    assert "s3cret" not in text
