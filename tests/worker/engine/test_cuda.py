"""The same promises where the fast path runs: CUDA graphs, compiled layers, xformers, bfloat16.

Skipped where there is no CUDA; ``pytest tests/worker/engine/test_cuda.py`` on a machine with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.worker.engine.asking import ask, finished
from tests.worker.engine.families.models import FAMILIES
from tests.worker.engine.native_engines import (
    assert_nothing_is_held,
    batch,
    expected,
)
from visq.pixels import PixelBuffer
from worker.engine.config import EngineConfig
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(600),
]

MIB = 1024 * 1024
BF16_ERROR = 0.06
"""Bound for the norm of the difference of bfloat16 logits to float32 ones over the norm of these,
mean over the tokens: these wide random weights double what bfloat16 costs real ones."""


def cuda_engine(folder: Path, **fields: object) -> NativeEngine:
    config = EngineConfig(
        model=str(folder),
        device="cuda",
        engine="native",
        kv_cache_bytes=64 * MIB,
        vision_cache_bytes=4 * MIB,
        host_cache_bytes=4 * MIB,
        max_batch_size=16,
        max_step_tokens=256,
        preparers=0,
        **fields,  # type: ignore[arg-type]
    )
    engine = open_engine(config)
    assert isinstance(engine, NativeEngine)
    return engine


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make: Callable[[Path], Path] = FAMILIES[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def assert_answered_as_generate_answers(
    engine: NativeEngine, folder: Path, pictures: list[PixelBuffer]
) -> None:
    try:
        for _ in range(2):
            handles = [engine.submit(request) for request in batch(folder, pictures)]
            answers = [finished(handle.result()).token_ids for handle in handles]
            assert answers == expected(folder, pictures)
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_graphs_answer_as_generate_answers_on_the_cpu(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    engine = cuda_engine(folder, dtype="float32", compile=False, block_size=16)
    assert_answered_as_generate_answers(engine, folder, pictures)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "llama"])
def test_compiled_layers_answer_as_generate_answers_on_the_cpu(
    family: str, tmp_path: Path, pictures: list[PixelBuffer]
) -> None:
    folder = FAMILIES[family](tmp_path)
    engine = cuda_engine(folder, dtype="float32")
    assert_answered_as_generate_answers(engine, folder, pictures)


def test_a_session_comes_back_from_the_memory_of_the_host(tmp_path: Path) -> None:
    folder = FAMILIES["qwen2"](tmp_path)
    engine = cuda_engine(folder, dtype="bfloat16", compile=False, block_size=16)
    try:
        request = ask("Tell me about everything that you have seen in this place.")
        answers = []
        for _ in range(2):
            answers.append(finished(engine.submit(replace(request, goes_on=True)).result()))
            assert engine._tier is not None
            engine._tier.look(wait=True)
            # Whatever the device has cached is driven out.
            for number in range(engine._pool.total // 4):
                engine.submit(ask(f"{number} " * 20, max_new_tokens=2))
            finished(engine.submit(ask("last", max_new_tokens=2)).result())
        assert answers[0].token_ids == answers[1].token_ids
    finally:
        engine.close()


def test_logits_in_bfloat16_are_near_those_in_float32(
    folder: Path, pictures: list[PixelBuffer]
) -> None:
    engine = cuda_engine(folder, dtype="bfloat16", compile=False)
    try:
        requests = batch(folder, pictures, output_logits="all", logprobs=0)
        outcomes = [finished(engine.submit(request).result()) for request in requests]
    finally:
        engine.close()
    reference = open_engine(EngineConfig(model=str(folder), device="cpu", engine="native"))
    try:
        for request, outcome in zip(requests, outcomes, strict=True):
            ours = outcome.choices[0].logits
            theirs = finished(reference.submit(request).result()).choices[0].logits
            assert ours is not None
            assert theirs is not None
            prompt = outcome.prompt_tokens  # after it, answers may part
            ours, theirs = ours[:prompt], theirs[:prompt]
            norms = ((ours - theirs) ** 2).sum(1) ** 0.5 / (theirs**2).sum(1) ** 0.5
            assert norms.mean() < BF16_ERROR
    finally:
        reference.close()
