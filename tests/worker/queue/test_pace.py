"""Batches give way to chat while it waits longer than by itself, and to nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from sqlalchemy import update
from sqlalchemy.orm import Session

from models import latest
from models.database import Database, db_now
from models.tables import Job
from tests.models.conftest import World
from visq.settings import Settings
from visq.streams import WorkerInfo
from worker.queue import pace
from worker.queue.pace import Pace
from worker.queue.window import WITHOUT_WORKERS, Window, room_of


def after(start: Pace, *seen: list[float], minute: int = 0) -> Pace:
    for waits in seen:
        start = start.after(waits, minute)
    return start


ALONE = [0.010, 0.011, 0.012]
LONG = [0.040, 0.041, 0.090]


def test_without_chat_the_window_is_whole() -> None:
    assert after(Pace(), [], [0.5], []).share == 1.0


def test_waits_as_they_are_alone_change_nothing() -> None:
    assert after(Pace(), ALONE, ALONE, ALONE).share == 1.0


def test_longer_waits_shrink_it_but_never_to_nothing() -> None:
    known = after(Pace(), ALONE)
    once = after(known, LONG)
    assert once.share == pytest.approx(pace.SHRINK)
    assert after(known, *[LONG] * 50).share == pace.LEAST


def test_it_grows_again_when_waits_are_short_or_nobody_chats() -> None:
    small = after(Pace(), ALONE, *[LONG] * 50)
    assert after(small, ALONE).share == pytest.approx(pace.LEAST + pace.GROW)
    assert after(small, *[[]] * 40).share == 1.0


def test_what_nobody_notices_is_not_longer() -> None:
    assert after(Pace(), [0.001] * 3, [0.004] * 3).share == 1.0


def test_the_lowest_wait_is_forgotten_after_half_an_hour() -> None:
    known = after(Pace(), ALONE, minute=0)
    slower = [0.030] * 3
    assert known.after(slower, pace.REMEMBERED - 1).share < 1.0
    assert known.after(slower, pace.REMEMBERED).share == 1.0


def test_one_process_changes_the_pace_and_all_follow(
    world: World, redis_url: str, tmp_path: Path
) -> None:
    client = redis.Redis.from_url(redis_url)
    client.delete(pace.PACE_KEY, pace.TURN_KEY)
    worker = WorkerInfo(
        id="w", model="m", engine="e", device="d", dtype="-", concurrency=64, in_flight=0
    )
    settings = Settings(data=tmp_path, redis_url=redis_url, broker_url=redis_url)
    pace.write(client, after(Pace(), ALONE, minute=pace.this_minute()))
    for _ in range(pace.ENOUGH):
        world.succeed(world.submit().id)
    world.database.run(_came_earlier, 1.0)

    first, second = (Window(settings, world.database, client, lambda _: [worker]) for _ in "12")
    assert room_of([worker]) == 56
    assert first.most() == round(56 * pace.SHRINK)
    assert second.most() == first.most()
    client.close()


def test_without_redis_the_window_stays_as_it_was(world: World, tmp_path: Path) -> None:
    url = "redis://127.0.0.1:1/0"
    settings = Settings(data=tmp_path, redis_url=url, broker_url=url)
    client = redis.Redis.from_url(url)
    assert Window(settings, world.database, client).most() == WITHOUT_WORKERS


def test_only_the_latest_chats_are_looked_at(world: World, database: Database) -> None:
    old, other, waits, ended = (
        world.submit().id,
        world.submit(lane="standard").id,
        world.submit().id,
        world.submit().id,
    )
    world.succeed(ended)
    turn = world.submit(session={})
    world.submit(session_id=turn.session_id)  # for an earlier turn, not for a worker
    database.run(_came_earlier, 60.0, old)
    found = database.read(latest.chat_waits, 10.0)
    assert len(found) == 3, (other, waits)
    assert all(0 <= wait < 10 for wait in found)


def _came_earlier(session: Session, seconds: float, *job_ids: str) -> None:
    statement = update(Job).values(created_at=db_now(-seconds))
    if job_ids:
        statement = statement.where(Job.id.in_(job_ids))
    session.execute(statement)
