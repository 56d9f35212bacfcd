"""Jobs for `bench.worker`: pictures of the small model's world, and questions on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Final

from tools.train_small_model.sampling import sample

SEEDS_A_ROUND: Final = 1_000_000
QUESTIONS: Final = 8
"""On one picture, in the second workload."""


@dataclass(frozen=True)
class Item:
    """One job."""

    name: str
    question: str
    uri: str
    png: bytes


@dataclass(frozen=True)
class Workload:
    questions: int
    """Different ones on each picture."""
    text: str
    tokens: int = 0
    """Of each answer, whatever the model says; 0: until its end."""

    @property
    def gen_config(self) -> dict[str, Any]:
        return {"max_new_tokens": self.tokens, "ignore_eos": True} if self.tokens else {}


WORKLOADS: Final[Mapping[str, Workload]] = {
    "distinct pictures": Workload(1, "Every job has a picture of its own."),
    "8 questions a picture": Workload(
        QUESTIONS, f"{QUESTIONS} jobs ask different questions on each picture, one after the other."
    ),
    "answers of 64 tokens": Workload(
        1, "Every job has a picture of its own, and its answer goes on for 64 tokens.", tokens=64
    ),
    "8 answers of 64 tokens": Workload(
        QUESTIONS,
        f"{QUESTIONS} questions on each picture, with answers that go on for 64 tokens.",
        tokens=64,
    ),
}


def draw(workload: str, jobs: int, *, round_number: int) -> list[Item]:
    """The jobs of a round; rounds and workloads share no picture."""
    questions = WORKLOADS[workload].questions
    place = list(WORKLOADS).index(workload)
    first = (round_number * len(WORKLOADS) + place) * SEEDS_A_ROUND
    return list(islice(_items(first, questions), jobs))


def _items(first_seed: int, questions: int) -> Iterator[Item]:
    for seed in count(first_seed):
        drawn = sample(seed, "shapes", questions=questions)
        if len(drawn.talks) < questions:
            continue  # there is too little to see
        buffer = io.BytesIO()
        drawn.images[0].save(buffer, "PNG")
        for number, talk in enumerate(drawn.talks):
            name = f"{seed}-{number}"
            yield Item(name, talk[0].question, f"s3://bench/{seed}.png", buffer.getvalue())
