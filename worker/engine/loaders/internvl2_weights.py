"""Reads the weights of an ``InternVLChatModel`` into transformers' modules, a tensor at a time.

The model is built without memory (on the meta device), then allocated once in its own dtype on its
own device; each tensor of the checkpoint is copied into its place and forgotten. So the peak is the
model, and the mapped pages of one file, which the system can drop. A name that is missing, left
over, or of another shape is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from transformers import InternVLConfig, InternVLForConditionalGeneration

from visq.errors import ConfigurationError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

PLACES: Final = (
    ("vision_model.", "model.vision_tower."),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.model.", "model.language_model."),
    ("language_model.output.", "lm_head."),
    ("language_model.lm_head.", "lm_head."),
)
"""Beginnings of names: published, native."""

PARTS: Final = (
    # vision
    (".class_embedding", ".cls_token"),
    (".position_embedding", ".position_embeddings"),
    (".patch_embedding.", ".patch_embeddings.projection."),
    (".encoder.layers.", ".encoder.layer."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    # InternLM2; Llama and Qwen have the native names
    (".tok_embeddings.", ".embed_tokens."),
    (".attention.wqkv.", ".self_attn.wqkv."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)
"""Parts of names: published, native."""

VISION_LAYER: Final = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")


def load_model(
    folder: Path, config: InternVLConfig, *, device: torch.device, dtype: torch.dtype
) -> Any:
    """Build the `InternVLForConditionalGeneration` of `config` with the weights in `folder`.

    :raises ConfigurationError: naming the file or tensor that is missing, left over or misshapen.
    """
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config).to(dtype)
    model.to_empty(device=device)
    # Its frequencies are not weights, and stay in fp32.
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    missing = model.state_dict()
    kept_layers = config.vision_config.num_hidden_layers
    for name, tensor in _tensors(folder):
        if name.endswith(".rotary_emb.inv_freq") or _layer(name) >= kept_layers:
            continue
        for native, piece in _native(name, tensor, config.text_config):
            target = missing.pop(native, None)
            if target is None:
                raise ConfigurationError(f"the checkpoint has a tensor without a place: {name}")
            if target.shape != piece.shape:
                raise ConfigurationError(
                    f"{name}: {tuple(piece.shape)} in the checkpoint for {native}, but config.json "
                    f"makes it {tuple(target.shape)}"
                )
            target.copy_(piece)
    if missing:
        raise ConfigurationError(f"the checkpoint lacks tensors: {', '.join(sorted(missing))}")
    return model.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all files, one tensor in memory at a time."""
    index = folder / INDEX
    files = [SINGLE]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise ConfigurationError(f"the checkpoint lacks its file {file}")
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is not a mapping)
                yield name, tensors.get_tensor(name)


def _layer(name: str) -> int:
    """The vision layer that a tensor is of; -1: of none."""
    match = VISION_LAYER.match(name)
    return int(match[1]) if match else -1


def _native(
    name: str, tensor: torch.Tensor, text_config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Native names and tensors of a published one: itself, or the parts of a fused one."""
    native = native_name(name)
    module, _, kind = native.rpartition(".")
    stem, _, fused = module.rpartition(".")
    if fused not in ("qkv", "wqkv"):
        yield native, tensor
        return
    try:
        if fused == "qkv":
            parts = tensor.view(3, -1, *tensor.shape[1:]).unbind()
        else:
            parts = split_wqkv(tensor, text_config)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{name}: {tuple(tensor.shape)} does not fit the number of heads in config.json"
        ) from error
    for projection, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        yield f"{stem}.{projection}.{kind}", part


def split_wqkv(tensor: torch.Tensor, text_config: Any) -> tuple[torch.Tensor, ...]:
    """Split InternLM2's fused projection into those of queries, keys and values.

    Its rows stand by key-value head: the heads of the queries that share it, then its key, then its
    value.

    :param tensor: weight ``((heads + 2 * kv_heads) * head_dim, hidden)``, or bias without hidden.
    :returns: ``(heads * head_dim, hidden)`` and twice ``(kv_heads * head_dim, hidden)``.
    """
    kv_heads = text_config.num_key_value_heads
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    groups = text_config.num_attention_heads // kv_heads
    heads = tensor.view(kv_heads, groups + 2, head_dim, *tensor.shape[1:])
    return (
        heads[:, :groups].flatten(0, 2),
        heads[:, groups].flatten(0, 1),
        heads[:, groups + 1].flatten(0, 1),
    )


def native_name(name: str) -> str:
    for published, native in PLACES:
        if name.startswith(published):
            name = native + name.removeprefix(published)
            break
    for published, native in PARTS:
        name = name.replace(published, native)
    return name
