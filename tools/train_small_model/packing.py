"""Turns samples into packed batches of fixed shape.

The vision tower is the dear part, so each picture is paid for once and asked about many times:

    group   <|im_start|>user <img>..</img>            the prefix: seen by all below
              What colour is the star? ... red        branch 1: sees prefix and itself
              How many shapes are there? ... 4        branch 2: likewise
                Is that more than 3? ... yes            a second turn goes on in its branch

Each branch's positions go on from the end of the prefix, so that to the model it is a plain
conversation, exactly what the chat template makes of it.  Rows hold whole groups.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from .build import (
    ASSISTANT,
    END,
    IMAGE,
    IMAGE_END,
    IMAGE_SIZE,
    IMAGE_START,
    IMAGE_TOKENS,
    START,
    USER,
)
from .dense import HEADS, cell_labels
from .phrasings import ASK
from .sampling import Steering, sample
from .talk import Sample, Talk

LARGE = "any, large shapes"
SKILLS = (*ASK, "absent", "unknown", "nothing", LARGE)
"""Everything that is counted apart; a skill's number is its place here."""

PICTURE = f"{IMAGE_START}{IMAGE * IMAGE_TOKENS}{IMAGE_END}\n"
NEXT_ASSISTANT = f"{END}\n{ASSISTANT}"
NEXT_USER = f"{END}\n{USER}"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"
KEEP_AS_ASKED = ("describe", "unknown", "nothing", "absent")
QUESTIONS = 8
"""On one picture, at the most."""

ANSWER_IN_A_WORD = (" Answer in one word.", " Answer with one word.", " Please answer.")


@dataclass(frozen=True)
class Shape:
    """How large a batch is; every batch has the same shape, so compiled code is used again."""

    rows: int = 20
    images: int = 46
    length: int = 512

    @property
    def answers(self) -> int:
        """Room for tokens of answers."""
        return self.rows * self.length // 6

    @property
    def turns(self) -> int:
        """Room for answers."""
        return self.rows * self.length // 16


@dataclass
class Branch:
    """Tokens of one conversation after its prefix.

    ``answers`` are the parts of it that are learnt: where each starts and ends, and its skill.
    """

    tokens: list[int]
    answers: list[tuple[int, int, int]]


@dataclass
class Group:
    """A prefix with its pictures, and the branches that see it."""

    images: list[np.ndarray]
    cells: list[np.ndarray]
    prefix: list[int]
    branches: list[Branch]


Batch = dict[str, torch.Tensor]


def pixels(image: Image.Image) -> np.ndarray:
    """What the exported image processor makes of a picture, before rescaling."""
    rgb = image.convert("RGB")
    if rgb.size != (IMAGE_SIZE, IMAGE_SIZE):
        rgb = rgb.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


class Packer:
    """Encodes samples and fills batches with them; a pure function of seed and batch number."""

    def __init__(self, tokenizer_file: str, shape: Shape) -> None:
        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.shape = shape
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def group(self, drawn: Sample, rng: random.Random | None) -> Group:
        """One sample as tokens; with ``rng`` now and then a system message or the text first."""
        prefix = USER
        if rng and rng.random() < 0.05:
            prefix = SYSTEM + prefix
        later = sum(turn.brings for turn in drawn.talks[0]) if drawn.talks else 0
        pictures = PICTURE * (len(drawn.pictures) - later)
        last = rng is not None and rng.random() < 0.06
        if not last:
            prefix += pictures
        talks = drawn.talks[: 1 if last else None]
        return Group(
            [pixels(i) for i in drawn.images],
            [cell_labels(p) for p in drawn.pictures],
            list(self.encode(prefix)),
            [self._branch(talk, "\n" + pictures if last else "", rng) for talk in talks],
        )

    def _branch(self, talk: Talk, ending: str, rng: random.Random | None) -> Branch:
        """A conversation; ``ending`` comes behind its first question."""
        tokens: list[int] = []
        answers: list[tuple[int, int, int]] = []
        for i, turn in enumerate(talk):
            asked = turn.question
            if rng and turn.skill not in KEEP_AS_ASKED and rng.random() < 0.02:
                asked += rng.choice(ANSWER_IN_A_WORD)
            # Not one string: a question's last piece must not merge with what follows.
            before = (NEXT_USER if i else "", PICTURE * turn.brings, asked, "" if i else ending)
            for text in (*before, NEXT_ASSISTANT):
                if text:
                    tokens += self.encode(text)
            start = len(tokens)
            # What is printed is spelled, even where the tokenizer has a token for the word.
            for part in turn.answer if turn.skill == "read word" else (turn.answer,):
                tokens += self.encode(part)
            answers.append((start, len(tokens) + 1, SKILLS.index(turn.skill)))
        # In a longer talk the end of a turn is the start of NEXT_USER.
        tokens += self.encode(END)
        return Branch(tokens, answers)

    def batch(self, seed: int, number: int, steering: Steering) -> Batch:
        """One training batch: new samples until the rows or the places for pictures are full."""

        def groups() -> Iterator[Group]:
            for at in count(seed * 1_000_000_000_000 + number * 10_000):
                drawn = sample(at, steering=steering, questions=QUESTIONS)
                yield self.group(drawn, random.Random(at))

        return self.fill(groups())

    def for_the_eyes(self, seed: int, number: int, steering: Steering) -> Batch:
        """A batch of pictures with nothing asked about them."""
        first = seed * 1_000_000_000_000 + number * 10_000
        drawn = [
            sample(first + i, steering=steering, questions=0).pictures[0]
            for i in range(self.shape.images)
        ]
        rows = Rows(self.shape)
        rows.images = [pixels(p.image) for p in drawn]
        rows.cells = [cell_labels(p) for p in drawn]
        return rows.batch()

    def fill(self, groups: Iterable[Group]) -> Batch:
        """A batch of as many of these groups as there is room for."""
        rows = Rows(self.shape)
        for group in groups:
            if not rows.add(group):
                break
        return rows.batch()


class Rows:
    """The arrays of a batch while it is filled."""

    def __init__(self, shape: Shape) -> None:
        size = (shape.rows, shape.length)
        self.shape = shape
        self.ids = np.zeros(size, np.int64)
        self.positions = np.zeros(size, np.int64)
        self.groups = np.zeros(size, np.int16)
        self.branches = np.zeros(size, np.int16)
        self.at: list[int] = []
        self.wanted: list[int] = []
        self.turn: list[int] = []
        self.turn_skill: list[int] = []
        self.images: list[np.ndarray] = []
        self.cells: list[np.ndarray] = []
        self.row = self.used = self.added = 0

    def add(self, group: Group) -> bool:
        """Put a group behind the last one, or in the next row; False when the batch is full."""
        shape = self.shape
        if len(self.images) + len(group.images) > shape.images:
            return False
        least = len(group.prefix) + sum(len(b.tokens) for b in group.branches[:3])
        if least > shape.length - self.used:
            self.row, self.used = self.row + 1, 0
        if self.row == shape.rows:
            return False
        self.added += 1
        row, number = self.row, 1 + int(self.groups[self.row].max())
        start, end = self.used, self.used + len(group.prefix)
        self.ids[row, start:end] = group.prefix
        self.positions[row, start:end] = np.arange(len(group.prefix))
        self.groups[row, start:end] = number
        for nth, branch in enumerate(group.branches, start=1):
            length = len(branch.tokens)
            if length > shape.length - end:
                continue
            part = slice(end, end + length)
            self.ids[row, part] = branch.tokens
            self.positions[row, part] = len(group.prefix) + np.arange(length)
            self.groups[row, part] = number
            self.branches[row, part] = nth
            self._learn(branch, row * shape.length + end)
            end += length
        self.used = end
        self.images += group.images
        self.cells += group.cells
        return True

    def _learn(self, branch: Branch, offset: int) -> None:
        """Note the tokens of the answers and where each is to be told: one token earlier."""
        for start, end, skill in branch.answers:
            full = len(self.at) + end - start > self.shape.answers
            if full or len(self.turn_skill) == self.shape.turns:
                return
            self.at += range(offset + start - 1, offset + end - 1)
            self.wanted += branch.tokens[start:end]
            self.turn += [len(self.turn_skill)] * (end - start)
            self.turn_skill.append(skill)

    def batch(self) -> Batch:
        """The filled arrays; places for pictures that were not needed stay black."""
        pictures = np.zeros((self.shape.images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        for place, image in zip(pictures, self.images, strict=False):
            place[:] = image
        cells = np.full((self.shape.images, len(HEADS), IMAGE_TOKENS), -1, np.int64)
        if self.cells:
            cells[: len(self.cells)] = np.stack(self.cells)
        answers, turns = self.shape.answers, self.shape.turns
        arrays = {
            "images": pictures,
            "cells": cells,
            "n_images": np.array(len(self.images)),
            "n_turns": np.array(len(self.turn_skill)),
            "n_groups": np.array(self.added),
            "ids": self.ids,
            "positions": self.positions,
            "groups": self.groups,
            "branches": self.branches,
            "at": _padded(self.at, answers, 0),
            "wanted": _padded(self.wanted, answers, -100),
            "turn": _padded(self.turn, answers, turns),
            "turn_skill": _padded(self.turn_skill, turns + 1, len(SKILLS)),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _padded(values: list[int], length: int, filler: int) -> np.ndarray:
    found = np.full(length, filler, np.int64)
    found[: len(values)] = values
    return found


def attention_mask(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [rows, 1, length, length]: causal, own group, own branch or prefix."""
    groups, branches = batch["groups"], batch["branches"]
    length = groups.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    same = groups[:, :, None] == groups[:, None, :]
    seen = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    allowed = causal & same & seen
    mask = torch.zeros(allowed.shape, dtype=dtype, device=groups.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class Batches(IterableDataset[Batch]):
    """Batches from ``start`` on, shared out among the loader's processes in order.

    The file ``steering`` is read again for each of them.
    """

    def __init__(self, packer: Packer, seed: int, start: int, steering: Path) -> None:
        self.packer = packer
        self.seed = seed
        self.start = start
        self.steering = steering

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = self.start + (worker.id if worker else 0)
        while True:
            now = Steering.read(self.steering)
            make = self.packer.for_the_eyes if now.eyes else self.packer.batch
            yield make(self.seed, number, now)
            number += worker.num_workers if worker else 1
