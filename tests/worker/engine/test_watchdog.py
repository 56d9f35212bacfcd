"""An engine process that hangs is found out, killed and replaced; one that is only idle is not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished
from visq.errors import EngineCrashed
from worker.engine import child
from worker.engine.config import EngineConfig
from worker.engine.face import TokenEvent
from worker.engine.process import ProcessEngine
from worker.engine.stats import EngineStats

ENDLESS = {"max_new_tokens": None, "ignore_eos": True}
HANG_SECONDS = 3.0
HANG = "VISQ_TEST_HANG"
"""Environment variable: a file; while it exists, the loop of an engine hangs at its next step."""

real_main = child.main


def main_that_can_hang(connection: Connection[Any, Any], config: EngineConfig, owner: int) -> None:
    """In the engine process: the real thing, with a fault in the loop's own thread."""
    from worker.engine.native import NativeEngine

    launch = NativeEngine._launch

    def launch_or_hang(*args: Any) -> Any:
        order = Path(os.environ[HANG])
        if order.exists():
            order.unlink()
            threading.Event().wait()
        return launch(*args)

    NativeEngine._launch = launch_or_hang  # type: ignore[method-assign]
    real_main(connection, config, owner)


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hang") / "now"


@pytest.fixture(scope="module")
def engine(text_model: Path, order: Path) -> Iterator[ProcessEngine]:
    config = EngineConfig(model=str(text_model), device="cpu", hang_seconds=HANG_SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HANG, str(order))
        patch.setattr(child, "main", main_that_can_hang)
        engine = ProcessEngine(config)
        yield engine
        engine.close()


def killed_and_replaced(engine: ProcessEngine, hang: Callable[[], None]) -> None:
    before = engine.pid
    running = engine.submit(ask(**ENDLESS))
    assert isinstance(next(iter(running)), TokenEvent)
    hang()
    queued = engine.submit(ask())
    for handle in (running, queued):
        error = failed(handle.result()).error
        assert isinstance(error, EngineCrashed)
        assert error.retryable
    finished(engine.submit(ask()).result())
    assert engine.pid != before


def test_a_process_that_is_stopped_is_replaced(engine: ProcessEngine) -> None:
    killed_and_replaced(engine, psutil.Process(engine.pid).suspend)


def test_a_loop_that_hangs_is_replaced_though_its_process_goes_on_talking(
    engine: ProcessEngine, order: Path
) -> None:
    killed_and_replaced(engine, order.touch)
    assert not order.exists(), "it was the loop that hung"


def test_an_idle_process_is_left_alone_however_long_it_is_stopped(engine: ProcessEngine) -> None:
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    process.suspend()
    stopped_at = time.monotonic()
    until(lambda: time.monotonic() > stopped_at + 2 * HANG_SECONDS, 60, "time to pass")
    process.resume()
    finished(engine.submit(ask()).result())
    assert engine.pid == process.pid


def test_a_slow_engine_that_goes_on_is_left_alone(text_model: Path) -> None:
    config = EngineConfig(
        engine="generate", model=str(text_model), device="cpu", hang_seconds=HANG_SECONDS
    )
    engine = ProcessEngine(config)
    before = engine.pid
    begun = time.monotonic()
    while time.monotonic() < begun + 2 * HANG_SECONDS:
        finished(engine.submit(ask(max_new_tokens=16, ignore_eos=True)).result())
    assert engine.pid == before
    assert engine.stats() is None
    engine.close()


def test_the_numbers_of_the_engine_come_across(engine: ProcessEngine) -> None:
    def of_now() -> EngineStats:
        return until(engine.stats, 10, "the first report")

    before = of_now()
    answer = finished(engine.submit(ask(max_new_tokens=5, ignore_eos=True)).result())
    assert answer.completion_tokens == 5
    until(lambda: of_now().finished == before.finished + 1, 10, "the next report")
    after = of_now()
    assert after.generated_tokens == before.generated_tokens + 5
    assert after.first_token.count == before.first_token.count + 1
    assert after.per_token.count == before.per_token.count + 1
    assert after.first_token.sum > before.first_token.sum
    assert (after.running, after.held_blocks) == (0, 0)
