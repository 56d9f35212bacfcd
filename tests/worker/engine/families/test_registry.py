"""Which models the engine runs itself, and which it leaves to the fallback."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    GptOssConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from tests.worker.engine.families.models import FAMILIES, load
from worker.engine.families import family_of
from worker.engine.families.registry import obstacle

ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 64,
    "long_factor": [4.0] * 64,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2Config(use_sliding_window=True, max_window_layers=4), "sliding_attention"),
        (Qwen3Config(use_sliding_window=True, max_window_layers=4), "sliding_attention"),
        (MistralConfig(), "sliding window of 4096"),
        (LlavaNextConfig(text_config=MistralConfig(sliding_window=100)), "sliding window of 100"),
        (
            Qwen2_5_VLConfig(text_config={"use_sliding_window": True, "max_window_layers": 1}),
            "sliding_attention",
        ),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", **ROPE}), "dynamic"),
        (LlamaConfig(rope_parameters=LONGROPE), "longrope"),
        (
            InternVLConfig(
                text_config=Qwen2Config(rope_parameters={"rope_type": "dynamic", **ROPE})
            ),
            "dynamic",
        ),
        (Gemma2Config(), "no such family"),
        (GptOssConfig(), "no such family"),
        (Qwen3NextConfig(), "no such family"),
        (InternVLConfig(text_config=GptOssConfig()), "gpt_oss"),
        (LlavaConfig(text_config=Gemma2Config()), "gemma2"),
        (LlavaConfig(text_config=Qwen3NextConfig()), "qwen3_next"),
        (LlavaConfig(vision_config=PixtralVisionConfig()), "pixtral"),
        (LlamaConfig(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (LlamaConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (Qwen2Config(layer_types=["full_attention", "linear_attention"] * 16), "linear_attention"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else value,
)
def test_what_the_attention_cannot_express_is_refused(config: Any, reason: str) -> None:
    found = obstacle(config)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(use_sliding_window=False, sliding_window=4096),
        Qwen2Config(use_sliding_window=True, num_hidden_layers=4, max_window_layers=4),
        MistralConfig(sliding_window=None),
        LlamaConfig(rope_parameters={"rope_type": "linear", **ROPE}),
        Qwen3Config(rope_parameters={"rope_type": "yarn", **ROPE}),
        LlamaConfig(
            rope_parameters={
                "rope_type": "llama3",
                **ROPE,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        ),
        Qwen3VLConfig(),
        SmolVLMConfig(),
        InternVLConfig(text_config=Qwen3Config()),
    ],
    ids=lambda config: config.model_type,
)
def test_what_it_can_express_is_not(config: Any) -> None:
    assert obstacle(config) is None


def test_a_model_without_family_says_why_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(FAMILIES["qwen2"](tmp_path))
    model.config.rope_parameters = {"rope_type": "dynamic", **ROPE}
    with caplog.at_level(logging.WARNING):
        assert family_of(model, tokenizer) is None
    assert "qwen2" in caplog.text
    assert "dynamic" in caplog.text
