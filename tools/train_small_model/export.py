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
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from .sampling import sample
from .talk import Sample, Talk

SAMPLE_SKILLS: tuple[tuple[str, str, int], ...] = (
    ("shapes", "follow count", 2),
    ("shapes", "count shape", 1),
    ("shapes", "shape", 1),
    ("shapes", "follow where", 2),
    ("shapes", "exists", 1),
    ("shapes", "relation", 1),
    ("shapes", "largest", 1),
    ("shapes", "describe", 2),
    ("large", "describe", 1),
    ("word", "read word", 4),
    ("number", "read number", 2),
    ("icons", "icon", 2),
    ("icons", "icon colour", 1),
    ("icons", "describe", 1),
    ("bars", "bar tallest", 1),
    ("bars", "bar value", 1),
    ("bars", "bar taller", 1),
    ("shapes", "absent", 1),
    ("shapes", "unknown", 1),
    ("noise", "nothing", 1),
)
"""Kind of picture, skill and number of demo pictures.  The pictures are the first of their seeds,
whatever the model says to them."""

FIRST_SAMPLE_SEED = 7_000_000


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


def _find(kind: str, skill: str, nth: int) -> tuple[Sample, Talk]:
    """The ``nth`` held-out sample of this kind that asks for this skill."""
    seed = FIRST_SAMPLE_SEED
    while True:
        drawn = sample(seed, kind, held_out=True, usual_phrasing=True, questions=30, most=6)
        turns = 2 if skill.startswith("follow") else 1
        talk = next(
            (t for t in drawn.talks if t[-1].skill == skill and len(t) == turns),
            None,
        )
        if talk is not None:
            if nth == 0:
                return drawn, talk
            nth -= 1
        seed += 1


def export_samples(to: Path) -> None:
    """Draw the demo pictures with their questions and true answers."""
    folder = to / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    entries: list[dict[str, object]] = []
    used: set[bytes] = set()
    for kind, skill, wanted in SAMPLE_SKILLS:
        found = nth = 0
        while found < wanted:
            drawn, talk = _find(kind, skill, nth)
            nth += 1
            picture = drawn.images[0]
            if picture.tobytes() in used:
                continue
            used.add(picture.tobytes())
            file = f"{len(used):02d}-{kind}.png"
            picture.quantize(64).save(folder / file, optimize=True)
            entry: dict[str, object] = {
                "file": file,
                "question": talk[0].question,
                "answer": talk[0].answer,
                "skill": talk[0].skill,
            }
            if len(talk) > 1:
                entry["follow_up"] = {
                    "question": talk[1].question,
                    "answer": talk[1].answer,
                    "skill": talk[1].skill,
                }
            entries.append(entry)
            found += 1
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n")


def main() -> None:
    """Export what was asked for."""
    args = arguments()
    if args.work:
        export_model(args.work, args.init_from or args.work / "start", args.to)
    if args.samples:
        export_samples(args.to)


if __name__ == "__main__":
    main()
