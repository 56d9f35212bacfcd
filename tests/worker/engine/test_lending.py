"""Known pictures and the engine's process: the worker loads them, and only when they are needed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished
from visq.errors import EngineCrashed, EngineError, ImageChanged
from visq.pixels import PixelBuffer
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, Finished, KnownImage, Stopped
from worker.engine.intake import LOADERS
from worker.engine.process import ProcessEngine

MakePicture = Callable[[int], PixelBuffer]

HANG_SECONDS = 3.0

ONLY_NATIVE = pytest.mark.parametrize("kind", ["native"], indirect=True, scope="session")
ONLY_GENERATE = pytest.mark.parametrize("kind", ["generate"], indirect=True, scope="session")


@pytest.fixture(scope="module")
def engine(vision_model: Path, kind: Literal["native", "generate"]) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(
        EngineConfig(
            engine=kind,
            model=str(vision_model),
            device="cpu",
            block_size=4,
            hang_seconds=HANG_SECONDS,
        )
    )
    yield engine
    engine.close()


@dataclass
class Shelf:
    """Where the pixels of one picture lie, with a door before it."""

    pixels: PixelBuffer
    error: Exception | None = None
    threads: list[str] = field(default_factory=list)
    """Names of the threads that came for it."""
    door: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.door.set()

    def load(self) -> PixelBuffer:
        self.threads.append(threading.current_thread().name)
        self.door.wait(60)
        if self.error is not None:
            raise self.error
        return self.pixels

    def request(self) -> EngineRequest:
        known = KnownImage(
            self.pixels.sha256, self.pixels.height, self.pixels.width, load=self.load
        )
        return replace(ask("What is this?", self.pixels), images=[known])


def test_a_known_picture_that_the_engine_has_not_is_loaded_by_the_worker(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelf = Shelf(picture(11))
    answer = finished(engine.submit(shelf.request()).result())
    shown = finished(engine.submit(ask("What is this?", shelf.pixels)).result())
    assert (answer.text, answer.token_ids) == (shown.text, shown.token_ids)
    [thread] = shelf.threads
    assert thread.startswith("visq-lend")


def test_pictures_of_one_request_are_not_mixed_up(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelves = [Shelf(picture(seed)) for seed in (12, 13, 14)]
    shown = ask("What?", *(shelf.pixels for shelf in shelves))
    known = [shelf.request().images[0] for shelf in shelves]
    images = [known[0], shelves[1].pixels, known[2]]
    answer = finished(engine.submit(replace(shown, images=images)).result())
    assert answer.token_ids == finished(engine.submit(shown).result()).token_ids
    assert [len(shelf.threads) for shelf in shelves] == [1, 0, 1]


@ONLY_NATIVE
def test_a_known_picture_that_the_engine_has_is_not_loaded(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelf = Shelf(picture(15))
    first = finished(engine.submit(ask("What is this?", shelf.pixels)).result())
    again = finished(engine.submit(shelf.request()).result())
    assert again.token_ids == first.token_ids
    assert again.cached_tokens > 0
    assert shelf.threads == []


def test_whatever_a_load_raises_fails_its_own_request_only(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    pid = engine.pid
    changed = Shelf(picture(16), ImageChanged("it has changed", param="s3://photos/a.png"))
    broken = Shelf(picture(17), KeyError("a mistake of ours"))
    handles = [engine.submit(shelf.request()) for shelf in (changed, broken)]
    good = engine.submit(ask())
    error = failed(handles[0].result()).error
    assert (type(error), error.param) == (ImageChanged, "s3://photos/a.png")
    error = failed(handles[1].result()).error
    assert type(error) is EngineError
    assert "a mistake" not in error.message
    finished(good.result())
    assert engine.pid == pid


@ONLY_NATIVE
def test_a_slow_load_holds_up_nobody_else_and_can_be_cancelled(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelf = Shelf(picture(18))
    shelf.door.clear()
    slow = engine.submit(shelf.request())
    until(lambda: shelf.threads, 20, "the picture to be asked for")
    finished(engine.submit(ask("What?", picture(19))).result())
    slow.cancel()
    assert slow.result() == Stopped("cancelled")
    shelf.door.set()
    finished(engine.submit(shelf.request()).result())


@ONLY_NATIVE
def test_loads_of_cancelled_requests_that_do_not_end_keep_no_other_from_beginning(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelves = [Shelf(picture(seed)) for seed in range(100, 120)]
    for shelf in shelves:
        shelf.door.clear()
    handles = [engine.submit(shelf.request()) for shelf in shelves]
    until(
        lambda: sum(len(shelf.threads) for shelf in shelves) == LOADERS,
        20,
        "as many pictures to be asked for as the engine loads at a time",
    )
    for handle in handles:
        handle.cancel()
    assert {handle.result() for handle in handles} == {Stopped("cancelled")}
    finished(engine.submit(Shelf(picture(121)).request()).result())
    for shelf in shelves:
        shelf.door.set()


@ONLY_GENERATE
def test_a_load_that_takes_long_is_no_hang_of_the_engine(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    pid = engine.pid
    shelf = Shelf(picture(21))
    shelf.door.clear()
    handle = engine.submit(shelf.request())
    until(lambda: shelf.threads, 20, "the picture to be asked for")
    time.sleep(HANG_SECONDS + 2)  # the watchdog counts time: there is nothing else to wait for
    shelf.door.set()
    finished(handle.result())
    assert engine.pid == pid


@ONLY_NATIVE
def test_a_process_that_dies_while_a_picture_is_loaded_leaves_nothing_hanging(
    engine: ProcessEngine, picture: MakePicture
) -> None:
    shelf = Shelf(picture(22))
    shelf.door.clear()
    handle = engine.submit(shelf.request())
    until(lambda: shelf.threads, 20, "the picture to be asked for")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    error = failed(handle.result()).error
    assert isinstance(error, EngineCrashed)
    shelf.door.set()
    outcome = engine.submit(shelf.request()).result()
    assert isinstance(outcome, Finished)
    assert len(shelf.threads) == 2
