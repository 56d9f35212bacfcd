"""Loads OpenGVLab's own checkpoints: InternVL2, InternVL2.5, Mini-InternVL and their kin.

Their ``config.json`` names an ``InternVLChatModel``, whose code comes with the checkpoint: a vision
tower InternViT, a projector ``mlp1``, and a text model of class InternLM2, Llama, Qwen2 or Qwen3.
transformers has the same model as `InternVLForConditionalGeneration` under other names. Here the
one is read into the other; the code of the checkpoint is never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig

from visq.errors import ConfigurationError
from worker.engine.loaders.internvl2_config import build_config, checkpoint_folder, recognise
from worker.engine.loaders.internvl2_processor import load_processor
from worker.engine.loaders.internvl2_weights import load_model

__all__ = ["load", "recognise"]

TURN_END: Final = "<|im_end|>"


def load(
    source: str,
    raw: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    system_message: str = "",
) -> tuple[Any, Any]:
    """Return the model (in eval mode) and its processor.

    The model's ``generation_config`` holds the tokens at which an answer ends, and nothing else.

    :param source: folder or hub name.
    :param raw: its ``config.json``, one that `recognise` knows.
    :param system_message: for conversations that do not begin with one of their own.
    :raises ConfigurationError: naming what is missing, left over or not supported.
    """
    config = build_config(raw)
    folder = checkpoint_folder(source)
    processor = load_processor(folder, raw, system_message=system_message)
    config.image_token_id = processor.image_token_id
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ConfigurationError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, but the model only "
            f"{config.text_config.vocab_size}: their files do not fit each other"
        )
    model = load_model(folder, config, device=device, dtype=dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=_end_ids(folder, config.text_config, processor.tokenizer)
    )
    return model, processor


def _end_ids(folder: Path, text_config: Any, tokenizer: Any) -> list[int]:
    """End tokens by the checkpoint's own word, and the end of a turn in ChatML."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    found: set[int] = set()
    for ids in (generation.get("eos_token_id"), text_config.eos_token_id):
        found |= {ids} if isinstance(ids, int) else set(ids or [])
    vocabulary = tokenizer.get_vocab()
    if TURN_END in vocabulary:
        found.add(vocabulary[TURN_END])
    return sorted(found)
