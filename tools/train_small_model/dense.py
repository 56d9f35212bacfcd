"""What the eyes are told in training: for each image token, what stands in its part of the picture.

Questions alone teach a fresh vision tower next to nothing for a very long time; the world knows
what it drew, so it says so.  Each image token is asked, by linear heads that are never exported:

    name    the shape, icon, letter, digit or bar whose middle (a bar: whose foot) is here, or none
    colour  of what is here          size, place, value    of what is here (value: of bars)

The vectors of names, colours and values are the language model's own embeddings of those words, so
that the tongue finds in an image token what it knows from text: the token of a red star looks like
"red" and like "star".
"""

import math

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from .build import PAD
from .scenes import SMALLEST
from .vocabulary import COLOURS, DIGITS, ICONS, LETTERS, PLACES, SHAPES
from .world import CELLS, Picture

NAMES = ("", *SHAPES, *ICONS, *LETTERS, *DIGITS, "bar")
HUES = tuple(COLOURS)
VALUES = tuple("12345678")
ALL_PLACES = tuple(place for row in PLACES for place in row)
SIZES = 10
LARGEST = 0.25
HEADS = ("name", "colour", "value", "size", "place")


def size_class(r: float) -> int:
    """Radius on a logarithmic scale, finer than what is asked about."""
    whole = math.log(LARGEST / SMALLEST)
    return min(SIZES - 1, max(0, int(SIZES * math.log(r / SMALLEST) / whole)))


def cell_labels(picture: Picture) -> np.ndarray:
    """Classes [heads, tokens] of one picture; -1 where a head has nothing to learn."""
    labels = np.full((len(HEADS), CELLS * CELLS), -1, np.int64)
    labels[0] = 0
    for thing in picture.things:
        cell = int(thing.y * CELLS) * CELLS + int(thing.x * CELLS)
        labels[:, cell] = (
            NAMES.index(thing.name),
            HUES.index(thing.colour),
            -1,
            size_class(thing.r),
            ALL_PLACES.index(thing.place),
        )
    for bar in picture.bars:
        cell = (CELLS - 1) * CELLS + int(bar.x * CELLS)
        labels[:3, cell] = NAMES.index("bar"), HUES.index(bar.colour), bar.value - 1
    return labels


class DenseHeads(torch.nn.Module):
    """The heads; ``tokenizer`` says which embeddings are the vectors of a class."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        for name, words in zip(HEADS, (NAMES, HUES, VALUES), strict=False):
            ids = torch.tensor([_ids(tokenizer, word) for word in words])
            self.register_buffer(f"{name}_ids", ids, persistent=False)
        self.biases = torch.nn.ParameterList(
            torch.zeros(len(words)) for words in (NAMES, HUES, VALUES)
        )
        self.scale = torch.nn.Parameter(torch.full((3,), math.log(8.0)))
        self.size = torch.nn.Linear(width, SIZES)
        self.place = torch.nn.Linear(width, len(ALL_PLACES))

    def forward(
        self, seen: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and [heads, 2]: right classes and how many there were to tell.

        ``seen`` is [pictures, tokens, width], ``labels`` [pictures, heads, tokens].  Nothing here
        waits for the device.
        """
        seen = seen.float()
        logits = [
            seen @ embeddings[self.get_buffer(f"{name}_ids")].float().mean(1).T * scale.exp() + bias
            for name, scale, bias in zip(HEADS, self.scale, self.biases, strict=False)
        ]
        logits += [self.size(seen), self.place(seen)]
        loss = seen.new_zeros(())
        told = []
        for nth, head in enumerate(logits):
            wanted = labels[:, nth]
            known = wanted >= 0
            total = cross_entropy(
                head.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum"
            )
            loss = loss + total / known.sum().clamp(min=1)
            if nth == 0:
                known = wanted > 0
            right = (head.argmax(-1) == wanted) & known
            told.append(torch.stack((right.sum(), known.sum())))
        return loss, torch.stack(told).float()


def _ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """The tokens of a word at the start of a text and inside one; single characters have one."""
    forms = (PAD, PAD) if not word else (word, word) if len(word) == 1 else (word, " " + word)
    ids = [tokenizer.encode(form, add_special_tokens=False).ids for form in forms]
    assert all(len(found) == 1 for found in ids), (word, ids)
    return [found[0] for found in ids]
