"""One answer in the making: its tokens, its pictures, and how far the model has read them."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from worker.engine.families.base import ImageFeatures, PreparedImage
from worker.engine.keys import block_hash

if TYPE_CHECKING:
    from worker.engine.adapters import Adapter


@dataclass(eq=False, slots=True)
class ImageSpan:
    """A picture in a prompt: the tokens ``start`` to ``end`` stand for it."""

    start: int
    end: int
    key: bytes
    """Name of its content (`worker.engine.keys.image_key`)."""
    runs: list[tuple[int, int, int]]
    """``(start, end, row)``: the prompt's tokens ``start`` to ``end`` are placeholders for the rows
    of its features from ``row`` on. (Between runs there may be tokens such as row separators.)"""
    index: int
    """Which of the request's pictures it is."""
    prepared: PreparedImage | None = None
    """Its pixels, until it is encoded."""
    features: ImageFeatures | None = None
    """From the encoding until the model has read it."""

    @property
    def tokens(self) -> int:
        return self.end - self.start

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


def placeholder_runs(
    token_ids: ListLike[int], start: int, end: int, placeholder: int
) -> list[tuple[int, int, int]]:
    """`ImageSpan.runs` of the span ``start`` to ``end``."""
    runs: list[tuple[int, int, int]] = []
    at, row = start, 0
    for is_placeholder, group in groupby(t == placeholder for t in token_ids[start:end]):
        length = sum(1 for _ in group)
        if is_placeholder:
            runs.append((at, at + length, row))
            row += length
        at += length
    return runs


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, in three stretches::

        |--- computed ---|--- not yet computed ---|-- pending --|
        |-------------- token_ids ----------------|

    `computed`: their keys and values are in the cache, or will be when the launched steps have run.
    `pending`: sampled by a launched step; the host does not know them yet.
    """

    order: tuple[int, int, int]
    """Lane, arrival, choice: smaller goes first."""
    token_ids: list[int]
    """The prompt's, then the generated ones."""
    prompt_tokens: int
    max_tokens: int
    """Greatest length of prompt and answer."""
    positions: torch.Tensor
    """``(axes, prompt_tokens)`` int64, on the CPU."""
    delta: int
    """A generated token at index t stands at position ``t + delta``."""
    images: list[ImageSpan]
    root: bytes
    """Parent of the first block's hash."""
    adapter: Adapter | None = None
    """What is added to the model's weights for it."""
    slot: int = -1
    """Row of the sampler's state while it runs."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    admitted: bool = False
    """Whether it has ever had a slot."""
    needs_feedback: bool = False
    """Its next step depends on the text of its last token, so it is not launched ahead."""
    wants_prompt_logits: bool = False
    """All of its prompt is computed, whatever is cached."""
    ended: bool = False
    cached_tokens: int = 0
    """Prompt tokens found in the cache when it was first admitted."""
    hashes: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they are known."""
    registered: int = 0
    """Of its blocks, those that the pool knows by their hash."""
    tabled: int = 0
    """Of its blocks, those that the decoder's page table knows (`worker.engine.decoder`)."""

    @property
    def lane(self) -> int:
        """0 is the best."""
        return self.order[0]

    @property
    def length(self) -> int:
        """Tokens, known and pending."""
        return len(self.token_ids) + self.pending

    @property
    def generated(self) -> int:
        """Generated tokens, known and pending."""
        return self.length - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Whether only its newest token has not been computed."""
        return self.computed == self.length - 1 and self.computed >= self.prompt_tokens

    @property
    def complete(self) -> bool:
        """Whether it may get no further token."""
        return self.length >= self.max_tokens

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of the known tokens."""
        while (len(self.hashes) + 1) * block_size <= len(self.token_ids):
            start = len(self.hashes) * block_size
            end = start + block_size
            images = [
                (image.key, start - image.start)
                for image in self.images
                if image.overlaps(start, end)
            ]
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(block_hash(parent, self.token_ids[start:end], images))
        return self.hashes

    def images_in(self, start: int, end: int) -> list[ImageSpan]:
        """Pictures that have a token in this stretch."""
        return [image for image in self.images if image.overlaps(start, end)]
