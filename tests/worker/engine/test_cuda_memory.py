"""The memory of a real device is at its end. (Simulated at many places: tests/faults/test_memory.)

Skipped where there is no CUDA; ``pytest tests/worker/engine/test_cuda_memory.py`` where there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.worker.engine.asking import ask, finished
from tests.worker.engine.families.models import FAMILIES
from tests.worker.engine.native_engines import assert_nothing_is_held, batch, outcome_of
from visq.pixels import PixelBuffer
from worker.engine.config import EngineConfig
from worker.engine.face import Failed, Outcome
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(600),
]

MIB = 1024 * 1024


@contextmanager
def opened(folder: Path, *, eager: bool) -> Iterator[NativeEngine]:
    engine = open_engine(
        EngineConfig(
            model=str(folder),
            device="cuda",
            engine="native",
            dtype="float32",
            kv_cache_bytes=64 * MIB,
            vision_cache_bytes=4 * MIB,
            host_cache_bytes=4 * MIB,
            max_batch_size=64,
            max_step_tokens=4096,
            preparers=0,
            compile=False,  # (with CUDA graphs, unless `eager`)
            eager_mode=eager,
            block_size=16,
        )
    )
    assert isinstance(engine, NativeEngine)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def left_to_torch(nbytes: int) -> Iterator[None]:
    """Let torch have no more than it holds for tensors now, and `nbytes`."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    share = (torch.cuda.memory_reserved() + nbytes) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["internvl"](tmp_path_factory.mktemp("internvl"))


def assert_answered_or_retryable(outcomes: list[Outcome], alone: list[list[int]]) -> None:
    for outcome, theirs in zip(outcomes, alone, strict=True):
        if isinstance(outcome, Failed):
            assert outcome.error.retryable, outcome
        else:
            assert finished(outcome).token_ids == theirs


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("mib", [2, 4, 8, 16])
def test_with_little_memory_left_each_request_is_answered_or_fails_retryably(
    folder: Path, pictures: list[PixelBuffer], mib: int, eager: bool
) -> None:
    with opened(folder, eager=eager) as engine:
        requests = [*batch(folder, pictures), *(ask("x " * 100) for _ in range(20))]
        alone = [finished(outcome_of(engine.submit(each), 120)).token_ids for each in requests]
        with left_to_torch(mib * MIB):
            handles = [engine.submit(each) for each in requests]
            outcomes = [outcome_of(handle, 120) for handle in handles]
        assert engine.alive
        assert_answered_or_retryable(outcomes, alone)
        assert_nothing_is_held(engine)
        # And with its memory back, it is as before.
        handles = [engine.submit(each) for each in requests]
        assert [finished(outcome_of(each, 120)).token_ids for each in handles] == alone
        assert_nothing_is_held(engine)


def test_with_no_memory_at_all_the_engine_lives_and_answers_when_there_is_some_again(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    with opened(folder, eager=True) as engine:
        requests = batch(folder, pictures)
        alone = [finished(outcome_of(engine.submit(each), 120)).token_ids for each in requests]
        ballast = []
        with left_to_torch(0):
            for size in (MIB, 4096, 512):  # also what is left of blocks that torch holds
                while True:
                    try:
                        ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                    except torch.OutOfMemoryError:
                        break
            outcomes = [outcome_of(engine.submit(each), 120) for each in requests]
            assert any(isinstance(outcome, Failed) for outcome in outcomes)
            assert_answered_or_retryable(outcomes, alone)
            assert engine.alive
            assert_nothing_is_held(engine)
            ballast.clear()
        handles = [engine.submit(each) for each in requests]
        assert [finished(outcome_of(each, 120)).token_ids for each in handles] == alone
