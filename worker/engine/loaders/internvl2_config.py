"""From the ``config.json`` of an ``InternVLChatModel`` to transformers' `InternVLConfig`.

What transformers' modules cannot express is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import snapshot_download
from transformers import (
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from visq.errors import ConfigurationError

FILES: Final = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "tokenizer.model")
"""What is downloaded of a checkpoint: no code."""

TEXT_CONFIGS: Final[Mapping[str, Any]] = {
    "InternLM2ForCausalLM": LlamaConfig,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
"""Text models by their published class. InternLM2 is Llama but for names and a fused ``wqkv``."""

TEXT_FIELDS: Final = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings rms_norm_eps"
).split()

OPTIONAL_TEXT_FIELDS: Final = (
    "num_key_value_heads head_dim hidden_act attention_bias mlp_bias "
    "bos_token_id eos_token_id pad_token_id"
).split()

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""

QK_NORM_EPS: Final = 1e-6
"""Of the norms of queries and keys in transformers' vision tower: it cannot be configured."""


def recognise(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of OpenGVLab's own format (not of the ``-hf`` checkpoints)."""
    named = raw.get("model_type") == "internvl_chat" or "InternVLChatModel" in (
        raw.get("architectures") or []
    )
    return named and "llm_config" in raw and "vision_config" in raw


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or where its files are downloaded to."""
    folder = Path(source)
    return folder if folder.is_dir() else Path(snapshot_download(source, allow_patterns=[*FILES]))


def text_architecture(raw: Mapping[str, Any]) -> str:
    """The published class of the text model.

    :raises ConfigurationError: if it is none of `TEXT_CONFIGS`.
    """
    names = raw["llm_config"].get("architectures") or ["(none)"]
    if names[0] not in TEXT_CONFIGS:
        raise ConfigurationError(
            f"config.json: llm_config.architectures is {names[0]}; supported are "
            f"{', '.join(TEXT_CONFIGS)}"
        )
    return str(names[0])


def tile_size(raw: Mapping[str, Any]) -> int:
    """Edge of a tile, in pixels."""
    return int(raw.get("force_image_size") or _field(raw, "vision_config", "image_size"))


def tokens_per_tile(raw: Mapping[str, Any]) -> int:
    patches = tile_size(raw) // _field(raw, "vision_config", "patch_size")
    return int(patches**2 * raw.get("downsample_ratio", 0.5) ** 2)


def vision_layers(raw: Mapping[str, Any]) -> int:
    """How many layers of the vision tower feed the text model.

    ``select_layer`` indexes the states before the first layer and after each one.
    """
    layers = int(_field(raw, "vision_config", "num_hidden_layers"))
    select = int(raw.get("select_layer", -1))
    kept = select if select >= 0 else layers + 1 + select
    if not 0 < kept <= layers:
        raise ConfigurationError(
            f"config.json: select_layer {select} is not a layer of a vision tower of {layers}"
        )
    return kept


def build_config(raw: Mapping[str, Any]) -> InternVLConfig:
    """Return transformers' configuration of the same model.

    Its ``image_token_id`` is the caller's to set: the tokenizer knows it.

    :raises ConfigurationError: for what is missing or cannot be expressed.
    """
    _refuse_unsupported(raw)
    return InternVLConfig(
        vision_config=_vision_config(raw),
        text_config=_text_config(raw),
        image_seq_length=tokens_per_tile(raw),
        downsample_ratio=raw.get("downsample_ratio", 0.5),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    vision, llm = raw["vision_config"], raw["llm_config"]
    dynamic = raw.get("dynamic_image_size", False)
    refused = {
        # The published default, which no InternVL2 has: a transposed pixel shuffle.
        "ps_version": raw.get("ps_version", "v1") != "v2",
        "pad2square": raw.get("pad2square", False),
        "use_backbone_lora": raw.get("use_backbone_lora", 0),
        "use_llm_lora": raw.get("use_llm_lora", 0),
        # transformers' image processor always adds the thumbnail.
        "use_thumbnail": dynamic and not raw.get("use_thumbnail", False),
        "vision_config.norm_type": vision.get("norm_type", "rms_norm")
        not in ("rms_norm", "layer_norm"),
        "vision_config.layer_norm_eps": vision.get("qk_normalization", True)
        and vision.get("layer_norm_eps", QK_NORM_EPS) != QK_NORM_EPS,
        "llm_config.use_sliding_window": llm.get("use_sliding_window", False),
    }
    for name, refuse in refused.items():
        if refuse:
            section: Any = raw
            for key in name.split("."):
                section = section.get(key, "(not given)")
            raise ConfigurationError(f"config.json: {name} = {section} is not supported")


def _vision_config(raw: Mapping[str, Any]) -> InternVLVisionConfig:
    vision = raw["vision_config"]
    sizes = {
        name: _field(raw, "vision_config", name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")
    }
    # The defaults are those of the published InternVisionConfig: of InternViT-6B.
    return InternVLVisionConfig(
        **sizes,
        num_hidden_layers=vision_layers(raw),
        image_size=_field(raw, "vision_config", "image_size"),
        num_channels=vision.get("num_channels", 3),
        attention_bias=vision.get("qkv_bias", False),
        use_qk_norm=vision.get("qk_normalization", True),
        norm_type=vision.get("norm_type", "rms_norm"),
        layer_norm_eps=vision.get("layer_norm_eps", QK_NORM_EPS),
        hidden_act=vision.get("hidden_act", "gelu"),
        use_mean_pooling=True,  # means: no norm after the last layer
    )


def _text_config(raw: Mapping[str, Any]) -> Any:
    llm = raw["llm_config"]
    fields = {name: _field(raw, "llm_config", name) for name in TEXT_FIELDS}
    fields |= {name: llm[name] for name in OPTIONAL_TEXT_FIELDS if llm.get(name) is not None}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    architecture = text_architecture(raw)
    if architecture == "InternLM2ForCausalLM":
        fields["attention_bias"] = llm.get("bias", True)
    return TEXT_CONFIGS[architecture](
        **fields, rope_parameters=_rope(llm), tie_word_embeddings=False
    )


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary embedding.

    ``dynamic`` NTK scaling changes nothing up to ``max_position_embeddings`` tokens, which is the
    longest context that the engine gives a model. Beyond, one long sequence would change the
    angles of all the others of its batch. So it is loaded as the plain rotary embedding.
    """
    rope = dict(llm.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    if kind == "dynamic":
        kind, rope = "default", {}
    if kind not in ROPE_TYPES:
        raise ConfigurationError(
            f"config.json: llm_config.rope_scaling of type {kind} is not supported"
        )
    return rope | {"rope_type": kind, "rope_theta": float(llm.get("rope_theta", 10_000.0))}


def _field(raw: Mapping[str, Any], section: str, name: str) -> Any:
    try:
        return raw[section][name]
    except KeyError as error:
        raise ConfigurationError(f"config.json: {section}.{name} is missing") from error
