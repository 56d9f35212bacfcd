"""Tiny models with random weights, written to a folder in the form in which real ones come."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

START, END, PAD, IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<IMG_CONTEXT>"
PLAIN_ROLE = "<ROLE>"
"""An added token that is not a special one, but that the chat template writes."""
CONTEXT = 256

TEMPLATE = (
    "{% for message in messages %}<|im_start|><ROLE>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><ROLE>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most letters beyond ASCII are made of several tokens."""
    vocab = {token: i for i, token in enumerate((PAD, START, END, IMAGE, PLAIN_ROLE))}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, START, END, IMAGE])
    core.add_tokens([AddedToken(PLAIN_ROLE, special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_text_model(folder: Path, *, template: bool = True) -> Path:
    """A Qwen2 of a few thousand weights."""
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(_text_config(tokenizer))
    _save(model, tokenizer, folder)
    return folder


def save_vision_model(folder: Path) -> Path:
    """An InternVL of a few thousand weights; a picture is one tile of four tokens."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(2)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            initializer_range=0.3,
        ),
        text_config=_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=4,
    )
    _save(InternVLForConditionalGeneration(config), tokenizer, folder)
    image_processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": 16,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _text_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # wide, so that the tokens vary
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # A checkpoint's own defaults for sampling must not change what a request asks for.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=1.5,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
