"""LMDeploy's configs: its names and defaults, taken for ours or refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from visq.errors import ConfigurationError
from visq.pipeline import (
    ChatTemplateConfig,
    EngineConfig,
    PytorchEngineConfig,
    SpeculativeConfig,
    TurbomindEngineConfig,
    VisionConfig,
    pipeline,
)
from visq.pipeline.mapping import ACCEPTED, OURS, check_template, engine_config

Configs = TurbomindEngineConfig | PytorchEngineConfig


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (None, {}),
        (TurbomindEngineConfig(), {}),
        (PytorchEngineConfig(), {}),
        (TurbomindEngineConfig(session_len=1024), {"session_len": 1024}),
        (TurbomindEngineConfig(max_batch_size=8), {"max_batch_size": 8}),
        (TurbomindEngineConfig(cache_max_entry_count=0.5), {"gpu_memory_utilization": 0.5}),
        (TurbomindEngineConfig(cache_block_seq_len=128), {"block_size": 128}),
        (PytorchEngineConfig(block_size=32), {"block_size": 32}),
        (PytorchEngineConfig(max_prefill_token_num=256), {"max_step_tokens": 256}),
        (PytorchEngineConfig(enable_prefix_caching=True), {"prefix_caching": True}),
        (PytorchEngineConfig(dtype="bfloat16"), {"dtype": "bfloat16"}),
        (PytorchEngineConfig(device_type="cpu"), {"device": "cpu"}),
        (TurbomindEngineConfig(devices=[0], model_format="hf"), {}),
        (PytorchEngineConfig(eager_mode=True), {"eager_mode": True}),
        (PytorchEngineConfig(thread_safe=True, prefill_interval=1), {}),
    ],
)
def test_a_field_of_lmdeploy_becomes_ours(config: Configs | None, ours: dict[str, Any]) -> None:
    expected = EngineConfig(model="small", log_level="INFO", preparers=0, **ours)
    assert engine_config("small", config, "INFO") == expected


@pytest.mark.parametrize(
    "config",
    [
        TurbomindEngineConfig(tp=2),
        TurbomindEngineConfig(quant_policy=8),
        TurbomindEngineConfig(devices=[1]),
        TurbomindEngineConfig(model_format="awq"),
        TurbomindEngineConfig(rope_scaling_factor=2.0),
        TurbomindEngineConfig(session_len=0),
        TurbomindEngineConfig(cache_max_entry_count=100),
        PytorchEngineConfig(tp=2),
        PytorchEngineConfig(dtype="int8"),
        PytorchEngineConfig(device_type="ascend"),
        PytorchEngineConfig(hf_overrides={"a": 1}),
        PytorchEngineConfig(num_gpu_blocks=7),
        PytorchEngineConfig(revision="main"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(config: Configs) -> None:
    [name] = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    with pytest.raises(ConfigurationError, match=rf"{type(config).__name__}\.{name}"):
        engine_config("small", config, "INFO")


def test_our_own_config_is_taken_as_it_is_with_the_model_that_was_asked_for() -> None:
    own = EngineConfig(model="other", device="cpu", threads=2)
    taken = engine_config("small", own, "INFO")
    assert taken == dataclasses.replace(own, model="small", preparers=0)
    asked = dataclasses.replace(own, preparers=2)
    assert engine_config("small", asked, "INFO").preparers == 2


def test_something_else_is_no_config() -> None:
    with pytest.raises(ConfigurationError, match="not dict"):
        engine_config("small", {"tp": 1}, "INFO")


def test_the_tables_name_fields_that_exist() -> None:
    theirs = {
        field.name
        for config in (TurbomindEngineConfig, PytorchEngineConfig)
        for field in dataclasses.fields(config)
    }
    assert set(OURS) | ACCEPTED <= theirs


@pytest.mark.parametrize("name", ["system", "user", "eoh", "assistant", "model_path", "capability"])
def test_a_template_of_ones_own_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"ChatTemplateConfig\.{name}"):
        check_template(ChatTemplateConfig("vicuna", **{name: "completion"}))


def test_a_template_config_survives_json(tmp_path: Path) -> None:
    config = ChatTemplateConfig("vicuna", meta_instruction="Be brief.", stop_words=["."])
    text = config.to_json(str(tmp_path / "template.json"))
    assert ChatTemplateConfig.from_json(text) == config
    assert ChatTemplateConfig.from_json(str(tmp_path / "template.json")) == config


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"speculative_config": SpeculativeConfig("eagle")}, "speculative"),
        (
            {"chat_template_config": ChatTemplateConfig("a", system="b")},
            "ChatTemplateConfig.system",
        ),
        ({"log_level": "LOUD"}, "LOUD"),
        ({"vision_config": {"max_batch_size": 2}}, "VisionConfig, not dict"),
        ({"backend": "pytorch"}, "`backend`"),
        ({"vision_config": VisionConfig(4), "tp": 2}, "`tp`"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_refused_before_the_model_is_loaded(
    arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        pipeline("/nowhere", **arguments)


def test_a_model_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="/nowhere"):
        pipeline("/nowhere", vision_config=VisionConfig(max_batch_size=16))
