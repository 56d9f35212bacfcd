"""How many jobs a worker holds."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from visq.settings import Settings
from worker import main
from worker.engine.face import EngineInfo
from worker.main import useful_concurrency

INFO = EngineInfo("small", "native", "cpu", "float32", 1.0, 1000, capacity=64)


def test_by_default_it_holds_what_its_engine_can() -> None:
    assert useful_concurrency(Settings(), INFO) == 64


def test_a_smaller_number_is_taken_and_a_larger_one_is_cut_with_a_word() -> None:
    with capture_logs() as said:
        assert useful_concurrency(Settings(concurrency=10), INFO) == 10
    assert said == []
    with capture_logs() as said:
        assert useful_concurrency(Settings(concurrency=100), INFO) == 64
    assert [(line["asked"], line["concurrency"]) for line in said] == [(100, 64)]


def test_little_shared_memory_bounds_the_default_but_not_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = main.shutil.disk_usage(main.SHARED_MEMORY).total
    monkeypatch.setattr(main, "PICTURES_OF_A_JOB", size // 5)
    with capture_logs() as said:
        assert useful_concurrency(Settings(), INFO) == 5
    assert "/dev/shm" in said[0]["event"]
    assert useful_concurrency(Settings(concurrency=10), INFO) == 10


def test_it_always_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PICTURES_OF_A_JOB", 2**62)
    assert useful_concurrency(Settings(), INFO) == 1
