"""InternVL2 from its published layout, in plain torch and fp32: slow, short, independent.

Takes the published tensors by their published names. No module of transformers is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its common name)

from tests.worker.engine.loaders.published import Weights


def logits(
    weights: Weights,
    config: Mapping[str, Any],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_token_id: int,
) -> torch.Tensor:
    """``(T, vocabulary)`` of one prompt; `pixel_values` are its tiles ``(N, 3, H, W)``."""
    llm = config["llm_config"]
    internlm2 = llm["architectures"][0] == "InternLM2ForCausalLM"
    table = "tok_embeddings" if internlm2 else "embed_tokens"
    x = weights[f"language_model.model.{table}.weight"][input_ids]
    if pixel_values is not None:
        x[input_ids == image_token_id] = image_features(weights, config, pixel_values).flatten(0, 1)
    cos, sin = _rope(llm, len(x))
    for index in range(llm["num_hidden_layers"]):
        part = Part(weights, f"language_model.model.layers.{index}")
        x = (_internlm2_layer if internlm2 else _llama_layer)(part, llm, x, cos, sin)
    x = _rms_norm(x, weights["language_model.model.norm.weight"], llm["rms_norm_eps"])
    head = "output" if internlm2 else "lm_head"
    return x @ weights[f"language_model.{head}.weight"].T


def image_features(
    weights: Weights, config: Mapping[str, Any], pixel_values: torch.Tensor
) -> torch.Tensor:
    """``(tiles, tokens, hidden)``: vision tower, pixel shuffle v2, ``mlp1``."""
    x = _vision(weights, config, pixel_values)[:, 1:]
    side = math.isqrt(x.shape[1])
    step = round(1 / config["downsample_ratio"])
    # Each token is a square of step x step patches, its rows first.
    x = x.view(len(x), side // step, step, side // step, step, -1).transpose(2, 3)
    x = x.reshape(len(x), (side // step) ** 2, -1)
    mlp = Part(weights, "mlp1")
    x = F.layer_norm(x, x.shape[-1:], mlp("0.weight"), mlp("0.bias"))
    return mlp.linear("3", F.gelu(mlp.linear("1", x)))


class Part:
    """The tensors under one name."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __call__(self, name: str) -> torch.Tensor:
        return self._weights[f"{self._name}.{name}"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self(f"{name}.weight"), self._weights.get(f"{self._name}.{name}.bias"))


def _vision(weights: Weights, config: Mapping[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """The state that ``select_layer`` names: ``(tiles, 1 + patches, width)``."""
    vision = config["vision_config"]
    embed = Part(weights, "vision_model.embeddings")
    patch = vision["patch_size"]
    x = F.conv2d(pixels, embed("patch_embedding.weight"), embed("patch_embedding.bias"), patch)
    rows, columns = x.shape[2:]
    x = torch.cat([embed("class_embedding").expand(len(x), 1, -1), x.flatten(2).mT], dim=1)
    side = vision["image_size"] // patch
    places = embed("position_embedding")
    grid = places[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    x = x + torch.cat([places[:, :1], grid.flatten(2).mT], dim=1)
    states = [x]
    for index in range(vision["num_hidden_layers"]):
        part = Part(weights, f"vision_model.encoder.layers.{index}")
        x = x + part("ls1") * _vision_attention(part, vision, _vision_norm(part, vision, x, 1))
        hidden = F.gelu(part.linear("mlp.fc1", _vision_norm(part, vision, x, 2)))
        x = x + part("ls2") * part.linear("mlp.fc2", hidden)
        states.append(x)
    return states[config["select_layer"]]


def _vision_norm(part: Part, vision: Mapping[str, Any], x: torch.Tensor, n: int) -> torch.Tensor:
    if vision["norm_type"] == "rms_norm":
        return _rms_norm(x, part(f"norm{n}.weight"), vision["layer_norm_eps"])
    weight, bias = part(f"norm{n}.weight"), part(f"norm{n}.bias")
    return F.layer_norm(x, x.shape[-1:], weight, bias, vision["layer_norm_eps"])


def _vision_attention(part: Part, vision: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    heads = vision["num_attention_heads"]
    q, k, v = part.linear("attn.qkv", x).view(*x.shape[:2], 3, -1).unbind(2)
    if vision["qk_normalization"]:
        q = _rms_norm(q, part("attn.q_norm.weight"), vision["layer_norm_eps"])
        k = _rms_norm(k, part("attn.k_norm.weight"), vision["layer_norm_eps"])
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return part.linear("attn.proj", mixed)


def _internlm2_layer(
    part: Part, llm: Mapping[str, Any], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    kv_heads = llm["num_key_value_heads"]
    groups = llm["num_attention_heads"] // kv_heads
    normed = _rms_norm(x, part("attention_norm.weight"), llm["rms_norm_eps"])
    fused = part.linear("attention.wqkv", normed).view(len(x), kv_heads, groups + 2, -1)
    q = fused[:, :, :groups].flatten(1, 2)
    x = x + part.linear("attention.wo", _attend(q, fused[:, :, -2], fused[:, :, -1], cos, sin))
    normed = _rms_norm(x, part("ffn_norm.weight"), llm["rms_norm_eps"])
    gated = F.silu(part.linear("feed_forward.w1", normed)) * part.linear("feed_forward.w3", normed)
    return x + part.linear("feed_forward.w2", gated)


def _llama_layer(
    part: Part, llm: Mapping[str, Any], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Of Llama, Qwen2 (with biases) and Qwen3 (with norms of queries and keys)."""
    normed = _rms_norm(x, part("input_layernorm.weight"), llm["rms_norm_eps"])
    heads = {"q": llm["num_attention_heads"]} | dict.fromkeys("kv", llm["num_key_value_heads"])
    q, k, v = (
        part.linear(f"self_attn.{name}_proj", normed).unflatten(-1, (count, -1))
        for name, count in heads.items()
    )
    if llm["architectures"][0] == "Qwen3ForCausalLM":
        q = _rms_norm(q, part("self_attn.q_norm.weight"), llm["rms_norm_eps"])
        k = _rms_norm(k, part("self_attn.k_norm.weight"), llm["rms_norm_eps"])
    x = x + part.linear("self_attn.o_proj", _attend(q, k, v, cos, sin))
    normed = _rms_norm(x, part("post_attention_layernorm.weight"), llm["rms_norm_eps"])
    gated = F.silu(part.linear("mlp.gate_proj", normed)) * part.linear("mlp.up_proj", normed)
    return x + part.linear("mlp.down_proj", gated)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Causal attention of ``(T, heads, head_dim)``, each key head shared by a group of queries."""
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, dim=1).transpose(0, 1) for each in (k, v))
    scores = (q.transpose(0, 1) @ k.mT) * q.shape[-1] ** -0.5
    later = torch.ones(len(q), len(q)).triu(1).bool()
    mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1)


def _rope(llm: Mapping[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``(T, 1, head_dim)`` of positions within ``max_position_embeddings``."""
    head_dim = llm.get("head_dim", llm["hidden_size"] // llm["num_attention_heads"])
    frequencies = llm["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    positions = torch.arange(length).float()
    scaling = llm["rope_scaling"] or {"type": "none"}
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
