"""Processes that prepare pictures: the same pictures, and their deaths are survived."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.families.models import FAMILIES
from tests.worker.engine.loaders.published import Checkpoint
from tests.worker.engine.native_engines import (
    assert_nothing_is_held,
    batch,
    engine_for,
    expected,
    outcome_of,
)
from tests.worker.engine.test_sharing import mappings
from visq.errors import EngineCrashed, ImageError, Unavailable
from visq.pixels import PixelBuffer
from worker.engine import preparing
from worker.engine.config import EngineConfig
from worker.engine.families import family_of
from worker.engine.families.base import Family, PreparedImage
from worker.engine.loading import LoadedModel, load
from worker.engine.native import NativeEngine
from worker.engine.preparing import Preparers
from worker.engine.process import ProcessEngine

START = 90.0
"""Seconds for a process to import transformers on a busy machine."""


def preparers_of(engine: NativeEngine) -> Preparers:
    preparers = engine._intake._preparers
    assert preparers is not None
    return preparers


@contextmanager
def opened(folder: Path) -> Iterator[NativeEngine]:
    engine = engine_for(folder, preparers=1)
    try:
        until(lambda: preparers_of(engine).ready, START, "the preparing process")
        yield engine
        assert_nothing_is_held(engine)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(internvl: Path) -> Iterator[NativeEngine]:
    with opened(internvl) as engine:
        yield engine


def in_dev_shm(*pids: int) -> set[str]:
    """What this process and those have there."""
    mine = tuple(f"visq-{pid}-" for pid in (os.getpid(), *pids))
    return {name for name in os.listdir("/dev/shm") if name.startswith(mine)}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def is_same(one: PreparedImage, other: PreparedImage) -> bool:
    return (
        one.token_ids == other.token_ids
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        and all(one.tensors[n].dtype == other.tensors[n].dtype for n in one.tensors)
    )


def family_and(folder: Path) -> tuple[EngineConfig, LoadedModel, Family]:
    config = EngineConfig(model=str(folder), device="cpu", preparers=1)
    loaded = load(config)
    family = family_of(loaded.model, loaded.processor)
    assert family is not None
    return config, loaded, family


# --- what they prepare ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["internvl_chat", "qwen2_5_vl"])
def test_a_picture_prepared_or_refused_in_a_process_is_as_if_it_were_here(
    tmp_path: Path, pictures: list[PixelBuffer], name: str
) -> None:
    folder = (
        Checkpoint("InternLM2ForCausalLM").save(tmp_path)
        if name == "internvl_chat"
        else FAMILIES[name](tmp_path)
    )
    config, loaded, family = family_and(folder)
    preparers = Preparers.beside(config, loaded, family)
    assert preparers is not None
    buffers: list[PixelBuffer] = []
    try:
        until(lambda: preparers.ready, START, "the process")
        pids = preparers.pids
        for picture in pictures:
            prepared = preparers.prepare(picture)
            assert prepared is not None
            assert is_same(prepared, family.prepare_image(picture.array()))
            assert mappings() == 1
            prepared = prepared.without_pixels()
            assert mappings() == 0, "what is remembered of a picture's size keeps no pixels"
        released = PixelBuffer.create(np.zeros((4, 4, 3), dtype=np.uint8), "0" * 64)
        released.release()
        with pytest.raises(Unavailable, match="released"):
            preparers.prepare(released)
        if name == "qwen2_5_vl":
            buffers.append(PixelBuffer.create(np.zeros((1, 300, 3), dtype=np.uint8), "1" * 64))
            with pytest.raises(ImageError, match="300x1"):
                preparers.prepare(buffers[-1])
        assert preparers.pids == pids, "it is not the process that is at fault"
    finally:
        preparers.close()
        for buffer in buffers:
            buffer.release()
        for buffer in buffers:
            buffer.release()


def test_answers_are_those_of_generate(
    engine: NativeEngine, internvl: Path, pictures: list[PixelBuffer]
) -> None:
    handles = [engine.submit(request) for request in batch(internvl, pictures)]
    answers = [finished(outcome_of(handle)).token_ids for handle in handles]
    assert answers == expected(internvl, pictures)
    assert_nothing_is_held(engine)


def test_a_picture_that_several_show_at_once_is_prepared_once(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparers, asked = preparers_of(engine), []
    prepare, may = preparers.prepare, threading.Event()

    def late(picture: PixelBuffer) -> PreparedImage | None:
        asked.append(picture)
        assert may.wait(20)
        return prepare(picture)

    monkeypatch.setattr(preparers, "prepare", late)
    shown = picture(71)
    handles = [engine.submit(ask(f"{n}", shown, max_new_tokens=2)) for n in range(3)]
    until(lambda: not len(engine._intake.waiting) and asked, 10, "all of them to be taken")
    may.set()
    for handle in handles:
        finished(outcome_of(handle))
    assert len(asked) == 1


def test_a_request_does_not_wait_for_the_picture_of_another(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparers, slow = preparers_of(engine), picture(72)
    prepare, may = preparers.prepare, threading.Event()

    def late(picture: PixelBuffer) -> PreparedImage | None:
        assert picture is not slow or may.wait(20)
        return prepare(picture)

    monkeypatch.setattr(preparers, "prepare", late)
    first = engine.submit(ask("slow", slow, max_new_tokens=2))
    finished(outcome_of(engine.submit(ask("quick", picture(73), max_new_tokens=2))))
    finished(outcome_of(engine.submit(ask("no picture", max_new_tokens=2))))
    assert not first.ended
    may.set()
    finished(outcome_of(first))


def test_no_more_pictures_are_prepared_than_there_is_room_for(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine._family.prepare_image(picture(0).array()).nbytes
    room, gate = engine._intake._room, threading.Event()
    until(lambda: room._left == EngineConfig().prepared_bytes, 10, "nothing to be held any more")
    monkeypatch.setattr(room, "_left", int(2.5 * one))
    engine._inbox.put(lambda: gate.wait(30) and None)
    handles = [engine.submit(ask("x", picture(n), max_new_tokens=1)) for n in range(1, 12)]
    try:
        until(lambda: engine._inbox.qsize() == 3 and not room._kept, 20, "the room to be full")
        assert room._left == int(2.5 * one) - 3 * one
    finally:
        gate.set()
    for handle in handles:
        finished(outcome_of(handle))
    until(lambda: room._left == int(2.5 * one), 10, "all memory to be given back")


# --- when they die -------------------------------------------------------------------------------


def test_one_that_is_killed_fails_its_picture_only_and_a_new_one_takes_its_place(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    preparers = preparers_of(engine)
    (pid,) = preparers.pids
    os.kill(pid, signal.SIGSTOP)
    hit = engine.submit(ask("hit", picture(81), max_new_tokens=2))
    until(lambda: preparers.busy, 10, "the picture to be with the process")
    behind = engine.submit(ask("behind", picture(82), max_new_tokens=2))
    os.kill(pid, signal.SIGKILL)
    error = failed(outcome_of(hit)).error
    assert isinstance(error, EngineCrashed)
    assert error.retryable
    finished(outcome_of(behind))
    finished(outcome_of(engine.submit(ask("hit", picture(81), max_new_tokens=2))))
    until(lambda: preparers.ready and preparers.pids != [pid], START, "a new process")
    finished(outcome_of(engine.submit(ask("next", picture(83), max_new_tokens=2))))


def test_one_that_is_killed_while_it_waits_fails_nothing(
    engine: NativeEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    preparers = preparers_of(engine)
    (pid,) = preparers.pids
    os.kill(pid, signal.SIGKILL)
    (process,) = preparers._processes
    until(lambda: not process.alive, 10, "its end")
    finished(outcome_of(engine.submit(ask("next", picture(84), max_new_tokens=2))))
    until(lambda: preparers.ready and preparers.pids != [pid], START, "a new process")


def test_a_picture_that_cannot_be_taken_over_fails_its_request_and_no_other(
    engine: NativeEngine, pictures: list[PixelBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no descriptor for it, or no more room for mappings."""
    preparers = preparers_of(engine)
    until(lambda: preparers.ready == preparers.count, START, "the processes")

    def exhausted(fd: int, places: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("unable to mmap: Cannot allocate memory")

    monkeypatch.setattr(preparing, "mapped", exhausted)
    with pytest.raises(EngineCrashed, match="Cannot allocate memory"):
        preparers.prepare(pictures[0])
    until(lambda: preparers.ready == preparers.count, START, "another process")
    assert preparers.prepare(pictures[0]) is not None


def test_one_that_hangs_is_replaced(
    engine: NativeEngine,
    picture: Callable[[int], PixelBuffer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparing, "PICTURE_SECONDS", 0.5)
    preparers = preparers_of(engine)
    (pid,) = preparers.pids
    os.kill(pid, signal.SIGSTOP)
    error = failed(outcome_of(engine.submit(ask("hit", picture(85))))).error
    assert isinstance(error, EngineCrashed)
    until(lambda: gone(pid), 10, "its end")
    until(lambda: preparers.ready, START, "a new process")


@pytest.mark.parametrize("why", ["no process", "no processor"])
def test_where_none_can_be_started_pictures_are_left_to_the_caller_and_the_log_says_so(
    tmp_path: Path,
    picture: Callable[[int], PixelBuffer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    def start() -> preparing._Process:
        if why == "no process":
            raise OSError("no more processes")
        return preparing._Process(str(tmp_path), None, "ERROR")

    monkeypatch.setattr(preparing, "STARTS", 1)
    with caplog.at_level(logging.ERROR):
        preparers = Preparers(1, start)
        until(lambda: not preparers._threads[0].is_alive(), START, "it to give up")
    assert "the engine prepares pictures itself" in caplog.text
    assert preparers.prepare(picture(1)) is None
    preparers.close()


# --- what they leave behind ----------------------------------------------------------------------


def test_after_close_there_is_no_process_no_thread_and_nothing_in_shared_memory(
    internvl: Path, picture: Callable[[int], PixelBuffer]
) -> None:
    shown = picture(1)
    before, threads = in_dev_shm(), threading.active_count()
    with opened(internvl) as engine:
        finished(outcome_of(engine.submit(ask("What?", shown, max_new_tokens=2))))
        pids = preparers_of(engine).pids
        assert len(pids) == 1
        assert in_dev_shm() == before
    assert all(gone(pid) for pid in pids)
    assert threading.active_count() <= threads
    assert in_dev_shm(*pids) == before


def test_they_end_with_the_engine_s_process_even_by_kill_9(
    internvl: Path, picture: Callable[[int], PixelBuffer]
) -> None:
    shown = picture(1)
    before = in_dev_shm()
    config = EngineConfig(model=str(internvl), device="cpu", engine="native", preparers=1)
    engine = ProcessEngine(config)
    try:
        finished(outcome_of(engine.submit(ask("What?", shown, max_new_tokens=2))))
        assert engine.pid is not None
        process = psutil.Process(engine.pid)
        children = until(process.children, START, "the preparing process")
        process.kill()
        until(lambda: all(gone(child.pid) for child in children), START, "their end")
    finally:
        engine.close()
    assert in_dev_shm(process.pid, *(child.pid for child in children)) == before
