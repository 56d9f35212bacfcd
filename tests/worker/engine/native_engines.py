"""Native engines to ask, a ragged batch to ask them, and what `generate` answers to it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from tests.waiting import until
from tests.worker.engine.asking import ask, finished
from tests.worker.engine.families.models import load, reference, takes_images
from visq.errors import VisqError
from visq.pixels import PixelBuffer
from worker.engine.attention.cache import bytes_per_block
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, Handle, KnownImage, Outcome
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine

SIZES = ((40, 50), (64, 30), (90, 100), (33, 33), (20, 70))
"""Height and width of the pictures."""

BATCH: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("Hello", (), 5),
    ("What is this?", (0,), 24),
    ("Compare.", (1, 2), 17),
    ("x " * 25, (), 24),
    ("What is that?", (3,), 9),
    ("All of them!", (0, 1, 2, 4), 24),
    ("What is this?", (1,), 24),
    ("What is this?", (0,), 12),
)
"""Text, pictures (indices of `SIZES`), length of the answer."""


def pixels(seed: int) -> NDArray[np.uint8]:
    height, width = SIZES[seed]
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)


def batch(folder: Path, pictures: list[PixelBuffer], **fields: Any) -> list[EngineRequest]:
    shown = takes_images(folder)
    return [
        ask(text, *(pictures[i] for i in indices if shown), max_new_tokens=length, **fields)
        for text, indices, length in BATCH
    ]


_EXPECTED: dict[Path, list[list[int]]] = {}


def expected(folder: Path, pictures: list[PixelBuffer]) -> list[list[int]]:
    if folder not in _EXPECTED:
        _EXPECTED[folder] = [
            reference(folder, each.messages, each.images, each.gen_config.max_new_tokens or 0)
            for each in batch(folder, pictures)
        ]
    return _EXPECTED[folder]


_LONGEST: dict[Path, int] = {}


def longest(folder: Path, pictures: list[PixelBuffer]) -> int:
    """Most tokens of a prompt and its answer."""
    if folder not in _LONGEST:
        engine = engine_for(folder)
        answers = [engine.submit(request).result() for request in batch(folder, pictures)]
        engine.close()
        _LONGEST[folder] = max(
            finished(answer).prompt_tokens + length
            for answer, (_, _, length) in zip(answers, BATCH, strict=True)
        )
    return _LONGEST[folder]


def engine_for(folder: Path, *, blocks: int | None = None, **fields: Any) -> NativeEngine:
    config = EngineConfig(model=str(folder), device="cpu", engine="native", **fields)
    if blocks is not None:
        text = AutoConfig.from_pretrained(folder).get_text_config()
        nbytes = bytes_per_block(
            layers=text.num_hidden_layers,
            block_size=config.block_size,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            dtype=load(folder)[0].dtype,
        )
        config = replace(config, kv_cache_bytes=blocks * nbytes)
    engine = open_engine(config)
    assert isinstance(engine, NativeEngine)
    return engine


def assert_nothing_is_held(engine: NativeEngine) -> None:
    stats = engine.stats()
    assert (stats.queued, stats.waiting, stats.running, stats.held_blocks) == (0, 0, 0, 0)
    assert stats.available_blocks == stats.total_blocks


def known(picture: PixelBuffer, loads: list[str], error: VisqError | None = None) -> KnownImage:
    """`picture` as one that was shown before; `loads` notes when its pixels are asked for."""

    def load() -> PixelBuffer:
        loads.append(picture.sha256)
        if error is not None:
            raise error
        return picture

    return KnownImage(picture.sha256, picture.height, picture.width, load)


def outcome_of(handle: Handle, seconds: float = 20) -> Outcome:
    """Wait for an outcome, but not for ever."""
    until(lambda: handle.ended, seconds, "a request to end")
    return handle.result()


def together(engine: NativeEngine, *requests: EngineRequest) -> list[Handle]:
    """Submit requests so that the engine meets them in one round of its loop."""
    gate = threading.Event()
    engine._inbox.put(lambda: _pass(gate))
    until(engine._inbox.empty, 10, "the engine's loop")
    handles = [engine.submit(request) for request in requests]
    until(lambda: engine._inbox.qsize() == len(handles), 10, "the requests to be prepared")
    gate.set()
    return handles


def _pass(gate: threading.Event) -> None:
    assert gate.wait(30)
