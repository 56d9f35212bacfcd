"""Trains the small model, on CUDA if there is one, else on the CPU; can stop and go on any time.

    python -m tools.train_small_model.train --work /tmp/small_model --minutes 60 --decay-minutes 12

The first ``--eyes-steps`` steps train the vision tower alone, on what ``dense.py`` says stands
where; then come questions and answers, with a little of that beside.  The rate warms up, stays,
and falls to nothing over the last ``--decay-minutes`` of this piece; without them a piece ends at
full rate and the next goes on from ``last.pt``.  Matrices of the hidden layers are stepped by
Muon, everything else by AdamW; masters are float32, the model itself is bfloat16.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import InternVLForConditionalGeneration

from .build import build_config, build_model, build_tokenizer, generation_config, save_processor
from .dense import HEADS, DenseHeads
from .optimiser import Masters
from .packing import Batch, Batches, Packer, Shape, attention_mask
from .sampling import MOST, sample

DTYPE = torch.bfloat16
WARMUP_STEPS = 60


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, log, start")
    parser.add_argument("--init-from", type=Path, help="begin with an exported model's weights")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--decay-minutes", type=float, default=0)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--eyes-steps", type=int, default=500, help="steps before questions begin")
    parser.add_argument("--dense-weight", type=float, default=0.3, help="of the heads, after that")
    parser.add_argument("--rate", type=float, default=0.015, help="Muon's rate")
    parser.add_argument("--adam-rate", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=Shape.rows)
    parser.add_argument("--images", type=int, default=Shape.images)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


@dataclass
class Outcome:
    """What one batch gave: the loss to descend, and what to tell of it.

    ``each`` is [3, answer tokens]: skill's number, loss, one where the token was the likeliest.
    """

    loss: torch.Tensor
    each: torch.Tensor
    right: list[float]


def outcome_of(
    model: InternVLForConditionalGeneration, heads: DenseHeads, batch: Batch, dense_weight: float
) -> Outcome:
    """Mean loss over the answers' tokens, and ``dense_weight`` times that of the dense heads."""
    used = int(batch["n_images"])
    ids = batch["ids"]
    table = model.get_input_embeddings()
    pixel_values = batch["images"].to(DTYPE) / 127.5 - 1
    seen = model.model.get_image_features(pixel_values, return_dict=True).pooler_output[:used]
    dense, right = heads(seen, table.weight, batch["cells"][:used])
    learnt = batch["labels"] >= 0
    if not learnt.any():
        return Outcome(dense, torch.zeros(3, 0), right)
    embeds = table(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask(batch, DTYPE),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[learnt]).float()
    wanted = batch["labels"][learnt]
    each = cross_entropy(logits, wanted, reduction="none")
    hits = (logits.detach().argmax(-1) == wanted).float()
    told = torch.stack((batch["skills"][learnt].float(), each.detach(), hits))
    return Outcome(each.mean() + dense_weight * dense, told, right)


def start_model(args: argparse.Namespace) -> InternVLForConditionalGeneration:
    """The exported model to go on from, or a new one; its processor lies in ``work/start``."""
    start = args.work / "start"
    if args.init_from:
        start = args.init_from
    elif not (start / "config.json").exists():
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        fresh = build_model(build_config(tokenizer))
        fresh.generation_config = generation_config(tokenizer)
        fresh.save_pretrained(start)
        save_processor(tokenizer, start)
    # On a CPU the backward pass of torch's fused attention is slower than plain products.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    return InternVLForConditionalGeneration.from_pretrained(
        start, dtype=torch.float32, attn_implementation=attention
    )


def read_weights(path: Path) -> Mapping[str, float] | None:
    """How often to draw each kind and the ``most`` shapes to draw.

    The file may be changed while training runs: easy pictures first, then what is still weak.
    """
    try:
        found: dict[str, float] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def main() -> None:
    """Train for the minutes asked."""
    args = arguments()
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)
    model = start_model(args).to(device)
    masters = Masters(model, args.rate, args.adam_rate)
    model.to(DTYPE).train()
    masters.attach(model)
    tokenizer_file = str((args.init_from or args.work / "start") / "tokenizer.json")
    heads = DenseHeads(Tokenizer.from_file(tokenizer_file), model.config.text_config.hidden_size)
    heads.to(device)
    heads_adam = torch.optim.AdamW(heads.parameters(), lr=0.003, weight_decay=0.0)
    last = args.work / "last.pt"
    steps, pictures, skills = 0, 0, dict[str, int]()
    if last.exists():
        state = torch.load(last, map_location=device, weights_only=True)
        steps, pictures, skills = state["steps"], state["pictures"], state["skills"]
        masters.load(state)
        heads.load_state_dict(state["heads"])
    if not args.no_compile:
        for layer in (*model.model.vision_tower.encoder.layer, *model.model.language_model.layers):
            layer.compile()
    for skill in _all_skills():
        skills.setdefault(skill, len(skills))
    packer = Packer(tokenizer_file, Shape(rows=args.rows, images=args.images), skills)
    steer = args.work / "weights.json"
    batches = Batches(
        packer,
        args.seed,
        steps,
        args.eyes_steps,
        most=lambda n: int((read_weights(steer) or {}).get("most", MOST)),
        weights=lambda: read_weights(steer),
    )
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=3)
    names = {number: name for name, number in skills.items()}
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    sights: list[list[float]] = []
    saved = told = time.monotonic()
    end = began + 60 * args.minutes

    def save() -> None:
        state = {"steps": steps, "pictures": pictures, "skills": skills, **masters.state()}
        state["heads"] = heads.state_dict()
        torch.save(state, last.with_suffix(".new"))
        last.with_suffix(".new").replace(last)

    for batch in loader:
        now = time.monotonic()
        if now >= end:
            break
        left = (end - now) / (60 * args.decay_minutes) if args.decay_minutes else 1.0
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        got = outcome_of(model, heads, moved, args.dense_weight)
        got.loss.backward()  # type: ignore[no-untyped-call]
        masters.step(min(1.0, left, (steps + 1) / WARMUP_STEPS))
        heads_adam.step()
        heads_adam.zero_grad()
        steps += 1
        pictures += int(batch["n_images"])
        sights.append(got.right)
        for number, value, hit in got.each.T.tolist():
            total = sums[names.get(int(number), "?")]
            total[0] += value
            total[1] += hit
            total[2] += 1
        if time.monotonic() - told > 20:
            told = time.monotonic()
            mean = sum(s for s, _, _ in sums.values()) / max(1, sum(n for _, _, n in sums.values()))
            minute = (told - began) / 60
            print(f"{minute:6.1f} min step {steps} pictures {pictures} loss {mean:.3f}", flush=True)
            seen = {
                head: round(100 * sum(values) / len(values))
                for head, *column in zip(HEADS, *sights, strict=True)
                if (values := [v for v in column if v == v])
            }
            tokens = {k: round(100 * hit / n) for k, (_, hit, n) in sorted(sums.items())}
            print(
                "       % right: eyes", json.dumps(seen), "tokens", json.dumps(tokens), flush=True
            )
            sums.clear()
            sights.clear()
        if time.monotonic() - saved > 60 * args.save_minutes:
            save()
            saved = time.monotonic()
    save()


def _all_skills() -> list[str]:
    """Every skill's name, in a fixed order, so that all drawing processes number them alike."""
    found: set[str] = set()
    for seed in random.Random(0).sample(range(10**6), 600):
        found |= {turn.skill for talk in sample(seed).talks for turn in talk}
    return sorted(found)


if __name__ == "__main__":
    main()
