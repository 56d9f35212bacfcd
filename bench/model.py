"""Random-weight models in the published form of Qwen2.5-VL, made on the spot, from nothing.

Weights are seeded normal numbers, norms are 1, biases 0: what they answer means nothing, what it
costs is what the real model costs. The tokenizer has one token for each of `WORDS`, so that a text
of n words is n tokens in every system that is measured.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
).split()
SPOKEN: Final = ("system", "user", "assistant", "You", " are", " a", " helpful", " assistant")
"""Words of the chat template."""
SPECIAL: Final = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARD_BYTES: Final = 2_000_000_000


@dataclass(frozen=True)
class Shape:
    """What differs between the sizes."""

    text_tokens: int
    """Tokens of the vocabulary before the special ones."""
    vocab_size: int
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    mrope_section: tuple[int, int, int]
    std: float
    """Of the weights. (Wide for a tiny model, which else repeats one token.)"""


SHAPES: Final[Mapping[str, Shape]] = {
    "3b": Shape(
        text_tokens=151_643,
        vocab_size=151_936,
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        mrope_section=(16, 24, 24),
        std=0.02,
    ),
    "tiny": Shape(
        text_tokens=2000,
        vocab_size=2048,
        text={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        vision={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        mrope_section=(2, 3, 3),
        std=0.3,
    ),
}


def build(size: str, folder: Path, device: str = "cpu") -> Path:
    """Write the model of `size` (a key of `SHAPES`) to `folder`, as it would be published.

    :param device: where the random numbers are drawn; on a GPU 3 B of them take seconds.
    """
    shape = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(shape.text_tokens)
    tokenizer.save_pretrained(folder)
    config = _config(shape, tokenizer)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.pad_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
            "do_sample": False,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12_845_056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    _write_weights(folder, shape.std, device)
    return folder


def skeleton(folder: Path) -> Any:
    """The model at `folder` without weights (on the device ``meta``), to count them."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "vision_token_id": ids("<|vision_pad|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128_000,
        "max_window_layers": 70,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "sliding_window": 32_768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **shape.text,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
            **shape.vision,
        },
    }


def _tokenizer(text_tokens: int) -> PreTrainedTokenizerFast:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters))}
    merges: dict[tuple[str, str], None] = {}
    # Words after a space come first: what begins in the middle of them is then never merged.
    for word in (*(f" {word}" for word in WORDS), *sorted(SPOKEN)):
        token = "".join("Ġ" if letter == " " else letter for letter in word)
        for end in range(1, len(token)):
            merges.setdefault((token[:end], token[end]))
            vocab.setdefault(token[: end + 1], len(vocab))
    for filler in _fillers():  # the text of tokens that only a random model says
        if len(vocab) == text_tokens:
            break
        vocab.setdefault(filler, len(vocab))
    core = Tokenizer(BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _fillers() -> Iterator[str]:
    for length in (2, 3, 4):
        for letters in product(string.ascii_lowercase, repeat=length):
            yield "Ġ" + "".join(letters)


def _write_weights(folder: Path, std: float, device: str) -> None:
    generator = torch.Generator(device=device).manual_seed(1234)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, like in skeleton(folder).state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if name.endswith("bias"):
            tensor = torch.zeros(like.shape, dtype=torch.bfloat16)
        elif like.ndim == 1:
            tensor = torch.ones(like.shape, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
            tensor = tensor.normal_(0, std, generator=generator).cpu()
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        room -= tensor.nbytes
        shards[-1][_published(name)] = tensor
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _published(name: str) -> str:
    """The name of a weight in the checkpoints as they were published."""
    name = name.replace("model.language_model.", "model.")
    return name.replace("model.visual.", "visual.")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
