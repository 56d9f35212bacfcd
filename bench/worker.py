"""Jobs a second of the whole worker, by engine: ``python -m bench.worker``.

For each engine a whole embedded stack is started (Valkey, SQLite, folder store, API, worker with
its media and engine processes) with the small model on the CPU. They take turns at the same jobs,
one batch at a time (A B A B), so that a noisy machine is as noisy for both; the one whose turn it
is not only idles. Every round has pictures that no engine has seen.

Beside jobs a second, which other programs on the machine disturb, stands the processor time that a
job costs in each process, which they disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from bench.results_files import RESULTS, Table, conditions, described, write
from bench.worker_jobs import WORKLOADS, Item, draw
from visq import Client
from visq.embedded.stack import Stack
from visq.objects import open_store, parse_uri
from visq.settings import Settings
from visq.types import JobView

PART_NAMES: Final = {"valkey": "Valkey", "the API": "API", "the worker": "worker"}
LOOK_SECONDS: Final = 0.2


@dataclass
class Round:
    """One batch through one stack."""

    jobs: int
    seconds: float
    """From the first job's creation to the last one's end."""
    cpu_ms: dict[str, float] = field(default_factory=dict)
    """Processor time of each process, per job."""
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds


class Server:
    """A stack with one engine."""

    def __init__(self, engine: str, stack: Stack, client: Client, **gen_config: Any) -> None:
        self.engine = engine
        self._gen_config = {"max_new_tokens": 64, **gen_config}
        self._stack = stack
        self._client = client

    def run(self, items: Sequence[Item], **gen_config: Any) -> Round:
        """Put the pictures in the store, then answer all questions."""
        store = open_store(self._stack.settings)
        try:
            for uri, png in {item.uri: item.png for item in items}.items():
                store.put(parse_uri(uri), png, "image/png")
        finally:
            store.close()
        parts = self.parts()
        before = {name: _cpu_seconds(process) for name, process in parts.items()}
        batch = self._client.batches.submit(
            [
                {"custom_id": item.name, "prompt": item.question, "images": [item.uri]}
                for item in items
            ],
            gen_config=self._gen_config | gen_config,
        )
        while batch.counts.finished < len(items):
            time.sleep(LOOK_SECONDS)
            batch.refresh()
        after = {name: _cpu_seconds(process) for name, process in parts.items()}
        views = list(batch.results())
        return Round(
            jobs=len(items),
            seconds=_span(views),
            cpu_ms={name: 1000 * (after[name] - before[name]) / len(items) for name in parts},
            answers={view.custom_id or "": _answer(view) for view in views},
        )

    def parts(self) -> dict[str, psutil.Process]:
        """The processes of the stack, by name."""
        parts: dict[str, psutil.Process] = {}
        for service in self._stack.services:
            process = getattr(service, "process", None)
            if process is not None:
                parts[PART_NAMES.get(service.name, service.name)] = psutil.Process(process.pid)
        children = parts["worker"].children()
        children.sort(key=lambda child: child.memory_info().rss)
        parts["engine"] = children[-1]  # it holds torch and the model
        for number, child in enumerate(children[:-1]):
            parts[f"worker's child {number}"] = child
        return parts


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _span(views: Sequence[JobView]) -> float:
    ends = [view.finished_at for view in views if view.finished_at is not None]
    return (max(ends) - min(view.created_at for view in views)).total_seconds()


def _answer(view: JobView) -> str:
    if view.result is None:
        raise SystemExit(f"job {view.custom_id} has no answer: {view.status} {view.error}")
    return view.result.text


def start(engine: str, concurrency: int, folder: Path, running: ExitStack) -> Server:
    settings = Settings.model_validate(
        {"data": folder, "port": 0, "engine": engine, "concurrency": concurrency}
    )
    stack = running.enter_context(Stack(settings))
    assert stack.worker is not None
    if stack.worker.engine != engine:
        raise SystemExit(f"asked for the engine {engine}, the worker has {stack.worker.engine}")
    client = running.enter_context(Client(stack.url, stack.api_key))
    return Server(engine, stack, client)


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[Round]]]:
    """Rounds by workload and engine."""
    found: dict[str, dict[str, list[Round]]] = {}
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="visq-bench-")))
        servers = [
            start(engine, args.concurrency, folder / engine, running) for engine in args.engines
        ]
        for server in servers:  # first steps, connections, caches of code: not measured
            server.run(draw("distinct pictures", args.concurrency, round_number=0))
        for workload in args.workloads:
            rounds = found.setdefault(workload, {engine: [] for engine in args.engines})
            for number in range(1, args.rounds + 1):
                items = draw(workload, args.jobs, round_number=number)
                for server in servers:
                    result = server.run(items, **WORKLOADS[workload].gen_config)
                    rounds[server.engine].append(result)
                    print(f"{workload}, round {number}, {server.engine}: {result.rate:.1f} jobs/s")
    return found


def mismatches(rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    """The jobs that the engines answered differently."""
    found: list[str] = []
    for results in zip(*rounds.values(), strict=True):
        for name in results[0].answers:
            if len(answers := {result.answers[name] for result in results}) > 1:
                found.append(f"{name}: {' | '.join(sorted(answers))}")
    return found


def tables(found: Mapping[str, Mapping[str, Sequence[Round]]]) -> str:
    lines: list[str] = []
    for workload, rounds in found.items():
        wrong = mismatches(rounds)
        asked = sum(each.jobs for each in next(iter(rounds.values())))
        rates = {engine: [each.rate for each in results] for engine, results in rounds.items()}
        rows = []
        for engine, values in rates.items():
            cpu = sum(_median_cpu(rounds[engine]).values())
            spread = f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})"
            rows.append([engine, spread, f"{cpu:.1f}"])
        lines += [
            f"## {workload}",
            "",
            WORKLOADS[workload].text,
            "",
            str(Table(["engine", "jobs/s: median (lowest - highest)", "CPU ms a job"], rows)),
            "",
        ]
        if {"native", "generate"} <= rates.keys():
            ratios = [n / g for n, g in zip(rates["native"], rates["generate"], strict=True)]
            lines += [
                f"native / generate, round by round: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} - {max(ratios):.2f}). "
            ]
        lines += [f"Different answers: {len(wrong)} of {asked}.", *(f"- {each}" for each in wrong)]
        parts = {engine: _median_cpu(results) for engine, results in rounds.items()}
        names = list(dict.fromkeys(name for each in parts.values() for name in each))
        rows = [[e, *(f"{part.get(n, 0):.1f}" for n in names)] for e, part in parts.items()]
        lines += ["", "CPU ms a job, by process:", "", str(Table(["engine", *names], rows)), ""]
    return "\n".join(lines)


def _median_cpu(rounds: Sequence[Round]) -> dict[str, float]:
    names = rounds[0].cpu_ms
    return {name: statistics.median(each.cpu_ms[name] for each in rounds) for name in names}


def main() -> None:
    args = _arguments()
    where = conditions()
    found = measure(args)
    text = (
        "# Jobs a second of the whole worker, small model on the CPU\n\n"
        f"`python -m bench.worker --jobs {args.jobs} --rounds {args.rounds} --concurrency "
        f"{args.concurrency}`: {described(where)} The machine is shared with other work: compare "
        "the columns, not the days.\n\n" + tables(found)
    )
    print("\n" + text)
    values = {
        "conditions": where,
        "jobs": args.jobs,
        "concurrency": args.concurrency,
        "rounds": {
            workload: {
                engine: [
                    {k: v for k, v in asdict(each).items() if k != "answers"} for each in results
                ]
                for engine, results in rounds.items()
            }
            for workload, rounds in found.items()
        },
        "mismatches": {workload: mismatches(rounds) for workload, rounds in found.items()},
    }
    print(write(args.name, args.results, text, values))
    if any(values["mismatches"].values()):
        raise SystemExit("the engines gave different answers")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=256, help="jobs of one round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--engines", nargs="+", default=["generate", "native"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="worker-cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
