"""The engine in a process of its own: the same face, and its death is survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest

from tests.waiting import until
from tests.worker.engine.asking import ask, failed, finished, image_part
from tests.worker.engine.models import CONTEXT
from visq.errors import ConfigurationError, ContextLengthExceeded, EngineCrashed, EngineDown
from visq.pixels import PixelBuffer
from visq.types import ImagePart, ImageUrl, Message
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, Event, Outcome, Stopped, TokenEvent
from worker.engine.opening import LocalEngine
from worker.engine.process import ProcessEngine

ROOT = Path(__file__).parents[3]
ENDLESS = {"max_new_tokens": None, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(vision_model: Path, kind: Literal["native", "generate"]) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(EngineConfig(engine=kind, model=str(vision_model), device="cpu"))
    yield engine
    engine.close()
    assert not engine.alive


def test_it_answers_as_the_engine_in_this_process_does(
    engine: ProcessEngine, vision_engine: LocalEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    request = ask("What are these?", picture(1), picture(2))
    *deltas, answer = list(engine.submit(request))
    expected = finished(vision_engine.submit(request).result())
    assert answer == expected
    assert "".join(event.text for event in deltas if isinstance(event, TokenEvent)) == expected.text
    assert engine.info.model == vision_engine.info.model
    assert engine.info.max_context == CONTEXT


def test_a_crowd_of_threads_gets_each_its_own_answer(
    engine: ProcessEngine, vision_engine: LocalEngine
) -> None:
    requests = [ask("x" * n, max_new_tokens=4) for n in range(1, 33)]
    everybody_is_there = threading.Barrier(len(requests))

    def submit(request: EngineRequest) -> Outcome:
        everybody_is_there.wait()
        return engine.submit(request).result()

    with ThreadPoolExecutor(len(requests)) as threads:
        answers = list(threads.map(submit, requests))
    assert answers == [vision_engine.submit(request).result() for request in requests]


def test_pictures_are_left_for_the_caller_to_release(
    engine: ProcessEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    shown = picture(1)
    before = shown.array().copy()
    finished(engine.submit(ask("What?", shown)).result())
    assert np.array_equal(shown.array(), before)


def test_typed_errors_come_across(engine: ProcessEngine) -> None:
    error = failed(engine.submit(ask("a" * 1000)).result()).error
    assert isinstance(error, ContextLengthExceeded)
    assert error.param == "messages"


def test_a_data_url_does_not_travel_with_its_picture(
    engine: ProcessEngine, picture: Callable[[int], PixelBuffer]
) -> None:
    url = ImagePart(image_url=ImageUrl(url="data:image/png;base64," + "A" * 5_000_000))
    long = EngineRequest(
        "long", [Message(role="user", content=[url])], [picture(1)], ask().gen_config
    )
    short = EngineRequest(
        "short", [Message(role="user", content=[image_part()])], [picture(1)], ask().gen_config
    )
    assert engine.submit(long).result() == engine.submit(short).result()


def test_cancel_and_deadline_reach_the_process(engine: ProcessEngine) -> None:
    handle = engine.submit(ask(**ENDLESS))
    waiting = engine.submit(ask(deadline=0.0, **ENDLESS))
    events = iter(handle)
    assert isinstance(next(events), TokenEvent)
    handle.cancel()
    assert list(events)[-1] == Stopped("cancelled")
    assert waiting.result() == Stopped("expired")


def test_signals_to_the_whole_group_leave_it_to_its_owner(engine: ProcessEngine) -> None:
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    for sent in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, sent)
    finished(engine.submit(ask()).result())
    assert process.pid == engine.pid
    assert process.is_running()


def test_after_kill_9_open_requests_fail_retryably_and_later_ones_succeed(
    engine: ProcessEngine,
) -> None:
    # Both as long as the model allows: a short one can end before the kill on a busy machine.
    running, queued = engine.submit(ask(**ENDLESS)), engine.submit(ask(**ENDLESS))
    assert isinstance(next(iter(running)), TokenEvent)
    dead = engine.pid
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    for handle in (running, queued):
        error = failed(handle.result()).error
        assert isinstance(error, EngineCrashed)
        assert error.retryable
    finished(engine.submit(ask()).result())
    assert engine.alive
    assert engine.pid != dead


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_does_not_say_that_it_is_alive_when_nobody_hears_the_process(vision_model: Path) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("a sink that breaks its promise ends the thread that hears the process")

    engine = ProcessEngine(EngineConfig(model=str(vision_model), device="cpu"))
    try:
        engine.submit(ask(), broken)
        until(lambda: not engine.alive, 60, "the engine to be down")
        assert engine.down
        assert isinstance(failed(engine.submit(ask()).result()).error, EngineDown)
    finally:
        engine.close()


def test_a_model_that_cannot_be_loaded_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no model"):
        ProcessEngine(EngineConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ConfigurationError, match=r"cannot be loaded.*no_such_type"):
        ProcessEngine(EngineConfig(model=str(tmp_path), device="cpu"))


OWNER = """
import sys
from worker.engine.config import EngineConfig
from worker.engine.process import ProcessEngine

if __name__ == "__main__":
    engine = ProcessEngine(EngineConfig(model=sys.argv[1], device="cpu"))
    print(engine.pid, flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
"""


@dataclass
class Owner:
    """A program that owns an engine."""

    program: subprocess.Popen[str]

    @cached_property
    def engine(self) -> int:
        """Process id of its engine, once that is up."""
        assert self.program.stdout is not None
        return int(self.program.stdout.readline())


@pytest.fixture(scope="module", autouse=True)
def owners(
    tmp_path_factory: pytest.TempPathFactory, vision_model: Path
) -> Iterator[dict[str, Owner]]:
    """Programs that wait, or exit, once their engine is up. It takes seconds: hence early."""
    script = tmp_path_factory.mktemp("owner") / "owner.py"
    script.write_text(OWNER)
    owners = {
        then: Owner(
            subprocess.Popen(
                [sys.executable, str(script), str(vision_model), then],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        )
        for then in ("wait", "exit")
    }
    yield owners
    for owner in owners.values():
        owner.program.kill()
        owner.program.communicate()


def test_it_dies_with_its_owner_even_by_kill_9(owners: dict[str, Owner]) -> None:
    owner = owners["wait"]
    assert _runs(owner.engine)
    owner.program.kill()
    owner.program.communicate()
    until(lambda: not _runs(owner.engine), 20, "the engine process to end with its owner")


def test_a_program_that_forgets_to_close_it_still_ends(owners: dict[str, Owner]) -> None:
    owner = owners["exit"]
    assert owner.engine
    owner.program.communicate(timeout=60)
    assert owner.program.returncode == 0
    until(lambda: not _runs(owner.engine), 20, "the engine process to end with its owner")


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_its_owner_imports_no_torch() -> None:
    program = (
        "import sys, worker.engine, worker.engine.face\n"
        "heavy = {'torch', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_closing_fails_what_is_open_though_the_process_hangs(vision_model: Path) -> None:
    engine = ProcessEngine(EngineConfig(model=str(vision_model), device="cpu"))
    assert engine.pid is not None
    process = psutil.Process(engine.pid)
    running = engine.submit(ask(**ENDLESS))
    process.suspend()
    waiting = [engine.submit(ask("a" * 1_000_000)) for _ in range(3)]  # more than a pipe holds
    waiting[0].cancel()
    threads = threading.active_count()
    engine.close()
    engine.close()
    for handle in (running, *waiting):
        assert isinstance(failed(handle.result()).error, EngineCrashed)
    assert isinstance(failed(engine.submit(ask()).result()).error, EngineDown)
    assert not engine.alive
    assert not process.is_running()
    assert threading.active_count() == threads - 3, "keeper, sender and watchdog have ended"
