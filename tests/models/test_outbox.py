"""Events that could not be published: who is tried again, and when."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import outbox
from models.database import Database, db_now
from models.outbox import LONGEST_PAUSE, OutboxEntry, pause_after
from models.tables import Outbox
from tests.models.conftest import World


@pytest.fixture
def entry(world: World) -> OutboxEntry:
    """An event whose process did not publish it."""
    [entry] = world.succeed(world.submit().id).events
    pass_time(world.database)
    return entry


def pass_time(database: Database) -> None:
    database.run(lambda session: session.execute(update(Outbox).values(available_at=db_now(-1.0))))


def due_in(database: Database) -> float:
    """Seconds until the only entry is due."""

    def look(session: Session) -> float:
        at, now = session.execute(select(Outbox.available_at, db_now())).one()
        return (at - now).total_seconds()

    return database.read(look)


def test_an_event_that_is_refused_comes_again_later_each_time(
    world: World, entry: OutboxEntry
) -> None:
    for seconds in (5, 10, 20, 40, 80, 120, 120):
        [reserved] = world.database.run(outbox.reserve, 10)
        world.database.run(outbox.postpone, [outbox.refused(reserved)])
        assert seconds - 3 < due_in(world.database) <= seconds
        assert world.database.run(outbox.reserve, 10) == []
        pass_time(world.database)


def test_pauses_have_an_end() -> None:
    assert pause_after(10_000) == LONGEST_PAUSE


def test_an_event_that_was_not_tried_is_due_at_once_and_no_pause_grows(
    world: World, entry: OutboxEntry
) -> None:
    for _ in range(3):
        [reserved] = world.database.run(outbox.reserve, 10)
        assert (reserved.id, reserved.tries) == (entry.id, 1)
        world.database.run(outbox.postpone, [outbox.released(reserved)])


def test_who_no_longer_holds_an_event_does_not_move_it(world: World, entry: OutboxEntry) -> None:
    [slow] = world.database.run(outbox.reserve, 10)
    pass_time(world.database)
    [held] = world.database.run(outbox.reserve, 10)
    for late in (entry, slow):
        world.database.run(outbox.postpone, [outbox.released(late)])
        assert world.database.run(outbox.reserve, 10) == [], "it is another's now"
    world.database.run(outbox.settle, [held.id], [outbox.refused(slow)])
    pass_time(world.database)
    assert world.database.run(outbox.reserve, 10) == []
