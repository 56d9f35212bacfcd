"""Engines and tiny models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tests.worker.engine.families.models import FAMILIES
from tests.worker.engine.models import save_text_model, save_vision_model
from tests.worker.engine.native_engines import SIZES, pixels
from visq.pixels import PixelBuffer
from worker.engine.config import EngineConfig
from worker.engine.opening import LocalEngine, open_engine


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tiny models' answers are compared token for token, and with another number of threads
    sums are rounded otherwise. (Loading a small model sets it too, in the middle of everything.)"""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text-model"))


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision-model"))


@pytest.fixture(scope="session", params=["native", "generate"])
def kind(request: pytest.FixtureRequest) -> Literal["native", "generate"]:
    """Both engines keep the same promises."""
    kind: Literal["native", "generate"] = request.param
    return kind


@pytest.fixture(scope="session")
def text_engine(text_model: Path, kind: Literal["native", "generate"]) -> Iterator[LocalEngine]:
    engine = open_engine(EngineConfig(engine=kind, model=str(text_model), device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def vision_engine(vision_model: Path, kind: Literal["native", "generate"]) -> Iterator[LocalEngine]:
    engine = open_engine(EngineConfig(engine=kind, model=str(vision_model), device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def plain_engine(text_model: Path) -> Iterator[LocalEngine]:
    engine = open_engine(EngineConfig(engine="generate", model=str(text_model), device="cpu"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def one_at_a_time(text_model: Path, kind: Literal["native", "generate"]) -> Iterator[LocalEngine]:
    config = EngineConfig(engine=kind, model=str(text_model), device="cpu", max_batch_size=1)
    engine = open_engine(config)
    yield engine
    engine.close()


@pytest.fixture
def picture() -> Iterator[Callable[[int], PixelBuffer]]:
    """A function from a seed to a picture in shared memory."""
    made: list[PixelBuffer] = []

    def make(seed: int) -> PixelBuffer:
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        made.append(PixelBuffer.create(pixels, f"{seed:064x}"))
        return made[-1]

    yield make
    for buffer in made:
        buffer.release()


@pytest.fixture(scope="session")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["internvl"](tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")  # not longer: others look at what is in shared memory
def pictures() -> Iterator[list[PixelBuffer]]:
    buffers = [PixelBuffer.create(pixels(seed), f"{seed:064x}") for seed in range(len(SIZES))]
    yield buffers
    for buffer in buffers:
        buffer.release()
