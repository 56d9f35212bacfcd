"""Measures an exported model on pictures and phrasings it was never trained on, skill by skill.

    python -m tools.train_small_model.evaluate worker/small_model --pictures 1500

An answer counts as right if greedy decoding gives exactly its tokens and then stops.  That is read
from one pass over packed conversations (each token is the likeliest after the right ones before
it), which gives the very same verdict as generating; ``--generate 50`` checks 50 of each kind
through the exported processor and ``model.generate``.  "Guess" is the share of the commonest
answer: what one gets without looking.  Two columns: the held-out phrasing, and the phrasings of
training; the pictures are held out in both.  Runs on CUDA if there is one.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
)

from .forward import hidden_states, look
from .packing import LARGE, SKILLS, Batch, Group, Packer, Shape
from .sampling import MOST, sample

FIRST_SEED = 3_000_000
KINDS = {
    "shapes": 6,
    "large": 1,
    "word": 2,
    "number": 1,
    "icons": 2,
    "bars": 2,
    "pair": 3,
    "later": 1,
    "noise": 1,
    "none": 1,
}
QUESTIONS = 12


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--most", type=int, default=MOST, help="shapes in a picture at the most")
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


@dataclass
class Score:
    """Right answers, all answers, and how common each true answer is."""

    right: int = 0
    asked: int = 0
    near: int = 0
    truths: Counter[str] = field(default_factory=Counter)

    @property
    def guess(self) -> float:
        """What always giving the commonest answer would get."""
        return max(self.truths.values()) / self.asked


class HeldOut(IterableDataset[Batch]):
    """Packed batches of held-out samples, shared out among the loader's processes."""

    def __init__(self, packer: Packer, pictures: int, most: int, usual_phrasing: bool) -> None:
        self.packer = packer
        self.pictures = pictures
        self.most = most
        self.usual_phrasing = usual_phrasing

    def _group(self, seed: int, kind: str) -> Group:
        drawn = sample(
            seed,
            kind,
            held_out=True,
            usual_phrasing=self.usual_phrasing,
            most=self.most,
            questions=QUESTIONS,
        )
        if kind == "large":
            drawn.talks = [tuple(replace(t, skill=LARGE) for t in u) for u in drawn.talks]
        return self.packer.group(drawn, None)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        nth, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        kinds = cycle([kind for kind, times in KINDS.items() for _ in range(times)])
        every = enumerate(islice(kinds, self.pictures))
        mine = [(FIRST_SEED + i, kind) for i, kind in every if i % workers == nth]
        waiting: list[Group] = []
        while mine or waiting:
            while mine and len(waiting) < self.packer.shape.images:
                waiting.append(self._group(*mine.pop()))
            batch = self.packer.fill(waiting)
            del waiting[: max(1, int(batch["n_groups"]))]
            yield batch


def answers(
    model: InternVLForConditionalGeneration, batch: Batch
) -> Iterator[tuple[str, list[int], list[int]]]:
    """For each answer of a batch: its skill, the true tokens, the tokens given."""
    moved = {k: v.to(model.device) for k, v in batch.items()}
    with torch.inference_mode():
        hidden = hidden_states(model, moved, look(model, moved["images"]))
        given = model.lm_head(hidden).argmax(-1).tolist()
    wanted, turn, skills = (batch[k].tolist() for k in ("wanted", "turn", "turn_skill"))
    found: list[tuple[str, list[int], list[int]]] = [
        (SKILLS[skill], [], []) for skill in skills[: int(batch["n_turns"])]
    ]
    for number, true, said in zip(turn, wanted, given, strict=True):
        if true >= 0:
            found[number][1].append(true)
            found[number][2].append(said)
    yield from found


def measure(
    model: InternVLForConditionalGeneration, held_out: HeldOut, workers: int, until: float
) -> dict[str, Score]:
    """Scores by skill; stops early at the time ``until``."""
    scores: dict[str, Score] = defaultdict(Score)
    tokenizer = held_out.packer.tokenizer
    for batch in DataLoader(held_out, batch_size=None, num_workers=workers):
        for skill, true, given in answers(model, batch):
            score = scores[skill]
            score.asked += 1
            score.right += true == given
            text = tokenizer.decode(true)
            score.truths[text] += 1
            said = tokenizer.decode(given[:-1]) if given[-1] == true[-1] else ""
            if text.isdigit() and said.isdigit():
                score.near += abs(int(text) - int(said)) <= 1
        if time.monotonic() > until:
            break
    return dict(scores)


def table(
    folder: Path, pictures: int, most: int = MOST, workers: int = 0, seconds: float = 1e9
) -> tuple[list[str], dict[str, dict[str, float]]]:
    """The lines of the table, and its figures, of an exported model."""
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16 if cuda else torch.float32
    ).eval()
    if cuda:
        model = model.to("cuda")
    shape = Shape(rows=40, images=130) if cuda else Shape(rows=8, images=28)
    packer = Packer(str(folder / "tokenizer.json"), shape)
    new, usual = (
        measure(
            model, HeldOut(packer, pictures, most, usual_phrasing), workers, began + part * seconds
        )
        for usual_phrasing, part in ((False, 0.5), (True, 1.0))
    )
    lines = [
        "| skill | held-out phrasing | trained phrasings | within 1 | guess | n |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    figures: dict[str, dict[str, float]] = {}
    for skill in sorted(new):
        a, b = new[skill], usual.get(skill, Score(0, 1))
        numeric = all(text.isdigit() for text in a.truths) and skill != "read number"
        near = f"{100 * a.near / a.asked:.0f} %" if numeric else ""
        row = (100 * a.right / a.asked, 100 * b.right / b.asked, 100 * a.guess)
        lines.append(
            f"| {skill} | {row[0]:.1f} % | {row[1]:.1f} % | {near} | {row[2]:.0f} % | {a.asked} |"
        )
        figures[skill] = {"held_out": row[0], "usual": row[1], "guess": row[2], "n": a.asked}
    return lines, figures


def check_by_generating(folder: Path, each: int) -> tuple[int, int, float]:
    """Right answers, questions and seconds a question, through processor and generate alone."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    right = asked = 0
    began = time.monotonic()
    for kind in KINDS:
        for seed in range(FIRST_SEED, FIRST_SEED + each):
            drawn = sample(seed, kind, held_out=True, questions=1)
            if not drawn.talks:
                continue
            turn = drawn.talks[0][0]
            images = drawn.images[: len(drawn.images) - sum(t.brings for t in drawn.talks[0])]
            content = [{"type": "image", "image": image} for image in images]
            content.append({"type": "text", "text": turn.question})
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            right += processor.decode(out, skip_special_tokens=True) == turn.answer
            asked += 1
    return right, asked, (time.monotonic() - began) / asked


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    lines, figures = table(args.model, args.pictures, args.most, args.workers)
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.generate:
        right, asked, seconds = check_by_generating(args.model, args.generate)
        print(f"by generate: {right} of {asked} right, {seconds:.2f} s a question")


if __name__ == "__main__":
    main()
