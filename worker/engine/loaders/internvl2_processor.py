"""Tokenizer, chat template and tiling of an ``InternVLChatModel``, as a transformers processor.

In the prompt a picture is one ``<IMG_CONTEXT>``, which the processor replaces by ``<img>``, 256 of
them a tile, and ``</img>``. As in LMDeploy, a newline follows each picture, and there is no system
message unless somebody asks for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from visq.errors import ConfigurationError
from worker.engine.loaders.internvl2_config import tile_size, tokens_per_tile
from worker.engine.loaders.sentencepiece_bpe import read_sentencepiece

IMAGE_START, IMAGE_END, IMAGE = "<img>", "</img>", "<IMG_CONTEXT>"

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")

FLATTEN: Final = """\
{%- set flat = namespace(messages=[]) -%}
{%- if SYSTEM and messages and messages[0]['role'] != 'system' -%}
{%- set flat.messages = [{'role': 'system', 'content': SYSTEM}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message['content'] is string -%}
{%- set text.value = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set text.value = text.value + (part['text'] if part['type'] == 'text' else IMAGE) -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': text.value}] -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""
"""Template code that makes the content of each message one string, which is what the templates of
these checkpoints take. ``SYSTEM`` and ``IMAGE`` are replaced by string literals."""

CHATML: Final = """\
{{ BOS }}{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The form of the conversations that these models were trained on."""


class InternVL2Processor(InternVLProcessor):  # type: ignore[misc]
    """transformers' own processor, without its videos (they need torchvision)."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ) -> None:
        """:param image_seq_length: ``<IMG_CONTEXT>`` tokens a tile."""
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = IMAGE_START, IMAGE_END
        self.image_token = IMAGE
        self.start_image_token_id = token_id(tokenizer, IMAGE_START)
        self.end_image_token_id = token_id(tokenizer, IMAGE_END)
        self.image_token_id = token_id(tokenizer, IMAGE)
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(IMAGE)})")


def load_processor(
    folder: Path, raw: Mapping[str, Any], *, system_message: str = ""
) -> InternVL2Processor:
    """Build the processor of the checkpoint in `folder`.

    :param raw: its ``config.json``.
    :param system_message: for conversations that do not begin with one of their own.
    :raises ConfigurationError: if the tokenizer's files are missing or do not fit each other.
    """
    tokenizer = load_tokenizer(folder)
    # One tile at most is how the image processor expresses that it should not tile.
    tiling = bool(raw.get("dynamic_image_size", False))
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": tile_size(raw), "width": tile_size(raw)},
        crop_to_patches=tiling,
        min_patches=raw.get("min_dynamic_patch", 1) if tiling else 1,
        max_patches=raw.get("max_dynamic_patch", 6) if tiling else 1,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return InternVL2Processor(
        image_processor,
        tokenizer,
        image_seq_length=tokens_per_tile(raw),
        chat_template=_chat_template(tokenizer, system_message),
    )


def token_id(tokenizer: Any, token: str) -> int:
    """The id of a special token.

    :raises ConfigurationError: if the tokenizer does not have it.
    """
    if token not in tokenizer.get_vocab():
        raise ConfigurationError(f"the tokenizer of the checkpoint has no token {token}")
    return int(tokenizer.convert_tokens_to_ids(token))


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder` from whichever of its published files are there."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer.from_pretrained(folder)
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece_tokenizer(folder)
    raise ConfigurationError(
        "the checkpoint has no tokenizer.json, no vocab.json with merges.txt, and no "
        "tokenizer.model"
    )


def _sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of InternLM2, whose published class is code in the checkpoint."""
    settings = _read_json(folder / "tokenizer_config.json")
    added = {
        index: AddedToken(token, special=True, normalized=False)
        for token, index in _read_json(folder / "added_tokens.json").items()
    }
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[int(index)] = AddedToken(**{k: v for k, v in token.items() if k != "__type"})
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name in NAMED_TOKENS
        if (value := settings.get(name)) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=read_sentencepiece((folder / "tokenizer.model").read_bytes(), added),
        chat_template=settings.get("chat_template"),
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | tokens),
    )


def _chat_template(tokenizer: Any, system_message: str) -> str:
    flatten = FLATTEN.replace("IMAGE", _literal(f"{IMAGE}\n"))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        template = CHATML.replace("BOS", _literal(tokenizer.bos_token if begins else ""))
    return flatten.replace("SYSTEM", _literal(system_message)) + str(template)


def _literal(text: str) -> str:
    """A string literal of Jinja, whose escapes are Python's; JSON's are among them."""
    return json.dumps(text, ensure_ascii=False)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
