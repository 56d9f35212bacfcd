"""What many requests leave behind: nothing."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.waiting import until
from tests.worker.engine.asking import ask, finished
from visq.pixels import PixelBuffer
from worker.engine.config import EngineConfig
from worker.engine.face import Failed, Finished, Handle, Stopped
from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.native import NativeEngine
from worker.engine.opening import open_engine
from worker.engine.sequence import Sequence

MIB = 1024 * 1024


@pytest.fixture
def engine(vision_model: Path) -> Iterator[NativeEngine]:
    engine = open_engine(
        EngineConfig(
            engine="native",
            model=str(vision_model),
            device="cpu",
            block_size=8,
            max_step_tokens=64,
            kv_cache_bytes=60 * 8 * 2 * 2 * 16 * 4,  # 60 blocks: some are driven out
            vision_cache_bytes=20_000,
            overlap=True,
        )
    )
    assert isinstance(engine, NativeEngine)
    yield engine
    engine.close()


def alive(*kinds: type) -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    return {kind.__name__: sum(type(each) is kind for each in objects) for kind in kinds}


def test_a_thousand_requests_that_end_in_every_way_leave_nothing_behind(
    engine: NativeEngine,
) -> None:
    chance = random.Random(1)
    before = alive(Sequence, PreparedImage, ImageFeatures)  # of engines that other tests share
    array = np.random.default_rng(0).integers(0, 255, (12, 40, 50, 3)).astype(np.uint8)
    pictures = [PixelBuffer.create(each, f"{i:064x}") for i, each in enumerate(array)]
    finished(engine.submit(ask("warm", pictures[0])).result())
    threads = threading.active_count()
    outcomes: dict[str, int] = {}
    # Together they need twice the blocks that there are: some are driven out, on any machine.
    handles: list[Handle] = [
        engine.submit(ask(word, max_new_tokens=200, ignore_eos=True)) for word in "abcd"
    ]
    for number in range(1000):
        fields: dict[str, Any] = {"max_new_tokens": chance.randrange(1, 30)}
        if chance.random() < 0.3:
            fields["stop_words"] = [chance.choice("abcdefgh")]
        if chance.random() < 0.2:
            fields |= {"do_sample": True, "n": chance.randrange(1, 4)}
        if chance.random() < 0.2:
            fields["deadline"] = chance.random() * 0.2
        images = chance.sample(pictures, chance.choice([0, 0, 1, 2]))
        handles.append(engine.submit(ask("x" * chance.randrange(1, 40), *images, **fields)))
        if chance.random() < 0.2:
            chance.choice(handles[-20:]).cancel()
        if number % 25 == 24:
            handles[-10].result()
    for handle in handles:
        outcome = handle.result()
        name = type(outcome).__name__
        outcomes[name] = outcomes.get(name, 0) + 1
        assert not isinstance(outcome, Failed), outcome
    assert outcomes[Finished.__name__] > 300
    assert outcomes[Stopped.__name__] > 50
    del handle, outcome
    handles.clear()
    for picture in pictures:
        picture.release()
    until(lambda: engine.stats().running == 0, 10, "nothing to run")
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.queued, stats.waiting, stats.running, stats.held_blocks) == (0, 0, 0, 0)
    assert stats.available_blocks == stats.total_blocks
    assert threading.active_count() == threads
    # What depends on a picture's size only is remembered, once for the one size here.
    left = {"Sequence": 0, "PreparedImage": 1, "ImageFeatures": stats.vision_bytes // 512}
    until(
        lambda: (
            alive(Sequence, PreparedImage, ImageFeatures)
            == {name: before[name] + count for name, count in left.items()}
        ),
        10,
        "all of them to go",
    )


def test_memory_stays_flat_over_ten_thousand_small_requests(text_model: Path) -> None:
    engine = open_engine(EngineConfig(engine="native", model=str(text_model), device="cpu"))
    process = psutil.Process()

    def ask_many(count: int) -> None:
        for start in range(0, count, 100):
            handles = [
                engine.submit(ask(f"{start + i}", max_new_tokens=1 + i % 2)) for i in range(100)
            ]
            for handle in handles:
                finished(handle.result())

    try:
        # The process grows by some 10 MiB over the first thousands, then by less than 1 in 40,000.
        ask_many(10_000)
        gc.collect()
        before = process.memory_info().rss
        ask_many(10_000)
        gc.collect()
        assert process.memory_info().rss - before < 8 * MIB
    finally:
        engine.close()
