"""Jobs through the whole of visq: what goes wrong with one picture stays with its job."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.deployment import API_KEY, Deployment
from tests.servers import Valkey
from tests.waiting import until
from visq import Client
from visq.errors import ImageForbidden, UnsupportedParameter
from visq.objects import ObjectStore, open_store, parse_uri
from visq.settings import Settings
from visq.types import JobStatus as S

SHORT = {"max_new_tokens": 8}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, valkey: Valkey) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("visq")
    settings = {
        "redis_url": valkey.url,
        "broker_url": valkey.url,
        "max_image_bytes": "200000",
        "max_attempts": "2",
        "api_keys": f"acme:{API_KEY},others:secret-of-others",
    }
    with Deployment(folder, settings) as deployment:
        deployment.start_worker()
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client


@pytest.fixture
def store(deployment: Deployment) -> ObjectStore:
    return open_store(Settings(data=deployment.folder))


def png(colour: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), colour).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def put(store: ObjectStore, uri: str, data: bytes) -> str:
    store.put(parse_uri(uri), data, "image/png")
    return uri


def test_a_job_with_several_pictures_in_several_forms_succeeds(
    client: Client, store: ObjectStore, tmp_path: Path
) -> None:
    path = tmp_path / "local.png"
    path.write_bytes(png("green", "P"))
    images = [put(store, "s3://photos/red one.png", png("red")), path, png("blue")]
    view = client.jobs.submit("what is this?", images=images, gen_config=SHORT).wait(60)
    assert view.status is S.SUCCEEDED
    assert view.result is not None
    assert view.result.usage.images == 3


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "image_not_found"),
        (b"this is no picture", "image_undecodable"),
        (png("red")[:60], "image_undecodable"),
        (png("red") + bytes(300_000), "image_too_large"),
    ],
)
def test_a_picture_that_cannot_be_used_fails_its_job_by_name(
    client: Client, store: ObjectStore, content: bytes | None, code: str
) -> None:
    uri = "s3://photos/missing.png"
    if content is not None:
        uri = put(store, f"s3://photos/{code}-{len(content)}.png", content)
    view = client.jobs.submit("what is this?", images=[uri], gen_config=SHORT).wait(60)
    assert view.status is S.FAILED
    assert view.error is not None
    assert view.error.code == code
    assert uri in view.error.message
    assert view.attempt == 1, "trying again would not help"


def test_one_bad_item_does_not_touch_the_rest_of_its_batch(
    client: Client, store: ObjectStore
) -> None:
    good = put(store, "s3://photos/good.png", png("red"))
    items = [
        {"custom_id": str(n), "prompt": "what is this?", "images": [uri], "gen_config": SHORT}
        for n, uri in enumerate([good, "s3://photos/none.png", good])
    ]
    batch = client.batches.submit(items)
    batch.wait(60)
    views = list(batch.results())
    assert [view.custom_id for view in views] == ["0", "1", "2"]
    assert [view.status for view in views] == [S.SUCCEEDED, S.FAILED, S.SUCCEEDED]


def test_a_picture_of_the_history_that_changed_fails_the_next_turn_unless_accepted(
    client: Client, store: ObjectStore
) -> None:
    uri = put(store, "s3://photos/changing.png", png("red"))
    session = client.sessions.create()
    assert session.chat("what is this?", images=[uri], gen_config=SHORT).wait(60).status is (
        S.SUCCEEDED
    )
    put(store, uri, png("blue"))
    failed = session.chat("and now?", gen_config=SHORT).wait(60)
    assert failed.error is not None
    assert failed.error.code == "image_changed"
    accepted = session.chat("and now?", gen_config=SHORT, on_image_change="accept").wait(60)
    assert accepted.status is S.SUCCEEDED
    assert accepted.result is not None
    assert accepted.result.usage.images == 1


def test_a_field_that_the_engine_cannot_honour_fails_the_job_by_its_name(client: Client) -> None:
    rhymes = {"response_format": {"type": "rhymes"}}
    view = client.jobs.submit("hello", gen_config=rhymes).wait(60)
    assert view.error is not None
    assert (view.error.code, view.error.param) == (
        "unsupported_parameter",
        "gen_config.response_format",
    )


def test_several_choices_with_logprobs_and_perplexity_come_back(client: Client) -> None:
    config = {**SHORT, "n": 3, "do_sample": True, "random_seed": 7, "logprobs": 2}
    job = client.jobs.submit("what is this?", gen_config={**config, "return_ppl": True})
    result = job.result(60)
    assert result.choices is not None
    assert len(result.choices) == 3
    assert result.choices[0].text == result.text
    generated = 0
    for choice in result.choices:
        assert choice.token_ids is not None
        assert choice.logprobs is not None
        for token, logprobs in zip(choice.token_ids, choice.logprobs, strict=True):
            assert token in logprobs
            assert 2 <= len(logprobs) <= 3
        generated += len(choice.token_ids)
    assert result.usage.completion_tokens == generated
    assert result.ppl is not None
    assert result.ppl > 0


def test_the_next_turn_finds_the_one_before_it_in_the_cache(client: Client) -> None:
    session = client.sessions.create()
    config = {"max_new_tokens": 80, "ignore_eos": True}  # more than a block of the cache
    first = session.chat("what color is the circle?", gen_config=config).result(60)
    second = session.chat("and the square?", gen_config=SHORT).result(60)
    assert first.usage.cached_tokens == 0
    # The tokens of the answer are those that were generated, or it would not be found.
    assert second.usage.cached_tokens > first.usage.prompt_tokens


def test_tenants_share_no_cache(client: Client, deployment: Deployment) -> None:
    prompt = "what color is the large circle at the left of the small square? " * 8
    assert client.jobs.submit(prompt, gen_config=SHORT).result(60).usage.cached_tokens == 0
    assert client.jobs.submit(prompt, gen_config=SHORT).result(60).usage.cached_tokens > 0
    with Client(deployment.url, "secret-of-others") as other:
        assert other.jobs.submit(prompt, gen_config=SHORT).result(60).usage.cached_tokens == 0


def test_logits_are_refused_before_they_are_queued(client: Client) -> None:
    with pytest.raises(UnsupportedParameter, match="logprobs"):
        client.jobs.submit("hello", gen_config={"output_logits": "all"})


def test_a_prompt_longer_than_the_context_fails_with_the_numbers(client: Client) -> None:
    view = client.jobs.submit("red " * 5000).wait(60)
    assert view.error is not None
    assert view.error.code == "context_length_exceeded"


def test_a_job_whose_time_is_over_while_it_runs_expires(client: Client) -> None:
    endless = {"max_new_tokens": 1900, "ignore_eos": True}
    view = client.jobs.submit("hello", gen_config=endless, expires_in=1.5).wait(60)
    assert view.status is S.EXPIRED


def test_another_tenants_upload_is_forbidden(client: Client, store: ObjectStore) -> None:
    uri = put(store, "s3://visq-uploads/somebody-else/cat.png", png("red"))
    with pytest.raises(ImageForbidden, match="somebody-else"):
        client.jobs.submit("what is this?", images=[uri])


def test_the_live_worker_shows_as_a_model(client: Client) -> None:
    [model] = until(lambda: list(client.models.list()), 10, "the model")
    assert (model.id, model.engine, model.workers) == ("small", "native", 1)
