"""`visq.AsyncClient` against the real API: the same calls as `visq.Client`, with ``await``."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image

from tests.api.running import PlayedWorker, RunningApi
from tests.visq.client.faulty import Close, Cut, FaultyServer, LoseAnswer
from visq import AsyncClient, errors
from visq.client import async_batches, async_client, sync_batches, sync_client


@pytest.fixture
async def client(api: RunningApi, secret: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(api.url, secret) as made:
        yield made


async def test_a_job_is_submitted_answered_and_listed(
    client: AsyncClient, answering: None, tmp_path: Path
) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (2, 2), "red").save(path)
    job = await client.jobs.submit("How many?", images=[path, path])
    result = await job.result()
    assert result.text == "You asked: How many?"
    assert result.usage.images == 2
    assert [found.id async for found in client.jobs.list()] == [job.id]
    assert len(await job.history()) == 3
    assert (await (await client.jobs.get(job.id)).wait()).status == "succeeded"


async def test_a_session_continues(client: AsyncClient, answering: None) -> None:
    session = await client.sessions.create()
    for prompt in ("First", "Second"):
        job = await session.chat(prompt)
        assert "".join([piece async for piece in job.stream()]).strip() == f"You asked: {prompt}"
    assert (await session.refresh()).turns == 2
    fork = await session.fork(1)
    assert len([message async for message in fork.messages()]) == 2
    await session.delete()
    assert [found.id async for found in client.sessions.list()] == [fork.id]


async def test_a_batch_gives_its_results_in_input_order(
    client: AsyncClient, answering: None
) -> None:
    batch = await client.batches.submit([{"prompt": str(number)} for number in range(120)])
    counts = []
    await batch.wait(on_progress=counts.append)
    assert counts[-1].succeeded == 120
    assert [job.custom_id async for job in batch.results()] == [str(n) for n in range(120)]
    assert [found.id async for found in client.batches.list()] == [batch.id]


async def test_errors_are_typed(client: AsyncClient) -> None:
    with pytest.raises(errors.NotFound):
        await client.jobs.get("job_" + "0" * 32)
    job = await client.jobs.submit("How many?")
    with pytest.raises(TimeoutError):
        await job.wait(timeout=0.1)
    await job.cancel()
    with pytest.raises(errors.JobCancelled):
        await job.result()


async def test_a_lost_answer_makes_one_job(faulty: FaultyServer, secret: str) -> None:
    faulty.faults = [LoseAnswer(), Close()]
    async with AsyncClient(faulty.url, secret) as client:
        job = await client.jobs.submit("How many?")
        assert [found.id async for found in client.jobs.list()] == [job.id]


async def test_a_broken_stream_goes_on_where_it_broke(
    faulty: FaultyServer, secret: str, worker: PlayedWorker
) -> None:
    async with AsyncClient(faulty.url, secret) as client:
        job = await client.jobs.submit("How many?")
        claim = worker.begin(job.id)
        faulty.faults = [Cut(after=b"Two")]
        pieces = job.stream()
        worker.say(claim, "Two")
        assert await anext(pieces) == "Two"
        worker.say(claim, " cats")
        worker.succeed(claim, "Two cats")
        assert "".join([piece async for piece in pieces]) == " cats"


@pytest.mark.parametrize(
    ("blocking", "awaiting"),
    [
        (getattr(sync, name), getattr(awaited, f"Async{name}"))
        for sync, awaited, names in (
            (sync_client, async_client, ("Client", "Job", "Jobs", "Session", "Sessions")),
            (sync_batches, async_batches, ("Batch", "BatchRun", "Batches")),
        )
        for name in names
    ],
)
def test_both_clients_have_the_same_calls(blocking: type, awaiting: type) -> None:

    def calls(kind: type) -> dict[str, list[str]]:
        return {
            call: list(inspect.signature(function).parameters)
            for call, function in inspect.getmembers(kind, inspect.isfunction)
            if not call.startswith("_") or call == "__init__"
        }

    assert calls(blocking) == calls(awaiting)
