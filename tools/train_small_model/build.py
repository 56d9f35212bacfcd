"""Builds the parts of the model that are not learnt: tokenizer, processor, configuration, start.

The tokenizer is byte-level: every word of the world is one token, any other word is spelled in
bytes, so that no text can fail and decoding gives back the very text.  The model is InternVL as
transformers has it (the classes that load OpenGVLab/InternVL3-*-hf), only small.
"""

import json
import math
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from .offworld import frame_words
from .sampling import all_texts
from .vocabulary import COLOURS, ICONS, LETTERS, SHAPES
from .world import USUAL_SIDE

IMAGE_SIZE = USUAL_SIDE
PATCH = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH // 2) ** 2
MAX_POSITIONS = 2048

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE, IMAGE_START, IMAGE_END, VIDEO = "<IMG_CONTEXT>", "<img>", "</img>", "<video>"
USER, ASSISTANT = f"{START}user\n", f"{START}assistant\n"
SPECIAL = (PAD, START, END, IMAGE_START, IMAGE_END, IMAGE, VIDEO, USER, ASSISTANT)
"""The heads of turns are one token each: two tokens saved on every question."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] in ['image', 'image_url'] %}{{ '<img><IMG_CONTEXT></img>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

WORD_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's way to cut text into words, but every digit stands alone."""

EXTRA = (
    "user assistant system You are a helpful assistant Answer in one word please Please hello "
    "Hello thanks the The what What look Look at this image picture photo and And it is It Is "
    "question Question : photo drawing chart text number letter letters only short Short "
    "answer with Use"
)


NAMES: frozenset[str] = frozenset((*COLOURS, *SHAPES, *ICONS, "bar"))
"""Words that are one token wherever they stand."""


def _pieces(text: str) -> list[str]:
    import regex  # type: ignore[import-untyped]

    return [str(piece) for piece in regex.findall(WORD_SPLIT, text)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are those of the world, with bytes for all the rest."""
    words: set[str] = set()
    for text in [*all_texts(), *frame_words()]:
        for nth, piece in enumerate(_pieces(text)):
            bare = piece.strip(" ")
            if re.fullmatch(r"[A-Za-z]+", bare):
                words |= {piece, " " + bare}
                if nth == 0:
                    words |= {bare[0].lower() + bare[1:], bare[0].upper() + bare[1:]}
            elif re.fullmatch(r"[0-9]", bare):
                words.add(" " + bare)
    words |= {" " + word for word in (*EXTRA.split(), *LETTERS, *NAMES)}
    words |= NAMES
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    for word in sorted(words):
        token = "".join(piece for piece, _ in to_bytes.pre_tokenize_str(word))
        vocab.setdefault(token, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD_SPLIT), "isolated"), to_bytes]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        extra_special_tokens={
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": IMAGE,
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    """About 17.8 million parameters: more eyes than tongue."""
    vision = InternVLVisionConfig(
        hidden_size=320,
        num_hidden_layers=8,
        num_attention_heads=5,
        intermediate_size=1280,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        attention_bias=True,
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=768,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def _sine_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column: a start that already knows what is near to what."""
    quarter = width // 4
    rates = 1.0 / (100.0 ** (torch.arange(quarter) / quarter))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = [axis.reshape(-1, 1).float() * rates for axis in (rows, columns)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], dim=1)


def build_model(config: InternVLConfig) -> InternVLForConditionalGeneration:
    """A model with fresh weights: residual branches start small, places are known."""
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for tower, layers in (
            (model.model.vision_tower, config.vision_config.num_hidden_layers),
            (model.model.language_model, config.text_config.num_hidden_layers),
        ):
            for name, weight in tower.named_parameters():
                if name.endswith(
                    ("projection_layer.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
                ):
                    weight.mul_(1 / math.sqrt(2 * layers))
        places = _sine_positions(IMAGE_SIZE // PATCH, config.vision_config.hidden_size)
        model.model.vision_tower.embeddings.position_embeddings[0, 1:] = 0.2 * places
    return model


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer, chat template and processor so that no torchvision is needed to load them.

    transformers' InternVLProcessor insists on a video processor, which insists on torchvision.
    LlavaProcessor does the same for pictures (one placeholder becomes ``IMAGE_TOKENS``) without
    it, and Siglip's image processor has a Pillow variant: a picture of any size, one tile.
    """
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    image_processor: dict[str, object] = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    processor: dict[str, object] = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": 2 * PATCH,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    _write_json(folder / "preprocessor_config.json", image_processor)
    _write_json(folder / "processor_config.json", processor)


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, and stop at the end of the turn."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
