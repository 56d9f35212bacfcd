"""What one worker process carries: ``python -m bench.worker_rate [--against OTHER_CHECKOUT]``.

A whole embedded stack whose worker has an engine that only plays (`bench.played_worker`): 256
sequences, 80 steps a second, 128 tokens a job with token stream, one 448x448 JPEG a job; as on a
GPU, but for the model. With ``--against``, rounds of this tree and of the other one alternate.

Jobs a second are bounded by the cores of the machine; what counts is the processor time that a job
costs in the worker's process, since all its threads share one interpreter lock.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PICTURES = 64


def main() -> None:
    args = _arguments()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    trees = {"this tree": Path(__file__).parents[1]}
    if args.against is not None:
        trees = {"the other": args.against, **trees}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    print(f"{args.jobs} jobs, {args.rounds} rounds, load average {os.getloadavg()[0]:.1f}")
    for _ in range(args.rounds):
        for name, tree in trees.items():
            rounds[name].append(_measured_in(tree, args))
    names = list(rounds["this tree"][0])
    print("\n| tree |", " | ".join(names), "|\n| --- |", " | ".join("---" for _ in names), "|")
    for name, results in rounds.items():
        cells = []
        for column in names:
            values = [result[column] for result in results]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})")
        print(f"| {name} |", " | ".join(cells), "|")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Jobs a second, and milliseconds of processor time a job by process."""
    from bench.worker import Server
    from bench.worker_jobs import Item
    from visq import Client
    from visq.embedded import stack
    from visq.embedded.service import Service
    from visq.settings import Settings

    class Played(Service):
        """The worker of `bench.played_worker` in place of the real one."""

        def __init__(self, name: str, command: Any, **how: Any) -> None:
            if command[-1] == "worker":
                command = [sys.executable, "-P", "-m", "bench.played_worker"]
            super().__init__(name, command, **how)

    stack.Service = Played  # type: ignore[misc]
    pictures = [_picture(number) for number in range(PICTURES)]

    def items(count: int) -> list[Item]:
        return [
            Item(str(n), "what is this?", f"s3://bench/{n % PICTURES}.jpg", pictures[n % PICTURES])
            for n in range(count)
        ]

    with tempfile.TemporaryDirectory(prefix="visq-bench-") as folder:
        settings = Settings.model_validate({"data": Path(folder), "port": 0, "engine": "native"})
        with stack.Stack(settings) as running, Client(running.url, running.api_key) as client:
            server = Server("played", running, client, max_new_tokens=args.tokens)
            server.run(items(args.jobs // 4))
            if args.profile:
                worker = str(server.parts()["worker"].pid)
                output = ["-o", args.profile, "-f", "raw", "-d", "15", "-r", "150"]
                subprocess.Popen(
                    ["py-spy", "record", "--gil", "--nonblocking", "-p", worker, *output]
                )
            result = server.run(items(args.jobs))
    return {"jobs/s": result.rate, **result.cpu_ms}


def _picture(seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((448, 448)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _measured_in(tree: Path, args: argparse.Namespace) -> dict[str, float]:
    """In a process of its own, which imports from `tree` (-P: and not from this folder)."""
    command = [sys.executable, "-P", __file__, "--measure"]
    command += ["--jobs", str(args.jobs), "--tokens", str(args.tokens)]
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=600, help="of one round")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout of visq, to compare with")
    parser.add_argument("--profile", help="file for a profile by py-spy (with --measure)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
