"""Trains the small model, on CUDA if there is one, else on the CPU; can stop and go on any time.

    python -m tools.train_small_model.train --work /tmp/small_model --minutes 60 --decay-minutes 12

First the vision tower learns alone, for ``--eyes-minutes``, what ``dense.py`` says stands where;
then come questions and answers, with a little of that beside.  The rate warms up, stays, and falls
to nothing over the last ``--decay-minutes`` of this piece; without them a piece ends at full rate
and the next goes on from ``last.pt``.  What is asked most is what is still wrong most: see
``steering.py``.  Matrices of the hidden layers are stepped by Muon, everything else by AdamW;
masters are float32, the model itself is bfloat16.

On a GPU nothing waits for the device in a step: figures are added up there and read now and then.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import InternVLForConditionalGeneration

from .build import (
    IMAGE_SIZE,
    build_config,
    build_model,
    build_tokenizer,
    generation_config,
    save_processor,
)
from .dense import HEADS, DenseHeads
from .forward import outcome_of
from .optimiser import Masters
from .packing import SKILLS, Batch, Batches, Packer, Shape
from .steering import Course

DTYPE = torch.bfloat16
WARMUP_STEPS = 80
PREFETCH = 2
"""Batches that each drawing process keeps ready."""

HEADS_FILE = "heads.pt"
"""Of ``dense.py``, beside exported weights that training shall go on from."""

Tell = Callable[[str], None]
Weights = dict[str, torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``piece.py`` takes as well."""
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, steering, start")
    parser.add_argument("--init-from", type=Path, help="begin with an exported model's weights")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--decay-minutes", type=float, default=0)
    parser.add_argument("--save-minutes", type=float, default=2)
    parser.add_argument("--eyes-minutes", type=float, default=1, help="before questions begin")
    parser.add_argument("--rise-minutes", type=float, default=3, help="until nine shapes are drawn")
    parser.add_argument("--dense-weight", type=float, default=0.3, help="of the heads, after that")
    parser.add_argument("--rate", type=float, default=0.01, help="Muon's rate")
    parser.add_argument("--adam-rate", type=float, default=0.0015)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--images", type=int, default=Shape.images, help="pictures a step")
    parser.add_argument("--rows", type=int, help="of 512 tokens a step; a quarter of the pictures")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tell-seconds", type=float, default=15)
    parser.add_argument("--no-compile", action="store_true")


def start_model(folder: Path, seed: int) -> None:
    """Write a new model with its processor, if none is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    fresh = build_model(build_config(tokenizer))
    fresh.generation_config = generation_config(tokenizer)
    fresh.save_pretrained(folder)
    save_processor(tokenizer, folder)


def load_model(folder: Path) -> InternVLForConditionalGeneration:
    """The model of a folder as float32."""
    # On a CPU the backward pass of torch's fused attention is slower than plain products.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    return InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )


class Trainer:
    """The state of training; ``run`` trains until the time is over."""

    def __init__(self, args: argparse.Namespace, start: Path, began: float, tell: Tell) -> None:
        self.args = args
        self.began = began
        self.tell = tell
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(args.seed)
        model = load_model(start).to(self.device)
        self.masters = Masters(model, args.rate, args.adam_rate)
        self.model = model.to(DTYPE).train()
        self.masters.attach(model)
        tokenizer_file = str(start / "tokenizer.json")
        tokenizer = Tokenizer.from_file(tokenizer_file)
        self.heads = DenseHeads(tokenizer, model.config.text_config.hidden_size).to(self.device)
        if (start / HEADS_FILE).exists():
            self.heads.load_state_dict(
                torch.load(start / HEADS_FILE, map_location="cpu", weights_only=True)
            )
        self.heads_adam = torch.optim.AdamW(self.heads.parameters(), lr=0.003, weight_decay=0.0)
        self.last = args.work / "last.pt"
        self.steps = self.pictures = self.asking_since = 0
        if self.last.exists():
            self._go_on(torch.load(self.last, map_location=self.device, weights_only=True))
        if not args.no_compile:
            vision, text = model.model.vision_tower, model.model.language_model
            for layer in (*vision.encoder.layer, *text.layers):
                # Both kinds of layer share a frame: without this it would be made for any shape.
                layer.compile(dynamic=False)
        shape = Shape(rows=args.rows or -(-args.images // 4), images=args.images)
        self.packer = Packer(tokenizer_file, shape)
        fresh = not args.init_from and not self.asking_since
        self.course = Course(args.work / "steering.json", fresh, args.rise_minutes)

    def _go_on(self, state: dict) -> None:
        self.steps, self.pictures = state["steps"], state["pictures"]
        self.asking_since = state["asking_since"]
        self.masters.load(state)
        self.heads.load_state_dict(state["heads"])

    def save(self) -> None:
        """Write a checkpoint, in one piece."""
        state = {"steps": self.steps, "pictures": self.pictures, **self.masters.state()}
        state |= {"asking_since": self.asking_since, "heads": self.heads.state_dict()}
        torch.save(state, self.last.with_suffix(".new"))
        self.last.with_suffix(".new").replace(self.last)

    def weights(self) -> Weights:
        """The weights as they are now, in bfloat16, on the CPU."""
        return {k: v.to("cpu", DTYPE) for k, v in self.masters.weights().items()}

    def _factor(self, now: float) -> float:
        """The part of the full rates for the next step."""
        left = self.began + 60 * self.args.minutes - now
        decay = left / (60 * self.args.decay_minutes) if self.args.decay_minutes else 1.0
        since = self.steps - (self.asking_since or 0)
        return max(0.0, min(1.0, decay, (since + 1) / WARMUP_STEPS))

    def step(self, batch: Batch, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; figures by skill and by head."""
        eyes_only = int(batch["n_turns"]) == 0
        if not eyes_only and not self.asking_since:
            self.asking_since = max(1, self.steps)
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        got = outcome_of(self.model, self.heads, moved, self.args.dense_weight, eyes_only)
        got.loss.backward()  # type: ignore[no-untyped-call]
        self.masters.step(factor)
        self.heads_adam.step()
        self.heads_adam.zero_grad()
        self.steps += 1
        self.pictures += int(batch["n_images"])
        return got.skills, got.eyes

    def run(self, on_save: Callable[["Trainer"], None]) -> None:
        """Train for the minutes asked; ``on_save`` is called now and then and at the end."""
        args = self.args
        batches = Batches(self.packer, args.seed, self.steps, self.course.file)
        self.course.write(eyes=self.course.fresh and args.eyes_minutes > 0, asking_minutes=0.0)
        cuda = self.device.type == "cuda"
        workers = self._workers()
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=cuda,
        )
        end = self.began + 60 * args.minutes
        first = saved = told = time.monotonic()
        skills = torch.zeros(len(SKILLS) + 1, 3, device=self.device)
        eyes = torch.zeros(len(HEADS), 2, device=self.device)
        asking = first if not self.course.eyes else None
        for batch in loader:
            now = time.monotonic()
            if now >= end:
                break
            if self.steps == 0 and self.course.eyes:
                first = now
            more = self.step(batch, self._factor(now))
            skills += more[0]
            eyes += more[1]
            if self.course.eyes and now - first > 60 * args.eyes_minutes:
                asking = now
                self.course.write(eyes=False, asking_minutes=0.0)
            if now - told > args.tell_seconds:
                told = now
                self._report(skills, eyes)
                asking_minutes = (now - asking) / 60 if asking is not None else 0.0
                self.course.learn(skills.tolist(), asking_minutes)
                skills.zero_()
                eyes.zero_()
            if now - saved > 60 * args.save_minutes:
                saved = now
                self.save()
                on_save(self)
        self._report(skills, eyes)
        self.save()
        on_save(self)

    def _workers(self) -> int:
        """As many drawing processes as asked for, or as shared memory holds the batches of."""
        batch = self.packer.shape.images * 3 * IMAGE_SIZE**2
        shared = Path("/dev/shm")
        free = shutil.disk_usage(shared).free if shared.is_dir() else 0
        fit = int(0.8 * free / ((PREFETCH + 2) * batch))
        self.tell(f"shared memory {free / 2**30:.1f} GiB, room for {fit} drawing processes")
        return min(self.args.workers, max(1, fit)) if shared.is_dir() else self.args.workers

    def _report(self, skills: torch.Tensor, eyes: torch.Tensor) -> None:
        """Say how it stands; this waits for the device."""
        counts = skills[:-1].cpu()
        loss = float(counts[:, 2].sum() / counts[:, 0].sum().clamp(min=1))
        minute = (time.monotonic() - self.began) / 60
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.tell(
            f"{minute:6.2f} min step {self.steps} pictures {self.pictures} loss an answer "
            f"{loss:.3f} most {self.course.most} rate {self._factor(time.monotonic()):.2f} "
            f"GiB {memory:.1f}"
        )
        right = " ".join(
            f"{head} {100 * a / max(1.0, n):.0f}"
            for head, (a, n) in zip(HEADS, eyes.tolist(), strict=True)
        )
        asked = "  ".join(
            f"{name} {100 * a / n:.0f}"
            for name, (n, a, _) in zip(SKILLS, counts.tolist(), strict=True)
            if n
        )
        self.tell(f"       % right: eyes {right} | {asked}")


def main() -> None:
    """Train for the minutes asked."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add_arguments(parser)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.init_from:
        start_model(args.work / "start", args.seed)
    start = args.init_from or args.work / "start"
    Trainer(args, start, began, lambda line: print(line, flush=True)).run(lambda _: None)


if __name__ == "__main__":
    main()
