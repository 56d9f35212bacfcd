"""Batches: counters that equal their rows, the window, cancellation."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from models import batch_windows, batches, dispatch, jobs
from models.database import Database
from models.tables import Batch, Job
from models.views import batch_view
from tests.models.conftest import PERMANENT, World
from visq.errors import NotRetriable
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
    world.database.run(batch_windows.fill_windows, window)
    due = world.database.run(dispatch.reserve_due, limit=1000, republish_seconds=3600)
    return [each.job.id for each in due]


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


def test_batches_take_turns_in_one_window_and_room_in_it_is_filled(world: World) -> None:
    large, small = world.submit_batch(10), world.submit_batch(2)
    of_large, of_small = ids(world, large), ids(world, small)
    assert fill(world, 4) == sorted([*of_large[:2], *of_small])
    assert fill(world, 4) == []

    world.claimed(of_large[0])
    assert fill(world, 4) == [], "an item that runs takes its place in the window"
    world.succeed(of_small[0])
    assert fill(world, 4) == [of_large[2]]


def test_a_second_tenant_gets_every_turn_until_its_share_is_as_large(world: World) -> None:
    other = world.another_tenant("other")
    first = ids(world, world.submit_batch(20))
    assert fill(world, 6) == first[:6]
    batch_id = other.submit_batch(20)
    theirs = ids(other, batch_id)
    for done in range(3):
        world.succeed(first[done])
        assert fill(world, 6) == [theirs[done]]
    world.succeed(first[3])
    other.succeed(theirs[0])
    assert fill(world, 6) == [first[6], theirs[3]]


def test_many_batches_of_one_tenant_have_no_more_turns_than_one(world: World) -> None:
    other = world.another_tenant("other")
    several = [world.submit_batch(10) for _ in range(3)]
    one = other.submit_batch(10)
    filled = fill(world, 6)
    assert sorted(ids(other, one)[:3]) == sorted(set(filled) & set(ids(other, one)))
    assert all(len(set(filled) & set(ids(world, each))) == 1 for each in several)


def test_a_tenant_of_twice_the_weight_has_twice_the_turns(world: World) -> None:
    other = world.another_tenant("other")
    heavy, light = ids(world, world.submit_batch(20)), ids(other, other.submit_batch(20))
    world.database.run(batch_windows.fill_windows, 9, {world.tenant_id: 2.0})
    due = world.database.run(dispatch.reserve_due, limit=1000, republish_seconds=3600)
    assert sorted(each.job.id for each in due) == sorted([*heavy[:6], *light[:3]])


def test_a_batch_has_no_more_in_flight_than_it_may_and_the_others_have_the_rest(
    world: World,
) -> None:
    modest, other = world.submit_batch(10, max_in_flight=1), world.submit_batch(10)
    assert fill(world, 6) == sorted([*ids(world, modest)[:1], *ids(world, other)[:5]])


def test_turns_that_a_batch_cannot_use_go_to_the_others(world: World) -> None:
    short, long = world.submit_batch(1), world.submit_batch(10)
    assert fill(world, 8) == sorted([*ids(world, short), *ids(world, long)[:7]])


def test_items_with_the_same_image_start_together(world: World) -> None:
    pictures = ["a", "b", "c", "a", "b", "a"]
    batch_id = world.submit_batch(
        0,
        items=[
            {"custom_id": str(n), "prompt": "x", "images": [f"s3://photos/{name}.png"]}
            for n, name in enumerate(pictures)
        ],
    )
    items = ids(world, batch_id)
    assert fill(world, 3) == sorted([items[0], items[3], items[5]])
    for done in (items[0], items[3], items[5]):
        world.succeed(done)
    assert fill(world, 3) == sorted([items[1], items[4], items[2]])


def test_no_more_is_taken_than_asked_for(world: World) -> None:
    world.submit_batch(12)
    assert world.database.run(batch_windows.fill_windows, 8) == 8
    for expected in (3, 3, 2):
        due = world.database.run(dispatch.reserve_due, limit=3, republish_seconds=3600)
        assert len(due) == expected


def test_a_cancelled_batch_starts_nothing_more_and_ends_in_chunks(world: World) -> None:
    batch_id = world.submit_batch(5)
    running, queued, *_ = ids(world, batch_id)
    work = world.claimed(running)
    world.database.run(batches.request_cancel, batch_id)

    assert world.claim(queued) is None
    while chunk := world.database.read(batches.to_cancel, 2):
        for job_id in chunk:
            world.database.run(jobs.cancel, job_id)
    [renewed] = world.database.run(jobs.renew, [work.claim], lease_seconds=30)
    assert renewed.cancel_requested
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


def test_a_retry_does_not_call_off_the_cancellation_of_its_batch(world: World) -> None:
    batch_id = world.submit_batch(2)
    failed, _ = ids(world, batch_id)
    world.finish(world.claimed(failed), PERMANENT)
    world.database.run(batches.request_cancel, batch_id)

    with pytest.raises(NotRetriable, match="cancelled"):
        world.database.run(jobs.retry, failed)
    assert batch(world, batch_id).status is BatchStatus.CANCELLING
    assert batch(world, batch_id).failed == 1


@pytest.mark.parametrize(
    ("locked_by", "status"),
    [("cancel", BatchStatus.CANCELLING), ("fill", BatchStatus.IN_PROGRESS)],
)
def test_nothing_waits_for_an_item_while_it_holds_the_batch(
    world: World, locked_by: str, status: BatchStatus
) -> None:
    """An item's end locks the item, then the batch: who goes the other way meets a deadlock."""
    batch_id = world.submit_batch(2)
    first, second = ids(world, batch_id)
    if locked_by == "cancel":
        world.claimed(first)
    other = Database(world.database.engine.url.render_as_string(hide_password=False))

    def touch_the_batch() -> None:
        if locked_by == "cancel":
            other.run(batches.request_cancel, batch_id)
        else:
            other.run(batch_windows.fill_windows, 10)

    def end_an_item(session: Session) -> threading.Thread:
        session.scalars(select(Job).where(Job.id == first).with_for_update()).one()
        thread = threading.Thread(target=touch_the_batch)
        thread.start()
        # SQLite has one writer: there the other only comes after this one.
        thread.join(timeout=1.0 if world.database.engine.name == "sqlite" else 10.0)
        assert thread.is_alive() is (world.database.engine.name == "sqlite")
        return thread

    world.database.run(end_an_item).join()
    assert batch(world, batch_id).status is status
    if locked_by == "fill" and world.database.engine.name == "postgresql":
        due = world.database.run(dispatch.reserve_due, limit=10, republish_seconds=3600)
        assert [each.job.id for each in due] == [second], "the locked item comes in the next round"
    other.close()


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
