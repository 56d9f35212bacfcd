"""Parts of tiny checkpoints: a tokenizer, a chat template, weights, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

CONTEXT: Final = 1024
START, END, PAD, BOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>"

TEXT: Final[Mapping[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
SEEDS: Final = {
    "internvl": 4,
    "qwen2_vl": 6,
    "qwen2_5_vl": 12,
    "qwen3_vl": 6,
    "llava": 12,
    "llava_next": 10,
    "llava_onevision": 13,
    "idefics3": 10,
    "smolvlm": 10,
    "llama": 5,
    "mistral": 5,
    "qwen2": 10,
    "qwen3": 5,
}
"""Of the weights: such that answers vary, and none ends early."""


def new_tokenizer(*special: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """One token a byte.

    :param special: special tokens beside START, END and PAD.
    :param bos: written before every text by the tokenizer itself, as those of Llama do.
    :param named: special tokens that the tokenizer knows as attributes.
    """
    added = [PAD, START, END, *([bos] if bos else []), *special, *named.values()]
    vocab = {token: i for i, token in enumerate(added)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(added)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": named} if named else {}),
    )


def chat_template(image: str, *, bos: str = "") -> str:
    return (
        bos + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def token_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    image_processor: Mapping[str, Any] | None = None,
    **processor: Any,
) -> Path:
    """Write a checkpoint in the form in which real ones come.

    The processor's parts are written by hand, since those with a video part can only be made with
    torchvision.
    """
    _draw_weights(model, SEEDS[model.config.model_type])
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if image_processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # (What else has one dimension are the weights of norms.)
            if weight.dim() > 1 or name.endswith(("newline", "class_embedding", "bias")):
                weight.normal_(0, 0.35, generator=generator)
