"""Batches: counters that equal their rows, the window, cancellation."""

from __future__ import annotations

from collections import Counter

from models import batches, dispatch, jobs
from models.tables import Batch
from models.views import batch_view
from tests.models.conftest import PERMANENT, World
from visq.types import BatchStatus
from visq.types import JobStatus as S


def ids(world: World, batch_id: str) -> list[str]:
    from models.reading import list_jobs

    rows = world.database.read(list_jobs, batch_id=batch_id, limit=1000)
    return [job.id for job in sorted(rows, key=lambda job: job.position or 0)]


def batch(world: World, batch_id: str) -> Batch:
    return world.database.read(batches.get, batch_id)


def fill(world: World, window: int) -> list[str]:
    """Fill the windows and take what became due, as the maintenance loop does."""
    world.database.run(batches.fill_windows, window)
    due = world.database.run(dispatch.reserve_due, limit=1000, republish_seconds=3600)
    return [job.id for job in due]


def test_counters_equal_the_rows_and_the_last_end_completes_the_batch(world: World) -> None:
    batch_id = world.submit_batch(3)
    first, second, third = ids(world, batch_id)
    world.succeed(first)
    world.finish(world.claimed(second), PERMANENT)
    assert batch(world, batch_id).status is BatchStatus.IN_PROGRESS
    world.database.run(jobs.cancel, third)

    view = batch_view(batch(world, batch_id))
    assert view.status is BatchStatus.COMPLETED
    assert view.finished_at is not None
    counted = Counter(world.statuses(batch_id=batch_id))
    assert view.counts.model_dump() == {
        "total": 3,
        "succeeded": counted[S.SUCCEEDED],
        "failed": counted[S.FAILED],
        "cancelled": counted[S.CANCELLED],
        "expired": 0,
    }


def test_only_a_window_of_each_batch_is_in_the_broker_and_room_is_filled(world: World) -> None:
    large, small = world.submit_batch(10), world.submit_batch(2)
    first_of_large = ids(world, large)
    assert fill(world, 4) == sorted([*first_of_large[:4], *ids(world, small)])
    assert fill(world, 4) == []

    world.succeed(first_of_large[0])
    world.claimed(first_of_large[1])
    assert fill(world, 4) == first_of_large[4:6]


def test_a_cancelled_batch_starts_nothing_more_and_ends_in_chunks(world: World) -> None:
    batch_id = world.submit_batch(5)
    running, queued, *_ = ids(world, batch_id)
    work = world.claimed(running)
    world.database.run(batches.request_cancel, batch_id)

    assert world.claim(queued) is None
    [renewed] = world.database.run(jobs.renew, [work.claim], lease_seconds=30)
    assert renewed.cancel_requested
    while chunk := world.database.read(batches.pending_of_cancelled, 2):
        for job_id in chunk:
            world.database.run(jobs.cancel, job_id)
    assert batch(world, batch_id).status is BatchStatus.CANCELLING
    world.finish(work, PERMANENT)
    assert batch(world, batch_id).status is BatchStatus.CANCELLED
    assert batch(world, batch_id).cancelled == 4


def test_retrying_an_item_opens_its_batch_again(world: World) -> None:
    batch_id = world.submit_batch(1)
    [item] = ids(world, batch_id)
    world.finish(world.claimed(item), PERMANENT)
    assert batch(world, batch_id).status is BatchStatus.COMPLETED

    world.database.run(jobs.retry, item)
    assert batch(world, batch_id).status is BatchStatus.IN_PROGRESS
    world.succeed(item)
    assert batch_view(batch(world, batch_id)).counts.succeeded == 1
    assert batch(world, batch_id).status is BatchStatus.COMPLETED


def test_items_take_the_gen_config_of_the_batch_unless_they_give_their_own(world: World) -> None:
    own = {"custom_id": "own", "prompt": "x", "gen_config": {"max_new_tokens": 7}}
    batch_id = world.submit_batch(
        0,
        items=[{"custom_id": "default", "prompt": "x"}, own],
        gen_config={"max_new_tokens": 99},
    )
    default, own_id = ids(world, batch_id)
    assert world.claimed(default).prompt.gen_config.max_new_tokens == 99
    assert world.claimed(own_id).prompt.gen_config.max_new_tokens == 7
