"""Jobs a second of the whole worker on a GPU: ``python -m bench.worker_gpu``.

A whole embedded stack (Valkey, SQLite, folder store, API, worker with its media and engine
processes) serves the random-weight model of `bench.engine`. A batch of jobs, each with a JPEG of
448 x 448 pixels of noise and 32 words, asks for 128 new tokens: the workload of `bench.engine`'s
pictures, but through the queue, with the pictures fetched and decoded, and every answer in SQL, in
Redis and in the result queue.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench import model
from bench.engine_load import LOADS
from bench.results_files import RESULTS, Table, conditions, described, write
from bench.worker import Server
from bench.worker_jobs import Item
from visq import Client
from visq.embedded.stack import Stack
from visq.settings import Settings

QUALITY = 90
"""Of the JPEGs, some 180 kB each."""


def items(count: int, round_number: int) -> list[Item]:
    """Jobs that share no picture with those of other rounds."""
    found = []
    for prompt in LOADS["3b"].image_prompts(count, round_number):
        buffer = io.BytesIO()
        prompt.images[0].save(buffer, "JPEG", quality=QUALITY)
        [seed] = prompt.seeds
        found.append(Item(str(seed), prompt.text, f"s3://bench/{seed}.jpg", buffer.getvalue()))
    return found


def main() -> None:
    args = _arguments()
    where = conditions()
    new = LOADS["3b"].image_new
    rounds = []
    with tempfile.TemporaryDirectory(prefix="visq-bench-") as folder:
        weights = args.folder or Path(folder) / "model"
        if not (weights / "model.safetensors.index.json").exists():
            model.build("3b", weights, "cuda")
        settings = Settings.model_validate(
            {
                "data": Path(folder) / "data",
                "port": 0,
                "engine": "native",
                "model": str(weights),
                "device": "cuda",
            }
        )
        begun = time.monotonic()
        with Stack(settings) as stack, Client(stack.url, stack.api_key) as client:
            print(f"the worker is ready after {time.monotonic() - begun:.0f} s", flush=True)
            server = Server("native", stack, client, max_new_tokens=new, ignore_eos=True)
            server.run(items(64, 0))
            for number in range(1, args.rounds + 1):
                result = server.run(items(args.jobs, number))
                rounds.append(result)
                print(f"round {number}: {result.rate:.1f} jobs/s {result.cpu_ms}", flush=True)
    rates = [each.rate for each in rounds]
    parts = {
        name: statistics.median(each.cpu_ms[name] for each in rounds) for name in rounds[0].cpu_ms
    }
    text = (
        "# Jobs a second of the whole worker on a GPU\n\n"
        f"`python -m bench.worker_gpu --jobs {args.jobs} --rounds {args.rounds}`: "
        f"{described(where)} {os.cpu_count()} cores. Model of size 3b, random weights; a JPEG of "
        f"448 x 448 pixels and 32 words a job, {new} new tokens.\n\n"
        + str(
            Table(
                ["round", "jobs/s", "tokens/s"],
                [[str(i), f"{rate:.1f}", f"{rate * new:.0f}"] for i, rate in enumerate(rates, 1)],
            )
        )
        + "\n\nProcessor time of each process, ms a job:\n\n"
        + str(Table(list(parts), [[f"{value:.1f}" for value in parts.values()]]))
        + "\n"
    )
    print("\n" + text)
    stored = {"conditions": where, "jobs": args.jobs, "jobs/s": rates, "cpu_ms": parts}
    print(write(args.name, args.results, text, stored))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=512, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="find the model here, or keep it here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="worker-gpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
