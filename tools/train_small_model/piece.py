"""One piece of training on a machine that is lent for minutes: train, export, measure.

    python -m tools.train_small_model.piece --work /tmp/work --out OUT --fonts FONTS \
        --minutes 8.5 --decay-minutes 2 --images 640 --workers 14

``--minutes`` counts from the start of the process and ends training; what comes after needs less
than a minute.  Every ``--save-minutes`` the weights are put into ``OUT/weights`` (``parts.py``), so
that little is lost if the process is killed.  The next piece takes them with ``--init-from``, on
any machine; momenta are not carried.  ``OUT`` further holds ``train.log`` and ``eval.json``.
"""

import argparse
import json
import os
import time
from pathlib import Path

BEGAN = time.monotonic()
EVALUATION_SECONDS = 40.0


def arguments() -> argparse.Namespace:
    """The command line."""
    from .train import add_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, help="folder of DejaVu and Font Awesome")
    parser.add_argument("--pictures", type=int, default=6000, help="to measure with")
    return parser.parse_args()


def main() -> None:
    """Train, export, measure."""
    # Imported here, so that the clock starts before torch is read.
    args = arguments()
    if args.fonts:
        os.environ["SMALL_MODEL_FONTS"] = str(args.fonts.resolve())
    import torch

    from . import evaluate, export, parts, train, world

    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "train.log").open("a")

    def tell(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    if world.icon_font() is None or len(world.faces()) < 3:
        raise SystemExit("the fonts are not all here: see --fonts")
    tell(f"torch {torch.__version__}, CUDA: {torch.cuda.is_available()}, {args}")
    start = args.work / "start"
    if args.init_from and (args.init_from / parts.REST).exists():
        parts.join(args.init_from, start)
    elif args.init_from:
        start = args.init_from
    else:
        train.start_model(start, args.seed)
    exported = args.work / "exported"

    def on_save(trainer: train.Trainer) -> None:
        export.write_folder(trainer.weights(), start, exported)
        torch.save(trainer.heads.state_dict(), exported / train.HEADS_FILE)
        parts.cut(exported, args.out / "weights")

    trainer = train.Trainer(args, start, BEGAN, tell)
    trainer.run(on_save)
    tell(f"trained and exported after {time.monotonic() - BEGAN:.0f} s")
    del trainer
    torch.cuda.empty_cache()
    lines, figures = evaluate.table(
        exported, args.pictures, workers=args.workers, seconds=EVALUATION_SECONDS
    )
    for line in lines:
        tell(line)
    (args.out / "eval.json").write_text(json.dumps(figures, indent=1) + "\n")
    tell(f"measured after {time.monotonic() - BEGAN:.0f} s")


if __name__ == "__main__":
    main()
