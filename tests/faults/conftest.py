"""A round that was played without processes, for the tests of the checker."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from models.database import Database
from tests.faults.played_round import Played, play


@pytest.fixture(scope="session")
def played_database(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Played]:
    path = tmp_path_factory.mktemp("played") / "visq.db"
    return path, play(path)


@pytest.fixture
def played(played_database: tuple[Path, Played], tmp_path: Path) -> Iterator[Played]:
    """A copy that a test may spoil."""
    path, origin = played_database
    database = Database(f"sqlite:///{tmp_path / 'visq.db'}")
    (tmp_path / "visq.db").write_bytes(path.read_bytes())
    yield replace(
        origin,
        database=database,
        ledger=copy.deepcopy(origin.ledger),
        evidence=copy.deepcopy(origin.evidence),
    )
    database.close()
