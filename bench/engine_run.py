"""One system of `bench.engine`, measured in a process of its own (it owns the device meanwhile).

``python -m bench.engine_run SYSTEM --folder MODEL --load NAME --device cpu --out FILE.json``
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.engine_load import LOADS, Load, Prompt
from bench.engine_systems import Answer, FaceSystem, LMDeploySystem, StaticSystem, System

Values = dict[str, Any]


def measure(name: str, system: System, load: Load, rounds: int) -> Values:
    """Everything that this system can be asked."""
    kind = name.partition(" ")[0]
    if name.endswith("without prefix cache"):
        _warm(system, load, load.singles)
        return {"second turn": _session(system, load)}
    size = int(name.rpartition(" ")[2]) if kind == "static" else 0
    images = {"generate": load.one_by_one, "static": 4 * size}.get(kind, load.image_requests)
    texts = {"generate": load.one_by_one, "static": size}.get(kind, load.text_requests)
    warm = {"generate": 2, "static": size}.get(kind, images // 4)
    _warm(system, load, warm)
    found: Values = {
        "images": [
            _batch(system, load.image_prompts(min(images, load.image_requests), n), load.image_new)
            for n in range(1, rounds + 1)
        ],
        "texts": [
            _batch(system, load.text_prompts(min(texts, load.text_requests), n), load.text_new)
            for n in range(1, rounds + 1)
        ],
    }
    if kind != "static":
        found["single"] = _single(system, load)
        found["second turn"] = _session(system, load)
    if kind in ("native", "lmdeploy"):
        found["decode step"] = {str(n): _decode(system, load, n) for n in load.decode_batches}
    return found


def _warm(system: System, load: Load, count: int) -> None:
    """Code that is compiled, and memory that is claimed, at the first use of a shape."""
    system.answer(load.image_prompts(count, 0), 8)
    system.answer(load.text_prompts(min(count, load.text_requests), 0), 8)
    system.answer(load.image_prompts(1, 0), 8)


def _batch(system: System, prompts: Sequence[Prompt], new: int) -> Values:
    for prompt in prompts:
        prompt.images  # noqa: B018  (decoded pictures are given: drawing them is not measured)
    start = time.perf_counter()
    answers = system.answer(prompts, new)
    seconds = time.perf_counter() - start
    _check(answers, new)
    return {
        "requests": len(prompts),
        "seconds": seconds,
        "requests/s": len(prompts) / seconds,
        "tokens/s": len(prompts) * new / seconds,
        "prompt tokens": answers[0].prompt_tokens,
        "answers": [answer.token_ids for answer in answers[:16]],
    }


def _single(system: System, load: Load) -> Values:
    answers = []
    for number in range(load.singles):
        [prompt] = load.image_prompts(1, 50 + number)
        prompt.images  # noqa: B018
        answers += system.answer([prompt], load.image_new)
    _check(answers, load.image_new)
    return {
        "TTFT s": statistics.median(answer.first for answer in answers),
        "tokens/s": statistics.median(answer.rate for answer in answers),
        "prompt tokens": answers[0].prompt_tokens,
    }


def _session(system: System, load: Load) -> Values:
    turns: list[list[Answer]] = []
    system.chat(load.session(0), load.session_new)
    for number in range(1, load.sessions + 1):
        turns.append(system.chat(load.session(number), load.session_new))
    return {
        "first TTFT s": statistics.median(first.first for first, _ in turns),
        "TTFT s": statistics.median(second.first for _, second in turns),
        "prompt tokens": turns[0][1].prompt_tokens,
        "first prompt tokens": turns[0][0].prompt_tokens,
    }


def _decode(system: System, load: Load, batch: int) -> Values:
    """Seconds a step while all of a batch decode: two batches that differ only in new tokens."""
    few, many = load.decode_new, 3 * load.decode_new
    seconds: dict[int, list[float]] = {few: [], many: []}
    prompt_tokens = 0
    for number in range(3):
        for new in (few, many):
            prompts = load.text_prompts(batch, 100 + 10 * number + (new == many))
            start = time.perf_counter()
            answers = system.answer(prompts, new)
            seconds[new].append(time.perf_counter() - start)
            prompt_tokens = answers[0].prompt_tokens
    span = statistics.median(seconds[many]) - statistics.median(seconds[few])
    return {"seconds": span / (many - few), "context": prompt_tokens + (few + many) / 2}


def _check(answers: Sequence[Answer], new: int) -> None:
    if wrong := {len(answer.token_ids) for answer in answers} - {new}:
        raise SystemExit(f"{new} tokens were asked for, {sorted(wrong)} came")


def _native(folder: Path, device: str, **config: Any) -> System:
    return FaceSystem(folder, engine="native", device=device, **config)


OPEN: Final[Mapping[str, Callable[[Path, str], System]]] = {
    "native": lambda folder, device: _native(folder, device),
    "native without prefix cache": lambda folder, device: _native(
        folder, device, prefix_caching=False
    ),
    "generate": lambda folder, device: FaceSystem(folder, engine="generate", device=device),
    "lmdeploy": lambda folder, device: LMDeploySystem(folder),
    "lmdeploy without prefix cache": lambda folder, device: LMDeploySystem(
        folder, prefix_caching=False
    ),
}


def open_system(name: str, folder: Path, device: str) -> System:
    """:param name: a key of `OPEN`, or ``static`` and the size of a batch."""
    if name.startswith("static "):
        return StaticSystem(folder, int(name.rpartition(" ")[2]), device=device)
    return OPEN[name](folder, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--load", choices=LOADS, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    start = time.perf_counter()
    system = open_system(args.system, args.folder, args.device)
    opened = time.perf_counter() - start
    gc.collect()
    gc.freeze()  # as in a server: looking through all of a model's objects stops a step for long
    try:
        values = measure(args.system, system, LOADS[args.load], args.rounds)
    finally:
        system.close()
    args.out.write_text(json.dumps({"ready s": opened, **values}))


if __name__ == "__main__":
    main()
