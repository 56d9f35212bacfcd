"""The small model in this process, and its pictures with what they show."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import worker
from tests.waiting import until
from visq.embedded.stack import Stack
from visq.pipeline import EngineConfig, Pipeline, pipeline
from visq.settings import Settings

SAMPLES = Path(worker.__file__).parent / "small_model" / "samples"
TRUTH = {entry["file"]: entry for entry in json.loads((SAMPLES / "samples.json").read_text())}


@pytest.fixture(scope="session")
def pipe() -> Iterator[Pipeline]:
    with pipeline("small", backend_config=EngineConfig(device="cpu")) as pipe:
        yield pipe


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Valkey, the API and a worker with the small model."""
    data = tmp_path_factory.mktemp("remote") / "data"
    with Stack(Settings(data=data, port=0, device="cpu", engine_threads=1)) as running:
        yield running


@pytest.fixture
def sample() -> Path:
    """A picture with nine shapes."""
    return SAMPLES / "01-shapes.png"


def pixels_in_memory() -> list[str]:
    """Names of the pictures that this process has in shared memory."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"visq-{os.getpid()}-")]


@pytest.fixture
def nothing_left() -> Iterator[Callable[[], None]]:
    """Checks, when called and at the end, that no pixels stay in shared memory."""
    before = set(pixels_in_memory())  # other tests' fixtures may hold some

    def check() -> None:
        until(lambda: set(pixels_in_memory()) <= before, 10, "the pixels to be released")

    yield check
    check()
