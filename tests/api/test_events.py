"""``GET /v1/jobs/{id}/events``: Server-Sent Events, live, resumed and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.api.conftest import settings_for
from tests.api.running import PlayedWorker, RunningApi, Sent, events_of
from tests.api.test_jobs import submit
from tests.waiting import until
from visq.streams import events_key, notify_channel


def follow(client: httpx2.Client, job_id: str, last: str | None = None) -> list[Sent]:
    """All events until the stream ends."""
    headers = {} if last is None else {"Last-Event-ID": last}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_of(response))


def said(events: list[Sent]) -> str:
    """The text that a reader has at the end who does what the events say."""
    text = ""
    for event in events:
        if event.event == "attempt":
            text = ""
        elif event.event == "token":
            text += event.data["text"]
    return text


def test_tokens_come_as_they_are_said_and_then_the_end(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        claim = worker.begin(job["id"])
        assert next(events).event == "attempt"
        worker.say(claim, "Thr")
        assert next(events).data == {"attempt": 1, "text": "Thr"}
        worker.say(claim, "ee.")
        assert next(events).data["text"] == "ee."
        worker.succeed(claim, "Three.")
        end = next(events)
        assert end.event == "end"
        assert end.data["status"] == "succeeded"
        assert end.data["result"]["text"] == "Three."
        assert list(events) == []


def texts_of(events: list[Sent]) -> dict[int, str]:
    """The text of each choice that a reader has at the end."""
    texts: dict[int, str] = {}
    for event in events:
        if event.event == "attempt":
            texts = {}
        elif event.event == "token":
            index = event.data.get("index", 0)
            texts[index] = texts.get(index, "") + event.data["text"]
    return texts


def test_several_choices_come_mixed_and_each_but_the_first_with_its_index(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client, gen_config={"n": 2})
    claim = worker.begin(job["id"])
    for index, text in [(0, "Thr"), (1, "Fo"), (0, "ee."), (1, "ur.")]:
        worker.say(claim, text, index)
    worker.succeed(claim, "Three.", "Four.")
    live = follow(client, job["id"])
    tokens = [event.data for event in live if event.event == "token"]
    assert tokens[:2] == [
        {"attempt": 1, "text": "Thr"},
        {"attempt": 1, "text": "Fo", "index": 1},
    ]
    assert texts_of(live) == {0: "Three.", 1: "Four."}

    worker.courier.redis.delete(events_key(job["id"]))
    assert texts_of(follow(client, job["id"])) == {0: "Three.", 1: "Four."}


def test_an_ended_job_replays(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.answer(job["id"], "Three.")
    events = follow(client, job["id"])
    assert [event.event for event in events] == ["attempt", "token", "end"]
    assert said(events) == "Three."
    assert events[-1].data == client.get(f"/v1/jobs/{job['id']}").json()


def test_an_ended_job_replays_from_its_row_when_the_stream_is_gone(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    worker.answer(job["id"], "Three.")
    seen = follow(client, job["id"])
    worker.courier.redis.delete(events_key(job["id"]))
    events = follow(client, job["id"])
    assert [event.event for event in events] == ["attempt", "token", "end"]
    assert events[-1].data == seen[-1].data
    # Who had a part of the text has the whole of it, and not the part twice.
    resumed = follow(client, job["id"], last=seen[1].id)
    assert said([*seen[:2], *resumed]) == "Three."


def test_a_stream_that_lost_its_beginning_is_told_from_the_row(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    worker.answer(job["id"], "Three.")
    worker.courier.redis.xtrim(events_key(job["id"]), maxlen=2, approximate=False)
    assert said(follow(client, job["id"])) == "Three."


@pytest.mark.parametrize("seen", [1, 2])
def test_a_reader_resumes_after_the_last_event_that_it_has_seen(
    client: httpx2.Client, worker: PlayedWorker, seen: int
) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    worker.say(claim, "Thr")
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        reading = events_of(response)
        first = [next(reading) for _ in range(seen)]
    worker.say(claim, "ee.")
    worker.succeed(claim, "Three.")
    rest = follow(client, job["id"], last=first[-1].id)
    assert said([*first, *rest]) == "Three."
    ids = [event.id for event in [*first, *rest]]
    assert len(set(ids)) == len(ids) == 4


def test_a_reader_that_has_seen_the_end_is_told_not_to_come_back(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    worker.answer(job["id"])
    end = follow(client, job["id"])[-1]
    url = f"/v1/jobs/{job['id']}/events"
    assert client.get(url, headers={"Last-Event-ID": end.id}).status_code == 204
    worker.courier.redis.delete(events_key(job["id"]))
    end = follow(client, job["id"])[-1]
    assert client.get(url, headers={"Last-Event-ID": end.id}).status_code == 204


@pytest.mark.parametrize("last", ["", "nonsense", "1-2-3", f"{'9' * 40}-0", "-", "+", "$"])
def test_an_event_id_that_is_none_is_ignored(
    client: httpx2.Client, worker: PlayedWorker, last: str
) -> None:
    job = submit(client)
    worker.answer(job["id"])
    assert len(follow(client, job["id"], last=last)) == 3


def test_a_second_attempt_discards_the_text_of_the_first(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    worker.say(claim, "Fou")
    worker.fail(claim)
    client.post(f"/v1/jobs/{job['id']}/retry")
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        before = [next(events), next(events)]
        worker.answer(job["id"], "Three.")
        rest = list(events)
    # The first end, a failure, is not shown: the job has gone on.
    assert [event.event for event in rest] == ["attempt", "token", "end"]
    assert said([*before, *rest]) == "Three."


def test_a_run_that_has_lost_its_job_is_not_heard_any_more(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client)
    lost = worker.begin(job["id"])
    worker.say(lost, "Th")
    worker.fail(lost)
    client.post(f"/v1/jobs/{job['id']}/retry")
    claim = worker.begin(job["id"])
    worker.say(claim, "Thr")
    worker.say(lost, "ree or four")
    worker.say(claim, "ee.")
    worker.succeed(claim, "Three.")
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert said(list(events_of(response))) == "Three."


def test_a_repeated_end_is_shown_once(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    worker.answer(job["id"])
    worker.courier.events.end(client.get(f"/v1/jobs/{job['id']}").json())
    assert [event.event for event in follow(client, job["id"])] == ["attempt", "token", "end"]


def test_a_cancelled_job_ends_its_stream(client: httpx2.Client) -> None:
    job = submit(client)
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        client.post(f"/v1/jobs/{job['id']}/cancel")
        end = next(events)
    assert end.event == "end"
    assert end.data["status"] == "cancelled"


def test_a_reader_that_leaves_is_forgotten(client: httpx2.Client, worker: PlayedWorker) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    channel = notify_channel(job["id"])

    def readers() -> int:
        return int(worker.courier.redis.pubsub_numsub(channel)[0][1])

    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        events = events_of(response)
        assert next(events).event == "attempt"
        until(lambda: readers() == 1, 10, "the subscription")

    def has_gone() -> bool:
        worker.say(claim, "x")  # it is noticed by writing to the connection
        return readers() == 0

    until(has_gone, 20, "the subscription to end")
    worker.succeed(claim)


def test_a_silent_stream_is_kept_alive(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.events.KEEP_ALIVE_SECONDS", 0.05)
    job = submit(client)
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert next(response.iter_lines()).startswith(":")


@pytest.fixture(scope="module")
def other_process(api: RunningApi) -> Iterator[RunningApi]:
    """A second API on the same servers."""
    settings = api.settings
    with RunningApi(settings_for(settings.database, settings.redis, settings.data)) as running:
        yield running


def test_another_api_process_goes_on_with_the_stream(
    client: httpx2.Client, other_process: RunningApi, worker: PlayedWorker, secret: str
) -> None:
    job = submit(client)
    claim = worker.begin(job["id"])
    worker.say(claim, "Thr")
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        reading = events_of(response)
        first = [next(reading), next(reading)]
    with other_process.client(secret) as elsewhere:
        url = f"/v1/jobs/{job['id']}/events"
        with elsewhere.stream("GET", url, headers={"Last-Event-ID": first[-1].id}) as response:
            worker.say(claim, "ee.")
            worker.succeed(claim, "Three.")
            rest = list(events_of(response))
    assert said([*first, *rest]) == "Three."
