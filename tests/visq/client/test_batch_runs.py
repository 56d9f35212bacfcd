"""``client.batches.run``, results and events while a batch runs: nothing missing, nothing twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress

import pytest

from tests.api.running import PlayedWorker, RunningApi
from tests.visq.client.faulty import Close, Cut, FaultyServer, LoseAnswer, Reply
from tests.waiting import until, until_async
from visq import AsyncClient, Client, errors
from visq.client import Batch
from visq.types import BatchStatus, JobStatus

TEN = [{"prompt": f"Item {number}"} for number in range(10)]


@pytest.fixture
async def awaiting(api: RunningApi, secret: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(api.url, secret) as made:
        yield made


def ids_of(client: Client, batch_id: str) -> dict[str, str]:
    return {job.custom_id or "": job.id for job in client.jobs.list(batch_id=batch_id)}


def only_batch(client: Client) -> str:
    [view] = client.batches.list()
    return view.id


def cancelled(client: Client, batch_id: str) -> bool:
    view = client.batches.get(batch_id).view
    return view.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)


# --- as they end -----------------------------------------------------------------------------


def test_a_run_gives_every_item_once_as_it_ends(client: Client, worker: PlayedWorker) -> None:
    run = client.batches.run(TEN[:3])
    assert run.id is None, "nothing is submitted before it is asked for"
    played = threading.Thread(target=_play, args=(client, worker))
    played.start()
    given = list(run)
    played.join()
    assert [job.custom_id for job in given] == ["2", "0", "1"]
    assert [job.status for job in given] == ["succeeded", "failed", "succeeded"]
    assert run.id == given[0].batch_id
    assert run.cursor == "3"


def _play(client: Client, worker: PlayedWorker) -> None:
    until(lambda: list(client.batches.list()), 30, "the batch")
    ids = ids_of(client, only_batch(client))
    worker.answer(ids["2"])
    worker.fail(worker.claim(ids["0"]))
    worker.answer(ids["1"])


def test_a_run_goes_over_pages(client: Client, answering: None) -> None:
    given = [job.custom_id for job in client.batches.run([{"prompt": "Why?"}] * 230)]
    assert len(given) == len(set(given)) == 230


def test_a_run_is_resumed_from_its_beginning_or_from_a_cursor(
    client: Client, answering: None
) -> None:
    batch = client.batches.submit(TEN)
    whole = [job.id for job in client.batches.run(batch_id=batch.id)]
    assert len(set(whole)) == 10
    run = client.batches.run(batch_id=batch.id)
    for _ in range(4):
        next(run)
    assert run.cursor == "4"
    rest = [job.id for job in client.batches.run(batch_id=batch.id, after=run.cursor)]
    assert rest == whole[4:]


def test_a_run_says_what_does_not_fit(client: Client) -> None:
    for wrong in (
        {"items": TEN, "batch_id": "bat_1"},
        {"batch_id": "bat_1", "lane": "batch"},
        {"items": TEN, "after": "1"},
        {"batch_id": "bat_1", "after": "job_1"},
    ):
        with pytest.raises(errors.InvalidRequest):
            client.batches.run(**wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.NotFound):
        next(client.batches.run(batch_id="bat_" + "0" * 32))


def test_an_item_that_runs_again_comes_with_its_next_end(
    client: Client, worker: PlayedWorker
) -> None:
    batch = client.batches.submit(TEN[:2])
    ids = ids_of(client, batch.id)
    worker.fail(worker.claim(ids["0"]))
    client.jobs.retry(ids["0"])
    worker.answer(ids["1"])
    run = client.batches.run(batch_id=batch.id)
    assert next(run).custom_id == "1"
    worker.answer(ids["0"])
    assert [(job.custom_id, job.status) for job in run] == [("0", JobStatus.SUCCEEDED)]


def test_a_run_outlives_faults(faulty: FaultyServer, secret: str, answering: None) -> None:
    with Client(faulty.url, secret, max_retries=1) as client:
        run = client.batches.run([{"prompt": "Why?"}] * 120)
        faulty.faults = [LoseAnswer()]
        given = [next(run).custom_id]
        faulty.faults = [Close(), Reply(503), Close(), LoseAnswer()]
        given += [job.custom_id for job in run]
        assert not faulty.faults
        assert len(given) == len(set(given)) == 120
        assert len(list(client.batches.list())) == 1


# --- leaving ---------------------------------------------------------------------------------


def _break(client: Client) -> None:
    for _ in client.batches.run(TEN):
        break


def _raise(client: Client) -> None:
    for _ in client.batches.run(TEN):
        raise ZeroDivisionError


def _interrupt(client: Client) -> None:
    for _ in client.batches.run(TEN):
        raise KeyboardInterrupt


def _leave_the_client(client: Client) -> None:
    key = client._runner._http.headers["authorization"].removeprefix("Bearer ")
    with Client(client.base_url, key) as other:
        run = other.batches.run(TEN)
        next(run)
    assert run.id is not None, "it is kept, and yet cancelled"


@pytest.mark.parametrize("leave", [_break, _raise, _interrupt, _leave_the_client])
def test_who_leaves_a_run_cancels_it(
    client: Client, worker: PlayedWorker, leave: Callable[[Client], None]
) -> None:
    played = threading.Thread(target=_answer_first, args=(client, worker))
    played.start()
    with suppress(ZeroDivisionError, KeyboardInterrupt):
        leave(client)
    played.join()
    assert cancelled(client, only_batch(client))


def _answer_first(client: Client, worker: PlayedWorker) -> None:
    until(lambda: list(client.batches.list()), 30, "the batch")
    worker.answer(ids_of(client, only_batch(client))["0"])


async def test_a_cancelled_task_cancels_its_run(
    awaiting: AsyncClient, client: Client, worker: PlayedWorker
) -> None:
    given = []

    async def follow() -> None:
        given.extend([job async for job in awaiting.batches.run(TEN)])

    task = asyncio.create_task(follow())
    await until_async(lambda: _any(awaiting), 30, "the batch")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled(client, only_batch(client))


async def test_a_run_that_is_left_while_it_is_submitted_leaves_no_batch(
    faulty: FaultyServer, secret: str, client: Client
) -> None:
    """The batch is there, though nobody was told its id."""
    faulty.faults = [LoseAnswer(), Reply(503, {"Retry-After": "60"})]
    async with AsyncClient(faulty.url, secret) as leaving:
        task = asyncio.create_task(anext(leaving.batches.run(TEN)))
        await until_async(_told_to_wait(faulty), 30, "the answer to be lost")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert cancelled(client, only_batch(client))


def _told_to_wait(faulty: FaultyServer) -> Callable[[], Awaitable[bool]]:
    async def told() -> bool:
        return not faulty.faults

    return told


async def _any(client: AsyncClient) -> bool:
    return bool([view async for view in client.batches.list() if client.batches._running])


async def test_an_async_run_that_is_left_is_cancelled_with_its_client(
    api: RunningApi, secret: str, client: Client, worker: PlayedWorker
) -> None:
    async with AsyncClient(api.url, secret) as leaving:
        played = asyncio.to_thread(_answer_first, client, worker)
        task = asyncio.create_task(played)
        async for _ in leaving.batches.run(TEN):
            break
        await task
    assert cancelled(client, only_batch(client))


async def test_an_async_run_gives_every_item_once(awaiting: AsyncClient, answering: None) -> None:
    run = awaiting.batches.run([{"prompt": "Why?"}] * 120)
    given = [job.custom_id async for job in run]
    assert len(given) == len(set(given)) == 120
    assert run.cursor == "120"
    rest = awaiting.batches.run(batch_id=run.id, after="100")
    assert len([job async for job in rest]) == 20


# --- results and events ----------------------------------------------------------------------


def test_results_go_on_after_a_cursor_in_both_orders(client: Client, worker: PlayedWorker) -> None:
    batch = client.batches.submit(TEN[:3])
    ids = ids_of(client, batch.id)
    for name in ("2", "0", "1"):
        worker.answer(ids[name])
    assert [job.custom_id for job in batch.results("ended")] == ["2", "0", "1"]
    assert [job.custom_id for job in batch.results("ended", after="2")] == ["1"]
    assert [job.custom_id for job in batch.results(after="0")] == ["1", "2"]


def test_blank_lines_of_a_file_leave_no_result_out(client: Client, answering: None) -> None:
    """They look as if an item were still running."""
    file = '{"custom_id": "a", "prompt": "A"}\n\n{"custom_id": "b", "prompt": "B"}\n\n'
    answer = client._runner._http.post(
        "/v1/files", files={"file": ("in.jsonl", file.encode())}, data={"purpose": "batch"}
    )
    batch = client.batches.submit(input_file_id=answer.json()["id"])
    assert [job.custom_id for job in batch.results()] == ["a", "b"]
    assert batch.counts.succeeded == 2


def test_events_tell_items_progress_and_the_end(client: Client, worker: PlayedWorker) -> None:
    batch = client.batches.submit(TEN[:2])
    ids = ids_of(client, batch.id)
    events = batch.events()
    assert next(events).type == "progress"
    worker.answer(ids["1"])
    worker.answer(ids["0"])
    told = list(events)
    items = [event for event in told if event.type == "item"]
    assert [event.job.custom_id for event in items if event.job] == ["1", "0"]
    assert told[-1].batch is not None
    assert told[-1].batch.counts.succeeded == 2
    again = [event.cursor for event in batch.events(after=items[0].cursor)]
    assert again == [items[1].cursor, None]
    assert [event.type for event in batch.events(items=False)] == ["end"]


def test_broken_events_go_on_where_they_broke(
    faulty: FaultyServer, secret: str, worker: PlayedWorker
) -> None:
    with Client(faulty.url, secret) as client:
        batch = client.batches.submit(TEN[:3])
        ids = ids_of(client, batch.id)
        worker.answer(ids["0"])
        faulty.faults = [Cut(after=b"event: item"), Reply(503), Close()]
        events = _items(batch)
        given = [next(events)]
        worker.answer(ids["1"])
        worker.answer(ids["2"])
        assert given + list(events) == ["0", "1", "2"]
    opened = [seen.headers.get("last-event-id") for seen in faulty.seen if "events" in seen.path]
    assert opened == [None, "1", "1", "1"]


def _items(batch: Batch) -> Iterator[str | None]:
    for event in batch.events():
        if event.job is not None:
            yield event.job.custom_id


async def test_async_events_end(awaiting: AsyncClient, answering: None) -> None:
    batch = await awaiting.batches.submit(TEN)
    told = [event.type async for event in batch.events()]
    assert told.count("item") == 10
    assert told[-1] == "end"


def test_a_wait_ends_at_every_end(client: Client) -> None:
    """Also when there is nothing to count: a file that cannot be read."""
    answer = client._runner._http.post(
        "/v1/files", files={"file": ("in.jsonl", b"\x00\x01")}, data={"purpose": "batch"}
    )
    batch = client.batches.submit(input_file_id=answer.json()["id"])
    ended = batch.wait(timeout=60)
    assert ended.status is BatchStatus.FAILED
    assert ended.errors is not None
    assert list(batch.results()) == []
    assert list(client.batches.run(batch_id=batch.id)) == []
