"""Writes a training checkpoint as a folder that transformers loads, and the demo pictures.

    python -m tools.train_small_model.export --work /tmp/small_model --to worker/small_model
    python -m tools.train_small_model.export --to worker/small_model --samples

``train.py --init-from worker/small_model`` is the way back.  Files are replaced one by one, each
in one piece, so that a reader never meets half a file.
"""

import argparse
import json
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from .sampling import sample
from .talk import Sample, Talk, Turn

SAMPLE_SKILLS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("shapes", ("count", "follow count"), 9),
    ("shapes", ("describe",), 3),
    ("shapes", ("count shape",), 7),
    ("shapes", ("count colour",), 6),
    ("shapes", ("shape", "follow where"), 4),
    ("shapes", ("at",), 5),
    ("shapes", ("relation",), 3),
    ("shapes", ("beside",), 2),
    ("shapes", ("largest",), 6),
    ("shapes", ("exists",), 5),
    ("shapes", ("more",), 9),
    ("shapes", ("absent",), 4),
    ("large", ("describe",), 3),
    ("word", ("read word",), 4),
    ("word", ("read word",), 6),
    ("word", ("text colour",), 5),
    ("number", ("read number",), 6),
    ("icons", ("icon",), 1),
    ("icons", ("describe",), 3),
    ("icons", ("icon colour",), 4),
    ("bars", ("bar tallest",), 4),
    ("bars", ("bar value",), 6),
    ("bars", ("bar taller",), 5),
    ("shapes", ("unknown",), 1),
    ("noise", ("nothing",), 0),
)
"""Kind of picture, skill of each turn, and the number of things (shapes, letters, bars) in each
demo picture.  The pictures are the first of their seeds that fit, whatever the model says to them.
"""

FIRST_SAMPLE_SEED = 7_000_000
SEEDS_A_SAMPLE = 1000
QUESTION_CHARACTERS = 40
"""So that the demo's table is not too wide."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, help="where train.py keeps last.pt and start/")
    parser.add_argument("--init-from", type=Path, help="as train.py had it, in place of work/start")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the exported model")
    parser.add_argument("--samples", action="store_true", help="draw the demo pictures as well")
    return parser.parse_args()


def export_model(work: Path, start: Path, to: Path) -> None:
    """The newest weights of a checkpoint."""
    weights = torch.load(work / "last.pt", map_location="cpu", weights_only=True)["weights"]
    write_folder(weights, start, to)


def write_folder(weights: dict[str, torch.Tensor], start: Path, to: Path) -> None:
    """Weights in bfloat16, with configuration, tokenizer and processor from ``start``."""
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    assert not missing.unexpected_keys, missing
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as folder:
        for file in sorted(start.glob("*.j*")):
            shutil.copy(file, folder)
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            file.chmod(0o644)
            os.replace(file, to / file.name)


def _find(number: int, kind: str, skills: tuple[str, ...], things: int) -> tuple[Sample, Talk]:
    """The first held-out sample of this kind that fits."""
    for seed in count(FIRST_SAMPLE_SEED + number * SEEDS_A_SAMPLE):
        drawn = sample(seed, kind, held_out=True, usual_phrasing=True, questions=30)
        picture = drawn.pictures[0]
        if max(len(picture.things), len(picture.bars)) != things:
            continue
        for talk in drawn.talks:
            short = all(len(turn.question) <= QUESTION_CHARACTERS for turn in talk)
            if short and tuple(turn.skill for turn in talk) == skills:
                return drawn, talk
    raise AssertionError("there is no end of seeds")


def export_samples(to: Path) -> None:
    """Draw the demo pictures with their questions and true answers."""
    folder = to / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    entries: list[dict[str, object]] = []
    for number, (kind, skills, things) in enumerate(SAMPLE_SKILLS, 1):
        drawn, (first, *then) = _find(number, kind, skills, things)
        file = f"{number:02d}-{kind}.png"
        drawn.images[0].quantize(64).save(folder / file, optimize=True)
        entry: dict[str, object] = {"file": file, **_entry(first)}
        if then:
            entry["follow_up"] = _entry(then[0])
        entries.append(entry)
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n")


def _entry(turn: Turn) -> dict[str, str]:
    return {"question": turn.question, "answer": turn.answer, "skill": turn.skill}


def main() -> None:
    """Export what was asked for."""
    args = arguments()
    if args.work:
        export_model(args.work, args.init_from or args.work / "start", args.to)
    if args.samples:
        export_samples(args.to)


if __name__ == "__main__":
    main()
