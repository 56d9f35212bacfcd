"""Measures an exported model on pictures and phrasings it was never trained on, skill by skill.

    python -m tools.train_small_model.evaluate worker/small_model --pictures 1500

An answer counts as right if greedy decoding gives exactly its tokens and then stops.  That is read
from one pass over packed conversations (each token is the likeliest after the right ones before
it), which gives the very same verdict as generating; ``--generate 50`` checks 50 of each kind
through the exported processor and ``model.generate``.  "Guess" is the share of the commonest
answer: what one gets without looking.  Two columns: the held-out phrasing, and the phrasings of
training; the pictures are held out in both.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
)

from .packing import Batch, Group, Packer, Shape, attention_mask
from .sampling import MOST, sample

FIRST_SEED = 3_000_000
KINDS = {"shapes": 6, "large": 1, "word": 1, "number": 1, "icons": 1, "bars": 2, "pair": 2}
LARGE = "any, large shapes"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--most", type=int, default=MOST, help="shapes in a picture at the most")
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
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


def kinds() -> Iterator[str]:
    """Kinds of pictures in their proportions, for ever."""
    while True:
        for kind, times in KINDS.items():
            yield from [kind] * times


def answers(
    model: InternVLForConditionalGeneration, batch: Batch
) -> Iterator[tuple[int, list[int], list[int]]]:
    """For each answer of a batch: its skill's number, the true tokens, the tokens given."""
    used = int(batch["n_images"])
    ids = batch["ids"]
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(ids)
        pixel_values = batch["images"][:used].to(embeds.dtype) / 127.5 - 1
        seen = model.model.get_image_features(pixel_values, return_dict=True).pooler_output
        embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask(batch, embeds.dtype),
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        learnt = batch["labels"] >= 0
        given = torch.full_like(ids, -1)
        given[learnt] = model.lm_head(hidden[learnt]).argmax(-1)
    for row in range(ids.shape[0]):
        at = 0
        places = torch.nonzero(learnt[row]).flatten().tolist()
        while at < len(places):
            end = at + 1
            while end < len(places) and places[end] == places[end - 1] + 1:
                end += 1
            part = slice(places[at], places[end - 1] + 1)
            yield (
                int(batch["skills"][row, part][0]),
                batch["labels"][row, part].tolist(),
                given[row, part].tolist(),
            )
            at = end


def measure(
    model: InternVLForConditionalGeneration,
    packer: Packer,
    pictures: int,
    most: int,
    usual_phrasing: bool,
) -> dict[str, Score]:
    """Scores by skill over so many held-out samples."""
    scores: dict[str, Score] = defaultdict(Score)
    names = packer.skills

    def groups() -> Iterator[Group]:
        for seed, kind in zip(range(FIRST_SEED, FIRST_SEED + pictures), kinds(), strict=False):
            drawn = sample(
                seed,
                kind,
                held_out=True,
                usual_phrasing=usual_phrasing,
                most=most,
                questions=12,
            )
            if kind == "large":
                drawn.talks = [tuple(replace(t, skill=LARGE) for t in u) for u in drawn.talks]
            yield packer.group(drawn, None)

    waiting = list(groups())
    while waiting:
        batch = packer.fill(waiting)
        done = max(1, int(sum(_groups_in(batch))))
        waiting = waiting[done:]
        by_number = {number: name for name, number in names.items()}
        for number, true, given in answers(model, batch):
            score = scores[by_number[number]]
            score.asked += 1
            score.right += true == given
            text = packer.tokenizer.decode(true)
            score.truths[text] += 1
            said = packer.tokenizer.decode(given[:-1]) if given[-1] == true[-1] else ""
            if text.isdigit() and said.isdigit():
                score.near += abs(int(text) - int(said)) <= 1
    return dict(scores)


def _groups_in(batch: Batch) -> list[int]:
    return [int(row.max()) for row in batch["groups"]]


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
            content = [{"type": "image", "image": image} for image in drawn.images]
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
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    packer = Packer(str(args.model / "tokenizer.json"), Shape(rows=32, images=40), {})
    new = measure(model, packer, args.pictures, args.most, usual_phrasing=False)
    usual = measure(model, packer, args.pictures, args.most, usual_phrasing=True)
    print("| skill | held-out phrasing | trained phrasings | within 1 | guess | n |")
    print("| --- | --- | --- | --- | --- | --- |")
    figures: dict[str, dict[str, float]] = {}
    for skill in sorted(new):
        a, b = new[skill], usual.get(skill, Score(0, 1))
        numeric = all(text.isdigit() for text in a.truths) and skill != "read number"
        near = f"{100 * a.near / a.asked:.0f} %" if numeric else ""
        row = (100 * a.right / a.asked, 100 * b.right / b.asked, 100 * a.guess)
        print(
            f"| {skill} | {row[0]:.0f} % | {row[1]:.0f} % | {near} | {row[2]:.0f} % | {a.asked} |"
        )
        figures[skill] = {"held_out": row[0], "usual": row[1], "guess": row[2], "n": a.asked}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.generate:
        right, asked, seconds = check_by_generating(args.model, args.generate)
        print(f"by generate: {right} of {asked} right, {seconds:.2f} s a question")


if __name__ == "__main__":
    main()
