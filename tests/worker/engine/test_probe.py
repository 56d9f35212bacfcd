"""A decoder that does not run on paged attention is found out before it is served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.engine.asking import ask, finished
from visq.errors import ConfigurationError
from worker.engine import opening
from worker.engine.config import EngineConfig
from worker.engine.generate import GenerateEngine
from worker.engine.loading import LoadedModel, load
from worker.engine.native import NativeEngine


class OwnAttention(torch.nn.Module):
    """Mixes nothing, and asks nobody."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


class Narrow(torch.nn.Module):
    """Knows no argument beyond those of transformers' own attention."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Any = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def own_attention(layers: Any) -> None:
    layers[1].self_attn = OwnAttention()


def a_window(layers: Any) -> None:
    layers[1].self_attn.sliding_window = 4


def no_arguments(layers: Any) -> None:
    layers[1].self_attn = Narrow()


Change = Callable[[Any], None]
LIES: list[tuple[Change, str]] = [
    (own_attention, "of 2 layers calls the attention function 1 times"),
    (a_window, "sliding_window=4"),
    (no_arguments, "unexpected keyword argument 'visq'"),
]
"""What is done to a decoder's layers though its configuration does not say so, and what is said."""


@pytest.fixture(params=LIES, ids=[change.__name__ for change, _ in LIES])
def lie(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    change, reason = request.param

    def changed(config: EngineConfig) -> LoadedModel:
        loaded = load(config)
        change(loaded.model.get_decoder().layers)
        return loaded

    monkeypatch.setattr(opening, "load", changed)
    return str(reason)


def test_a_decoder_that_goes_round_the_cache_is_served_by_generate_and_the_log_says_why(
    text_model: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = opening.open_engine(EngineConfig(model=str(text_model), device="cpu"))
    try:
        assert isinstance(engine, GenerateEngine)
        assert lie in caplog.text
        # (Its attention is no longer ours: `generate` would fail on that.)
        finished(engine.submit(ask(max_new_tokens=2)).result())
    finally:
        engine.close()


def test_the_native_engine_is_refused_for_such_a_decoder(text_model: Path, lie: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot serve this model"):
        opening.open_engine(EngineConfig(engine="native", model=str(text_model), device="cpu"))


def test_the_probe_leaves_no_trace_in_an_engine(text_model: Path) -> None:
    engine = opening.open_engine(EngineConfig(model=str(text_model), device="cpu"))
    try:
        assert isinstance(engine, NativeEngine)
        assert not engine._cache.pool.any()
    finally:
        engine.close()


def test_a_gpu_without_memory_is_not_taken_for_a_bad_decoder(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: EngineConfig) -> LoadedModel:
        loaded = load(config)

        def forward(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("no memory")

        loaded.model.get_decoder().layers[0].self_attn.forward = forward
        return loaded

    monkeypatch.setattr(opening, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        opening.open_engine(EngineConfig(model=str(text_model), device="cpu"))
