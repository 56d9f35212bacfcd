"""From messages and pixels to the tensors of one prompt; user text cannot forge special tokens.

The prompt is the very one that the processor makes of these messages (``apply_chat_template``),
unless the text of a message changed its special tokens or image placeholders::

    plain      <|im_start|>user\\n <IMG_CONTEXT> What is <|im_end|>?  <|im_end|>
    skeleton   <|im_start|>user\\n <IMG_CONTEXT> (text 0)             <|im_end|>

Both are tokenised. If the special tokens of the two differ, the text forged some: then the prompt
is the skeleton's tokens, with each text's own tokens, taken without any special ones, in its place.
Since texts are tokenised apart there, not even two parts together can form a special token.

A raw prompt (``do_preprocess=False``) is used as it is: there, special tokens are meant.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from visq.errors import ImageError, InvalidRequest, UnsupportedParameter
from visq.pixels import PixelBuffer
from visq.types import ImagePart, Message, TextPart

PLACEHOLDERS: Final = ("image_token", "video_token", "audio_token")
"""Attributes of a processor that hold the text of a placeholder."""


class PromptBuilder:
    """Builds prompts for one model."""

    def __init__(self, model: str, processor: Any, *, takes_images: bool) -> None:
        """
        :param model: its name, for messages.
        :param processor: of a vision-language model, or the tokenizer of a text model.
        """
        self._model = model
        self._takes_images = takes_images
        self._processor = processor
        self._tokenizer = processor.tokenizer if takes_images else processor
        self._placeholders = [
            token for name in PLACEHOLDERS if (token := getattr(processor, name, None))
        ]
        self._reserved = _reserved_ids(processor, self._tokenizer, self._placeholders)
        self._stand_ins = _StandIns(processor, takes_images=takes_images)
        self._as_text = _text_encoder(self._tokenizer)

    def build(
        self, messages: Sequence[Message], images: Sequence[PixelBuffer], *, do_preprocess: bool
    ) -> dict[str, torch.Tensor]:
        """Return the tensors for ``model.generate``: ``input_ids`` (1, T) and what goes with them.

        :param images: one for each image part, in order.
        :raises InvalidRequest: the model's template refuses the messages, or the number of images
            does not fit the prompt.
        :raises UnsupportedParameter: images for a text model, or no chat template.
        :raises ImageError: the model's image processor refuses an image.
        """
        if images and not self._takes_images:
            raise UnsupportedParameter(f"the model {self._model} takes no images", param="messages")
        if not do_preprocess:
            return self._build_raw(messages, images)
        parts = [part for message in messages for part in message.parts()]
        if sum(isinstance(part, ImagePart) for part in parts) != len(images):
            raise InvalidRequest(f"the messages do not have {len(images)} image parts")
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        stand_ins = self._stand_ins.take(len(texts))
        plain = self._render(messages, texts)
        skeleton = self._render(messages, stand_ins)
        if self._reserved_in(plain) == self._reserved_in(skeleton, self._stand_ins.tokenizer):
            return self._encode(self._processor, plain, images)
        tensors = self._encode(self._stand_ins.processor, skeleton, images)
        return self._fill_in(tensors, texts)

    def _build_raw(
        self, messages: Sequence[Message], images: Sequence[PixelBuffer]
    ) -> dict[str, torch.Tensor]:
        parts = [part for message in messages for part in message.parts()]
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        placeholder = getattr(self._processor, "image_token", None)
        found = text.count(placeholder) if placeholder else 0
        if self._takes_images and found != len(images):
            raise InvalidRequest(
                f"the raw prompt has {found} image placeholders ({placeholder}) for "
                f"{len(images)} images",
                param="prompt",
            )
        if not text:
            raise InvalidRequest("the raw prompt is empty", param="prompt")
        return self._encode(self._processor, text, images)

    def _render(self, messages: Sequence[Message], texts: Sequence[str]) -> str:
        """Apply the chat template to `messages`, with `texts` in place of their text parts."""
        remaining = iter(texts)
        conversation: list[dict[str, Any]] = []
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts():
                if isinstance(part, ImagePart):
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": next(remaining)})
            if self._takes_images:
                conversation.append({"role": message.role, "content": content})
            else:
                joined = "\n".join(part["text"] for part in content)
                conversation.append({"role": message.role, "content": joined})
        if not _template_text(self._processor, self._tokenizer):
            raise UnsupportedParameter(
                f"the model {self._model} has no chat template; send a raw prompt with "
                "`do_preprocess: false`",
                param="do_preprocess",
            )
        try:
            rendered = self._processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the chat template of the model {self._model} refuses these messages: {error}",
                param="messages",
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _reserved_in(self, text: str, tokenizer: Any = None) -> list[object]:
        """What a text holds of special tokens (in order) and placeholders (their numbers)."""
        ids = (tokenizer or self._tokenizer)(text, add_special_tokens=False)["input_ids"]
        reserved: list[object] = [i for i in ids if i in self._reserved]
        return reserved + [text.count(placeholder) for placeholder in self._placeholders]

    def _encode(
        self, processor: Any, text: str, images: Sequence[PixelBuffer]
    ) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"return_tensors": "pt"}
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos):  # the template has written it
            options["add_special_tokens"] = False
        if not self._takes_images:
            return dict(processor([text], **options))
        if images:
            options["images"] = [Image.fromarray(image.array()) for image in images]
        try:
            return dict(processor(text=[text], **options))
        except ValueError as error:
            if not images:
                raise
            raise ImageError(
                f"the image processor of the model {self._model} refuses an image: {error}"
            ) from error

    def _fill_in(
        self, tensors: dict[str, torch.Tensor], texts: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Put the tokens of `texts` in the places of their stand-ins."""
        ids = tensors["input_ids"][0].tolist()
        length = len(ids)
        encoded: list[int] = []
        sources: list[int] = []  # for each new position, the old one that it comes from
        for position, token in enumerate(ids):
            index = self._stand_ins.index_of(token)
            new = [token] if index is None else self._encode_text(texts[index])
            encoded += new
            sources += [position] * len(new)
        filled = dict(tensors)
        for name, tensor in tensors.items():  # attention mask, token types
            if tensor.shape == (1, length):
                filled[name] = tensor[:, sources]
        filled["input_ids"] = torch.tensor([encoded], dtype=tensors["input_ids"].dtype)
        return filled

    def _encode_text(self, text: str) -> list[int]:
        """Tokens of `text` without any special one."""
        ids = self._as_text(text)
        if self._reserved.isdisjoint(ids):
            return ids
        # The vocabulary itself holds the special token as a word: take it apart.
        if len(text) < 2:
            raise InvalidRequest(f"the text {text!r} is a special token of the model {self._model}")
        half = len(text) // 2
        return self._encode_text(text[:half]) + self._encode_text(text[half:])


class _StandIns:
    """Tokens that stand for the texts of messages, in a tokenizer of their own.

    Their names are random, so that no text can hold one.
    """

    def __init__(self, processor: Any, *, takes_images: bool) -> None:
        self.processor = copy.deepcopy(processor)
        self.tokenizer = self.processor.tokenizer if takes_images else self.processor
        self._secret = secrets.token_hex(8)
        self._names: list[str] = []
        self._indices: dict[int, int] = {}

    def take(self, count: int) -> list[str]:
        """Return the stand-ins of the texts 0 to `count` - 1."""
        first = len(self._names)
        if count > first:
            new = [f"<|{self._secret}-{index}|>" for index in range(first, max(count, 2 * first))]
            self.tokenizer.add_tokens([AddedToken(name, normalized=False) for name in new])
            for index, name in enumerate(new, start=first):
                self._indices[self.tokenizer.convert_tokens_to_ids(name)] = index
            self._names += new
        return self._names[:count]

    def index_of(self, token: int) -> int | None:
        return self._indices.get(token)


def _template_text(processor: Any, tokenizer: Any) -> str:
    """The chat template (all of them, if there are several); empty if there is none."""
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", "")
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _reserved_ids(processor: Any, tokenizer: Any, placeholders: Sequence[str]) -> frozenset[int]:
    """Tokens that text must not forge: special ones, and added ones that the template writes."""
    template = _template_text(processor, tokenizer)
    reserved = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (not token.content.isspace() and token.content in template)
    }
    reserved |= {tokenizer.convert_tokens_to_ids(placeholder) for placeholder in placeholders}
    # Not the token for unknown letters, which any text may hold, unless it has another meaning too.
    meanings = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if tokenizer.unk_token is not None and tokenizer.unk_token not in meanings:
        reserved.discard(tokenizer.unk_token_id)
    return frozenset(reserved - {None})


def _text_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to tokens that knows no added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return lambda text: list(
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )
    description = json.loads(backend.to_str())
    description |= {"added_tokens": [], "post_processor": None}
    bare = Tokenizer.from_str(json.dumps(description))
    return lambda text: list(bare.encode(text, add_special_tokens=False).ids)
