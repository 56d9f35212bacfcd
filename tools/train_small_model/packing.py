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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

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
from .sampling import FOR_THE_EYES, sample
from .talk import Sample

PICTURE = f"{IMAGE_START}{IMAGE * IMAGE_TOKENS}{IMAGE_END}\n"
NEXT_ASSISTANT = f"{END}\n{ASSISTANT}"
NEXT_USER = f"{END}\n{USER}"
SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n"
KEEP_AS_ASKED = ("describe", "unknown")
ANSWER_IN_A_WORD = (" Answer in one word.", " Answer with one word.", " Please answer.")


@dataclass(frozen=True)
class Shape:
    """How large a batch is; every batch has the same shape, so compiled code is used again."""

    rows: int = 40
    length: int = 128
    images: int = 46


@dataclass
class Branch:
    """Tokens of one conversation after its prefix; ``skills`` is -1 where nothing is learnt."""

    tokens: list[int]
    skills: list[int]


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

    def __init__(self, tokenizer_file: str, shape: Shape, skills: dict[str, int]) -> None:
        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.shape = shape
        self.skills = skills
        self.encode = lru_cache(maxsize=50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def group(self, drawn: Sample, rng: random.Random | None) -> Group:
        """One sample as tokens; with ``rng`` now and then a system message or the text first."""
        prefix = USER
        if rng and rng.random() < 0.05:
            prefix = SYSTEM + prefix
        last = rng is not None and rng.random() < 0.06
        if not last:
            prefix += PICTURE * len(drawn.images)
        branches = []
        for talk in drawn.talks[: 1 if last else None]:
            tokens: list[int] = []
            skills: list[int] = []
            for i, turn in enumerate(talk):
                asked = turn.question
                if rng and turn.skill not in KEEP_AS_ASKED and rng.random() < 0.02:
                    asked += rng.choice(ANSWER_IN_A_WORD)
                if last and i == 0:
                    asked += "\n" + PICTURE * len(drawn.images)
                # Not one string: a question's last piece must not merge with what follows.
                for text, skill in (
                    (NEXT_USER if i else "", -1),
                    (asked, -1),
                    (NEXT_ASSISTANT, -1),
                    (turn.answer, self.skills.setdefault(turn.skill, len(self.skills))),
                ):
                    ids = self.encode(text)
                    tokens += ids
                    skills += [skill] * len(ids)
                if i + 1 == len(talk):
                    ids = self.encode(END)
                    tokens += ids
                    skills += [skill]
                # In a longer talk the end of the turn is learnt as the start of NEXT_USER.
            learnt = list(skills)
            for at in range(1, len(tokens)):
                if skills[at] == -1 and skills[at - 1] >= 0:
                    learnt[at] = skills[at - 1]
            branches.append(Branch(tokens, learnt))
        return Group(
            [pixels(i) for i in drawn.images],
            [cell_labels(p) for p in drawn.pictures],
            list(self.encode(prefix)),
            branches,
        )

    def batch(
        self, seed: int, number: int, most: int, weights: Mapping[str, float] | None
    ) -> Batch:
        """One training batch: new samples until the rows or the places for pictures are full."""

        def groups() -> Iterator[Group]:
            for at in count(seed * 1_000_000_000 + number * 1_000):
                yield self.group(sample(at, most=most, weights=weights), random.Random(at))

        return self.fill(groups())

    def for_the_eyes(self, seed: int, number: int) -> Batch:
        """A batch of pictures with nothing asked about them."""
        first = seed * 1_000_000_000 + number * 1_000
        drawn = [
            sample(first + i, weights=FOR_THE_EYES, questions=0).pictures[0]
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
        self.labels = np.full(size, -100, np.int64)
        self.skills = np.full(size, -1, np.int64)
        self.images: list[np.ndarray] = []
        self.cells: list[np.ndarray] = []
        self.row = self.used = 0

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
            learnt = np.array(branch.skills) >= 0
            before = np.flatnonzero(learnt) + end - 1
            self.labels[row, before] = np.array(branch.tokens)[learnt]
            self.skills[row, before] = np.array(branch.skills)[learnt]
            end += length
        self.used = end
        self.images += group.images
        self.cells += group.cells
        return True

    def batch(self) -> Batch:
        """The filled arrays; places for pictures that were not needed stay black."""
        pictures = np.zeros((self.shape.images, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        if self.images:
            pictures[: len(self.images)] = np.stack(self.images).transpose(0, 3, 1, 2)
        cells = np.full((self.shape.images, len(HEADS), IMAGE_TOKENS), -1, np.int64)
        if self.cells:
            cells[: len(self.cells)] = np.stack(self.cells)
        arrays = {
            "images": pictures,
            "cells": cells,
            "n_images": np.array(len(self.images)),
            "ids": self.ids,
            "positions": self.positions,
            "groups": self.groups,
            "branches": self.branches,
            "labels": self.labels,
            "skills": self.skills,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


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
    """Batches from ``start`` on, shared out among the loader's processes in order."""

    def __init__(
        self,
        packer: Packer,
        seed: int,
        start: int,
        eyes_until: int,
        most: Callable[[int], int],
        weights: Callable[[], Mapping[str, float] | None],
    ) -> None:
        self.packer = packer
        self.seed = seed
        self.start = start
        self.eyes_until = eyes_until
        self.most = most
        self.weights = weights

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = self.start + (worker.id if worker else 0)
        while True:
            if number < self.eyes_until:
                yield self.packer.for_the_eyes(self.seed, number)
            else:
                yield self.packer.batch(self.seed, number, self.most(number), self.weights())
            number += worker.num_workers if worker else 1
