"""From messages to the tokens of one prompt; user text cannot forge special tokens.

The prompt is the very one that the processor makes of these messages (``apply_chat_template``),
unless the text of a message changed its special tokens or image placeholders::

    plain      <|im_start|>user\\n <IMG_CONTEXT> What is <|im_end|>?  <|im_end|>
    skeleton   <|im_start|>user\\n <IMG_CONTEXT> (text 0)             <|im_end|>

Both are tokenised. If the special tokens of the two differ, the text forged some: then the prompt
is the skeleton's tokens, with each text's own tokens, taken without any special ones, in its place.
Since texts are tokenised apart there, not even two parts together can form a special token.

In the same way, an answer whose exact tokens are known is a stand-in, in both of them.

A raw prompt (``do_preprocess=False``) is used as it is: there, special tokens are meant.
"""

from __future__ import annotations

import copy
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from visq.errors import ImageError, InvalidRequest, UnsupportedParameter
from visq.pixels import PixelBuffer
from visq.types import ImagePart, Message, TextPart

PLACEHOLDERS: Final = ("image_token", "video_token", "audio_token")
"""Attributes of a processor that hold the text of a placeholder."""

_Turn: TypeAlias = tuple[str, list[int | None]]
"""A role, and the places of its message: indices of texts; ``None`` for an image."""


def expand(
    ids: Sequence[int], image_token_id: int, expansions: Sequence[list[int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Put the tokens of each image in the place of its placeholder.

    :param ids: of `PromptBuilder.tokens`.
    :param expansions: for each image, in order, its tokens.
    :returns: the prompt's token ids; and for each image, where its tokens start and how many.
    :raises InvalidRequest: if there are more or fewer placeholders than images.
    """
    places = [index for index, token in enumerate(ids) if token == image_token_id]
    if len(places) != len(expansions):
        raise InvalidRequest(
            f"the prompt has {len(places)} image placeholders for {len(expansions)} images"
        )
    expanded: list[int] = []
    spans: list[tuple[int, int]] = []
    done = 0
    for place, expansion in zip(places, expansions, strict=True):
        expanded += ids[done:place]
        spans.append((len(expanded), len(expansion)))
        expanded += expansion
        done = place + 1
    expanded += ids[done:]
    return expanded, spans


class PromptBuilder:
    """Builds prompts for one model. `tokens` may be called by many threads at a time."""

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
        self._placeholder_ids = frozenset(
            self._tokenizer.convert_tokens_to_ids(token) for token in self._placeholders
        )
        self._vocabulary_end = max(self._tokenizer.get_vocab().values()) + 1
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
        with self._stand_ins.lock:
            text, fillings = self._written(messages, len(images), do_preprocess, {})
            if fillings is None:
                return self._encode(self._processor, text, images)
            tensors = self._encode(self._stand_ins.processor, text, images)
            return self._fill_in(tensors, fillings)

    def tokens(
        self,
        messages: Sequence[Message],
        *,
        images: int,
        do_preprocess: bool,
        answer_ids: Mapping[int, list[int]],
    ) -> list[int]:
        """Return the prompt's token ids, with one placeholder for each image (see `expand`).

        :param images: how many there are: one for each image part.
        :param answer_ids: for assistant messages, by their index: the tokens to put in place of
            those of their text. They are trusted, special tokens in them are meant; but an answer
            that holds a placeholder is tokenised from its text, or it would be taken for a picture,
            and so is one with a token that the vocabulary does not have.
        :raises InvalidRequest: the model's template refuses the messages, the number of images
            does not fit the prompt, or `answer_ids` names a message that is no answer.
        :raises UnsupportedParameter: images for a text model, or no chat template.
        """
        with self._stand_ins.lock:
            text, fillings = self._written(messages, images, do_preprocess, answer_ids)
            if fillings is not None:
                ids = self._token_ids(self._stand_ins.tokenizer, text)
                return self._filled(ids, fillings)[0]
        return self._token_ids(self._tokenizer, text)

    def _written(
        self,
        messages: Sequence[Message],
        images: int,
        do_preprocess: bool,
        answer_ids: Mapping[int, list[int]],
    ) -> tuple[str, list[list[int]] | None]:
        """The text of the prompt; and, if it has stand-ins, the tokens that they stand for."""
        if images and not self._takes_images:
            raise UnsupportedParameter(f"the model {self._model} takes no images", param="messages")
        for index in answer_ids:
            if not (0 <= index < len(messages) and messages[index].role == "assistant"):
                raise InvalidRequest(
                    f"message {index} has exact tokens, but is no message of the assistant",
                    param="answer_ids",
                )
        if not do_preprocess:
            return self._raw(messages, images), None
        parts = [part for message in messages for part in message.parts()]
        if sum(isinstance(part, ImagePart) for part in parts) != images:
            raise InvalidRequest(f"the messages do not have {images} image parts")
        turns, slots = self._turns(messages, answer_ids)
        stand_ins = self._stand_ins.take(len(slots))
        plain_texts = [
            slot if isinstance(slot, str) else stand_in
            for slot, stand_in in zip(slots, stand_ins, strict=True)
        ]
        plain = self._render(turns, plain_texts)
        skeleton = self._render(turns, stand_ins)
        if self._reserved_in(plain) != self._reserved_in(skeleton):
            return skeleton, [
                self._encode_text(slot) if isinstance(slot, str) else slot for slot in slots
            ]
        if plain_texts == slots:
            return plain, None
        return plain, [[] if isinstance(slot, str) else slot for slot in slots]

    def _turns(
        self, messages: Sequence[Message], answer_ids: Mapping[int, list[int]]
    ) -> tuple[list[_Turn], list[str | list[int]]]:
        """The messages without their text; and their texts, or the tokens of answers."""
        turns: list[_Turn] = []
        slots: list[str | list[int]] = []
        for index, message in enumerate(messages):
            answer = answer_ids.get(index)
            if answer is not None and not self._may_stand(answer):
                answer = None
            places: list[int | None] = []
            for part in message.parts():
                if isinstance(part, ImagePart):
                    places.append(None)
                elif answer is None:
                    places.append(len(slots))
                    slots.append(part.text)
            if answer is not None:
                places.append(len(slots))
                slots.append(answer)
            turns.append((message.role, places))
        return turns, slots

    def _may_stand(self, answer: Sequence[int]) -> bool:
        """Whether these tokens can be put in place of an answer's text."""
        known = all(0 <= token < self._vocabulary_end for token in answer)
        return known and self._placeholder_ids.isdisjoint(answer)

    def _raw(self, messages: Sequence[Message], images: int) -> str:
        parts = [part for message in messages for part in message.parts()]
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        placeholder = getattr(self._processor, "image_token", None)
        found = text.count(placeholder) if placeholder else 0
        if self._takes_images and found != images:
            raise InvalidRequest(
                f"the raw prompt has {found} image placeholders ({placeholder}) for "
                f"{images} images",
                param="prompt",
            )
        for other in self._placeholders:
            if other != placeholder and other in text:
                raise InvalidRequest(
                    f"the raw prompt has the placeholder {other}, but visq shows models images "
                    "only",
                    param="prompt",
                )
        if not text:
            raise InvalidRequest("the raw prompt is empty", param="prompt")
        return text

    def _render(self, turns: Sequence[_Turn], texts: Sequence[str]) -> str:
        """Apply the chat template to `turns`, with `texts` in their places."""
        conversation: list[dict[str, Any]] = []
        for role, places in turns:
            if self._takes_images:
                content: Any = [
                    {"type": "image"} if place is None else {"type": "text", "text": texts[place]}
                    for place in places
                ]
            else:
                content = "\n".join(texts[place] for place in places if place is not None)
            conversation.append({"role": role, "content": content})
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

    def _reserved_in(self, text: str) -> list[object]:
        """What a text holds of special tokens (in order) and placeholders (their numbers)."""
        ids = self._stand_ins.tokenizer(text, add_special_tokens=False)["input_ids"]
        reserved: list[object] = [i for i in ids if i in self._reserved]
        return reserved + [text.count(placeholder) for placeholder in self._placeholders]

    def _encode(
        self, processor: Any, text: str, images: Sequence[PixelBuffer]
    ) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = {"return_tensors": "pt", **self._special(text)}
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

    def _token_ids(self, tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer(text, **self._special(text))["input_ids"])

    def _special(self, text: str) -> dict[str, bool]:
        """Whether the tokenizer adds its own special tokens: not if the template has done so."""
        bos = self._tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _fill_in(
        self, tensors: dict[str, torch.Tensor], fillings: Sequence[list[int]]
    ) -> dict[str, torch.Tensor]:
        """Put `fillings` in the places of their stand-ins."""
        ids = tensors["input_ids"][0].tolist()
        length = len(ids)
        encoded, sources = self._filled(ids, fillings)
        filled = dict(tensors)
        for name, tensor in tensors.items():  # attention mask, token types
            if tensor.shape == (1, length):
                filled[name] = tensor[:, sources]
        filled["input_ids"] = torch.tensor([encoded], dtype=tensors["input_ids"].dtype)
        return filled

    def _filled(
        self, ids: Sequence[int], fillings: Sequence[list[int]]
    ) -> tuple[list[int], list[int]]:
        """`ids` with `fillings` in the places of stand-ins; and where each token comes from."""
        encoded: list[int] = []
        sources: list[int] = []
        for position, token in enumerate(ids):
            index = self._stand_ins.index_of(token)
            new = [token] if index is None else fillings[index]
            encoded += new
            sources += [position] * len(new)
        return encoded, sources

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
        self.lock = threading.Lock()
        """To be held by whoever uses any of this: tokens cannot be added to a tokenizer in use."""
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
