"""How fast the engines are beside each other and beside the floor: ``python -m bench.engine``.

Builds a model of the size of Qwen2.5-VL-3B with random weights, and asks visq's native engine,
transformers' ``generate`` (one request after the other, and in static batches) and, where it is
installed, LMDeploy the same: pictures, texts, one request alone, the second turn of a session.
``--size tiny`` does all of it with a model that a CPU runs in a minute: to try the benchmark.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from bench import model
from bench.engine_load import LOADS, Load
from bench.floor import Ceilings, Costs, Floor
from bench.results_files import RESULTS, ROOT, Table, conditions, described, write

H100: Final = Ceilings(bytes_per_second=3.0e12, flops=790e12)
"""As measured by a copy, and as promised for dense bf16 less what no kernel reaches."""
MEMORY: Final = Path("/dev/shm")
MEMORY_BYTES: Final = 20 * 1024**3
"""Free space that makes it worth to keep the model there."""

Values = Mapping[str, Any]


def measure(
    systems: Sequence[str], folder: Path, args: argparse.Namespace, device: str
) -> Iterator[tuple[str, Values]]:
    """Each system in a process of its own; one that fails is left out, with a word."""
    for system in systems:
        out = folder / "measured.json"
        out.unlink(missing_ok=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "bench.engine_run", system, "--folder", str(folder)]
        command += ["--load", args.size, "--device", device, "--rounds", str(args.rounds)]
        done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=False)
        print(f"{system}: {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode or not out.exists():
            print(f"{system} FAILED (exit status {done.returncode}): left out", flush=True)
            continue
        yield system, json.loads(out.read_text())


def tables(found: Mapping[str, Values], load: Load, floor: Floor) -> str:
    rows = [
        row
        for heading, key, prompts, new in (
            (f"{load.image_requests} pictures", "images", load.image_requests, load.image_new),
            (f"{load.text_requests} texts", "texts", load.text_requests, load.text_new),
        )
        for row in _throughput(found, load, floor, heading, key, prompts, new)
    ]
    columns = ["workload", "system", "asked", "requests/s", "tokens/s", "best is times"]
    parts = [str(Table(columns, rows))]
    rows = list(_latency(found, load, floor))
    parts.append(str(Table(["one at a time", "system", "TTFT ms", "tokens/s"], rows)))
    rows = list(_steps(found, floor))
    if rows:
        parts.append(str(Table(["decode step", "system", "ms", "floor ms", "times"], rows)))
    parts.append("\n".join(f"- {line}" for line in _agreement(found)))
    return "\n\n".join(part for part in parts if part)


def _throughput(
    found: Mapping[str, Values],
    load: Load,
    floor: Floor,
    heading: str,
    key: str,
    requests: int,
    new: int,
) -> Iterator[list[str]]:
    measured = {system: values[key] for system, values in found.items() if key in values}
    if not measured:
        return
    prompt = next(iter(measured.values()))[0]["prompt tokens"]
    of_images = {"images": 1, "patches": load.patches} if key == "images" else {}
    seconds = floor.job(requests, prompt, new, **of_images)
    text = f"{heading}, {prompt} + {new} tokens"
    yield [text, "floor", str(requests), f"{requests / seconds:.1f}",
           f"{requests * new / seconds:.0f}", "1.0"]  # fmt: skip
    for system, rounds in measured.items():
        rates = [each["requests/s"] for each in rounds]
        shown = " / ".join(f"{rate:.2f}" for rate in rates)
        tokens = " / ".join(f"{each['tokens/s']:.0f}" for each in rounds)
        asked = str(rounds[0]["requests"])
        times = f"{requests / seconds / max(rates):.1f}"
        yield ["", system, asked, shown, tokens, times]


def _latency(found: Mapping[str, Values], load: Load, floor: Floor) -> Iterator[list[str]]:
    singles = {system: each["single"] for system, each in found.items() if "single" in each}
    if singles:
        prompt = next(iter(singles.values()))["prompt tokens"]
        first = floor.vision(1, load.patches) + floor.prefill(1, prompt)
        rate = 1 / floor.step(1, prompt + load.image_new / 2)
        yield [f"a picture, {prompt} tokens", "floor", f"{1000 * first:.2f}", f"{rate:.0f}"]
        for system, each in singles.items():
            yield ["", system, f"{1000 * each['TTFT s']:.1f}", f"{each['tokens/s']:.1f}"]
    turns = {system: each["second turn"] for system, each in found.items() if "second turn" in each}
    if turns:
        some = next(iter(turns.values()))
        prompt, cached = some["prompt tokens"], some["first prompt tokens"] + load.session_new
        with_cache = floor.prefill(1, prompt - cached, cached)
        without = floor.vision(load.session_images, load.patches) + floor.prefill(1, prompt)
        heading = f"second turn, {load.session_images} pictures, {prompt} tokens"
        yield [heading, "floor with a prefix cache", f"{1000 * with_cache:.2f}", ""]
        yield ["", "floor without any", f"{1000 * without:.2f}", ""]
        for system, each in turns.items():
            yield ["", system, f"{1000 * each['TTFT s']:.1f}", ""]


def _steps(found: Mapping[str, Values], floor: Floor) -> Iterator[list[str]]:
    for system, values in found.items():
        for batch, each in values.get("decode step", {}).items():
            best = floor.step(int(batch), each["context"])
            heading = f"{batch} sequences of {each['context']:.0f} tokens"
            ms, best_ms = 1000 * each["seconds"], 1000 * best
            yield [heading, system, f"{ms:.2f}", f"{best_ms:.2f}", f"{ms / best_ms:.1f}"]


def _agreement(found: Mapping[str, Values]) -> Iterator[str]:
    """Whether the systems say the same (in bf16 a random model's answers part after a while)."""
    with_answers = {name: each["images"][0]["answers"] for name, each in found.items()
                    if "images" in each}  # fmt: skip
    if "generate" not in with_answers:
        return
    reference = with_answers.pop("generate")
    for system, answers in with_answers.items():
        pairs = list(zip(answers, reference, strict=False))
        first = sum(ours[0] == theirs[0] for ours, theirs in pairs)
        common = median(_common(ours, theirs) for ours, theirs in pairs)
        yield (
            f"{system} and generate: the first token of {first} of {len(pairs)} answers is the "
            f"same; half are the same for at least {common:.0f} of {len(pairs[0][0])} tokens"
        )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def ceilings(device: str) -> Ceilings:
    """Of the H100 those of the published figures; of other devices, measured now."""
    if device == "cuda" and "H100" in torch.cuda.get_device_name():
        return H100
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, dtype=dtype, device=device)
    flops = 2 * side**3 / _best_seconds(lambda: a @ a, cuda)
    buffer = torch.zeros(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(buffer)
    rate = 2 * buffer.nbytes / _best_seconds(lambda: target.copy_(buffer), cuda)
    return Ceilings(rate, flops)


def _best_seconds(work: Any, cuda: bool) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    roomy = MEMORY.exists() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    with tempfile.TemporaryDirectory(prefix="visq-bench-", dir=MEMORY if roomy else None) as folder:
        yield Path(folder)


def _systems(args: argparse.Namespace) -> list[str]:
    if args.systems:
        return list(args.systems)
    static = [f"static {size}" for size in LOADS[args.size].static_batches]
    systems = ["native", "native without prefix cache", "generate", *static]
    if find_spec("lmdeploy") is None:
        print("LMDeploy is not installed: left out")
        return systems
    return [*systems, "lmdeploy", "lmdeploy without prefix cache"]


def main() -> None:
    args = _arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size != "tiny" and device == "cpu":
        raise SystemExit("a model of this size needs a GPU; `--size tiny` runs on the CPU")
    where = conditions()
    with _folder(args.folder) as folder:
        if not (folder / "model.safetensors.index.json").exists():
            start = time.perf_counter()
            model.build(args.size, folder, device)
            print(f"made the model in {time.perf_counter() - start:.0f} s", flush=True)
        limits = ceilings(device)
        floor = Floor(Costs.of(model.skeleton(folder)), limits)
        found: dict[str, Values] = {}
        for system, values in measure(_systems(args), folder, args, device):
            found[system] = values
            _write(args, where, limits, floor, found)  # so that no later one can lose it


def _write(
    args: argparse.Namespace,
    where: Mapping[str, Any],
    limits: Ceilings,
    floor: Floor,
    found: Mapping[str, Values],
) -> None:
    load = LOADS[args.size]
    text = (
        f"# Engines beside each other and the floor, model of size {args.size}\n\n"
        f"`python -m bench.engine --size {args.size} --rounds {args.rounds}`: {described(where)} "
        f"Floor: {limits.bytes_per_second / 1e9:.0f} GB/s, {limits.flops / 1e12:.2f} TFLOP/s. "
        f"Random weights; pictures of {load.image_side} x {load.image_side} pixels, decoded.\n\n"
        + tables(found, load, floor)
    )
    print("\n" + text, flush=True)
    systems = copy.deepcopy(dict(found))  # what comes later is compared with these answers
    for values in systems.values():
        for key in ("images", "texts"):
            for each in values.get(key, []):
                del each["answers"]
    stored = {"conditions": where, "ceilings": vars(limits), "systems": systems}
    print(write(args.name or f"engine-{args.size}", args.results, text, stored), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=LOADS, default="3b")
    parser.add_argument("--systems", nargs="+", help="e.g. native generate 'static 16' lmdeploy")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the model here, or find it here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the files in it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
