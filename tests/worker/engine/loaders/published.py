"""Small random checkpoints in OpenGVLab's published format: names, shapes and files of InternVL2.

Written from the published modelling code, without transformers' InternVL modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Weights: TypeAlias = dict[str, torch.Tensor]

SENTENCEPIECE = Path(__file__).parent / "sentencepiece" / "plain.model"
PIECES = 480
UNUSED = {"<|im_start|>": 3, "<|im_end|>": 4}
"""Tokens that stand in the place of unused pieces, as in InternLM2."""
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>")
VOCABULARY = PIECES + len(ADDED)

CODE = "from pathlib import Path\n(Path(__file__).parent / 'EXECUTED').touch()\n"
"""What stands in for the code that comes with a checkpoint."""

VISION = {
    "model_type": "intern_vit_6b",
    "architectures": ["InternVisionModel"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
    "torch_dtype": "bfloat16",
}

LLM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
    "temperature": 1.0,
}


@dataclass
class Checkpoint:
    """A model to write: a text model's class, and what differs from the above."""

    architecture: str
    llm: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 1

    @property
    def config(self) -> dict[str, Any]:
        internlm2 = self.architecture == "InternLM2ForCausalLM"
        llm = LLM | ({"bias": False} if internlm2 else {}) | dict(self.llm)
        return {
            "architectures": ["InternVLChatModel"],
            "auto_map": {
                "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            },
            "model_type": "internvl_chat",
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": 28,
            "max_dynamic_patch": 12,
            "min_dynamic_patch": 1,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internlm2-chat",
            "torch_dtype": "bfloat16",
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": True,
            "llm_config": {"architectures": [self.architecture]} | llm,
            "vision_config": VISION | dict(self.vision),
            **self.top,
        }

    def weights(self) -> Weights:
        """Random ones, wide enough that outputs vary."""
        generator = torch.Generator().manual_seed(7)
        config = self.config
        shapes = _vision_shapes(config["vision_config"]) | _projector_shapes(config)
        shapes |= _text_shapes(self.architecture, config["llm_config"])
        weights = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator)
            is_scale = len(shape) == 1 and name.endswith(".weight")
            fan_in = shape[-1] if len(shape) == 2 else 8
            weights[name] = 1 + 0.2 * values if is_scale else values * fan_in**-0.5
        return weights

    def save(self, folder: Path, weights: Weights | None = None) -> Path:
        (folder / "config.json").write_text(json.dumps(self.config))
        generation = {"_from_model_config": True, "eos_token_id": [4, 3]}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        for module in ("configuration_internvl_chat", "modeling_internvl_chat"):
            (folder / f"{module}.py").write_text(CODE)
        _save_weights(folder, self.weights() if weights is None else weights, self.shards)
        if self.architecture == "InternLM2ForCausalLM":
            _save_sentencepiece(folder)
        elif self.architecture == "Qwen2ForCausalLM":
            _save_qwen2(folder)
        else:
            byte_level().save(str(folder / "tokenizer.json"))
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder


def _vision_shapes(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for index in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{index}"
        shapes |= {f"{layer}.{name}": (width,) for name in ("ls1", "ls2", "attn.proj.bias")}
        shapes[f"{layer}.attn.qkv.weight"] = (3 * width, width)
        shapes[f"{layer}.attn.proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.fc1.weight"], shapes[f"{layer}.mlp.fc1.bias"] = (
            (inner, width),
            (inner,),
        )
        shapes[f"{layer}.mlp.fc2.weight"], shapes[f"{layer}.mlp.fc2.bias"] = (
            (width, inner),
            (width,),
        )
        for norm in ("norm1", "norm2"):
            shapes[f"{layer}.{norm}.weight"] = (width,)
            if vision["norm_type"] == "layer_norm":
                shapes[f"{layer}.{norm}.bias"] = (width,)
        if vision["qkv_bias"]:
            shapes[f"{layer}.attn.qkv.bias"] = (3 * width,)
        if vision["qk_normalization"]:
            shapes |= {f"{layer}.attn.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
    return shapes


def _projector_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    wide = config["vision_config"]["hidden_size"] * int(1 / config["downsample_ratio"]) ** 2
    hidden = config["llm_config"]["hidden_size"]
    return {
        **{"mlp1.0.weight": (wide,), "mlp1.0.bias": (wide,)},
        **{"mlp1.1.weight": (hidden, wide), "mlp1.1.bias": (hidden,)},
        **{"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)},
    }


def _text_shapes(architecture: str, llm: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = llm["hidden_size"], llm["intermediate_size"], llm["vocab_size"]
    heads, kv_heads = llm["num_attention_heads"], llm["num_key_value_heads"]
    head_dim = llm.get("head_dim", hidden // heads)
    layers = [f"language_model.model.layers.{i}" for i in range(llm["num_hidden_layers"])]
    shapes: dict[str, tuple[int, ...]] = {"language_model.model.norm.weight": (hidden,)}
    if architecture == "InternLM2ForCausalLM":
        shapes["language_model.model.tok_embeddings.weight"] = (vocabulary, hidden)
        shapes["language_model.output.weight"] = (vocabulary, hidden)
        fused = (heads + 2 * kv_heads) * head_dim
        for layer in layers:
            shapes[f"{layer}.attention.wqkv.weight"] = (fused, hidden)
            shapes[f"{layer}.attention.wo.weight"] = (hidden, heads * head_dim)
            shapes[f"{layer}.feed_forward.w1.weight"] = (inner, hidden)
            shapes[f"{layer}.feed_forward.w3.weight"] = (inner, hidden)
            shapes[f"{layer}.feed_forward.w2.weight"] = (hidden, inner)
            shapes[f"{layer}.attention_norm.weight"] = (hidden,)
            shapes[f"{layer}.ffn_norm.weight"] = (hidden,)
            if llm["bias"]:
                shapes[f"{layer}.attention.wqkv.bias"] = (fused,)
                shapes[f"{layer}.attention.wo.bias"] = (hidden,)
        return shapes
    shapes["language_model.model.embed_tokens.weight"] = (vocabulary, hidden)
    shapes["language_model.lm_head.weight"] = (vocabulary, hidden)
    for layer in layers:
        sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        for name, size in sizes.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
            if architecture == "Qwen2ForCausalLM":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        if architecture == "Qwen3ForCausalLM":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _save_weights(folder: Path, weights: Weights, shards: int) -> None:
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _save_sentencepiece(folder: Path) -> None:
    """As InternVL2-8B: a SentencePiece model, added tokens, and a class that is remote code."""
    (folder / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    (folder / "tokenization_internlm2.py").write_text(CODE)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2} | UNUSED
    ids |= {token: PIECES + index for index, token in enumerate(ADDED)}
    settings = {
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
                "special": True,
            }
            for token, index in ids.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *ADDED],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "InternLM2Tokenizer",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {token: index for token, index in ids.items() if index >= PIECES}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def _byte_vocabulary() -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {letter: index for index, letter in enumerate(letters)}


def _save_qwen2(folder: Path) -> None:
    """As InternVL2-1B: vocabulary and merges, and a template of the tokenizer's own."""
    vocabulary = _byte_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED)
    settings = {
        "added_tokens_decoder": {
            str(len(vocabulary) + index): {
                "content": token,
                **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
                "special": True,
            }
            for index, token in enumerate(tokens)
        },
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": (
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def byte_level() -> Tokenizer:
    """A ``tokenizer.json`` of single bytes."""
    core = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED])
    return core
