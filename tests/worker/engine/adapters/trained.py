"""Adapters as PEFT saves them, with random weights in place of trained ones, and what PEFT makes of
them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.worker.engine.families.models import load

TEXT_LAYERS: Final = r"(.*language_model\.|model\.)layers"

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "attention": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": rf"{TEXT_LAYERS}.*\.(q_proj|v_proj)",
    },
    "stable": {
        "r": 16,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": rf"{TEXT_LAYERS}.*\.(o_proj|gate_proj|down_proj)",
    },
    "everything": {
        "r": 2,
        "lora_alpha": 2,
        "rank_pattern": {"o_proj": 8, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"k_proj": 5, "layers.0.self_attn.q_proj": 7},
        "lora_bias": True,
        "target_modules": rf"lm_head|{TEXT_LAYERS}.*_proj",
    },
}
"""Of different ranks, scalings and layers."""


def save(
    model_folder: Path, to: Path, *, seed: int = 1, spread: float = 0.3, **config: Any
) -> Path:
    """Write an adapter of `LoraConfig(**config)` for the model."""
    model = get_peft_model(deepcopy(load(model_folder)[0]), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, spread, generator=generator)
    with warnings.catch_warnings():
        # It says that it writes lm_head whole, and takes biases for broken weights.
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(to)
    return to


def save_all(model_folder: Path, to: Path) -> dict[str, str]:
    """Write those of `CONFIGS`; returns their folders."""
    return {
        name: str(save(model_folder, to / name, seed=seed, **config))
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@contextmanager
def adapted(model_folder: Path, adapter: str | Path | None) -> Iterator[None]:
    """Inside, the model that the reference uses is a `PeftModel`, with `adapter` active."""
    if adapter is None:
        yield
        return
    model = PeftModel.from_pretrained(load(model_folder)[0], adapter).eval()
    try:
        yield
    finally:
        model.unload()
