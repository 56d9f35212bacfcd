"""Which family a model is of, and which models the engine must leave to the fallback."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from worker.engine.families.base import Family
from worker.engine.families.generic import GenericFamily
from worker.engine.families.idefics3 import Idefics3Family
from worker.engine.families.qwen3_vl import Qwen3VLFamily
from worker.engine.families.qwen_vl import QwenVLFamily

logger = logging.getLogger(__name__)

FAMILIES: Final[Mapping[str, type[GenericFamily]]] = {
    "idefics3": Idefics3Family,
    "internvl": GenericFamily,
    "llama": GenericFamily,
    "llava": GenericFamily,
    "llava_next": GenericFamily,
    "llava_onevision": GenericFamily,
    "mistral": GenericFamily,
    "qwen2": GenericFamily,
    "qwen2_5_vl": QwenVLFamily,
    "qwen2_vl": QwenVLFamily,
    "qwen3": GenericFamily,
    "qwen3_vl": Qwen3VLFamily,
    "smolvlm": Idefics3Family,
}
"""By ``config.model_type``."""

TEXT_MODELS: Final = frozenset(
    "llama mistral qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text".split()
)
"""Decoders whose layers are attention (plain causal, softmax, no sinks) and a perceptron."""

ROPE_TYPES: Final = frozenset({"default", "linear", "llama3", "mrope", "yarn"})
"""Those whose angles depend on a token's position alone. With ``dynamic`` and ``longrope`` they
depend on the longest sequence of the batch: a long request would change the others' answers."""

UNTRIED_TOWERS: Final = frozenset({"pixtral"})
"""Vision models under a family's name whose pictures have a shape of their own."""


def family_of(model: Any, processor: Any) -> Family | None:
    """The family of a loaded model; ``None``, with the reason in the log, if it has none.

    :param processor: of a vision-language model; of a text model its tokenizer.
    """
    config = model.config
    if (reason := obstacle(config)) is not None:
        logger.warning(
            "models of type %s run on transformers' generate: %s", config.model_type, reason
        )
        return None
    return FAMILIES[config.model_type](model, processor)


def obstacle(config: Any) -> str | None:
    """Why the engine cannot run the model of this configuration; ``None``: it can."""
    if config.model_type not in FAMILIES:
        return "the engine knows no such family"
    text = config.get_text_config()
    if text.model_type not in TEXT_MODELS:
        return f"the engine has not been tried with text models of type {text.model_type}"
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if tower in UNTRIED_TOWERS:
        return f"the engine has not been tried with vision models of type {tower}"
    layer_types = getattr(text, "layer_types", None)
    if others := sorted(set(layer_types or ()) - {"full_attention"}):
        return f"it has layers of {', '.join(others)}"
    window = getattr(text, "sliding_window", None)
    if window is not None and (layer_types is None or text.model_type == "mistral"):
        return f"its attention has a sliding window of {window} tokens"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(text, name, None) is not None:
            return f"its configuration has {name}"
    if others := sorted(_rope_types(text) - ROPE_TYPES):
        return f"its rotary embedding ({', '.join(others)}) depends on the length of the batch"
    return None


def _rope_types(text: Any) -> set[str]:
    """Also of configurations that have rope parameters for each type of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    return {each.get("rope_type", "default") for each in nested or [parameters]}
