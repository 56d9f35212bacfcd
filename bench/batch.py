"""A large batch from a file, on PostgreSQL and Redis: ``python -m bench.batch``.

One API process, one worker process, private servers, the object store a folder. The engine is a
stub that answers at once (`bench.played_worker`), or with ``--small`` the model that ships with
visq and a picture for each item. On the way the API and the worker are killed (``kill -9``) and
started again; with ``--rival`` another tenant has a batch of as many items, and with ``--chat`` a
third one sends chat jobs, before the batch and beside it.

Said of it: wall time and items a second; peak memory of the processes; most items in the broker;
whether each item is in the output once, in input order; how long chat jobs waited for their start;
which share of the items that ended while both batches ran was whose.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2
import psutil
import redis
from sqlalchemy import create_engine, text

from bench.results_files import RESULTS, Table, conditions, described, write
from bench.worker_jobs import draw
from tests.servers import PostgreSQL, Valkey
from visq import Client
from visq.embedded.processes import free_port, start_tethered
from visq.objects import ObjectStore, open_store, parse_uri
from visq.settings import Settings
from visq.types import BatchView

TENANTS: Final = ("acme", "rival", "chat")
LOOK_SECONDS: Final = 0.25
CHAT_PAUSE: Final = 0.2
"""Seconds between two chat jobs."""
IDLE_CHATS: Final = 150

_IN_BROKER: Final = text(
    "SELECT count(*) FROM jobs WHERE status = 'queued' AND publish_at IS NOT NULL"
    " AND batch_id IS NOT NULL"
)
_RUNNING: Final = text(
    "SELECT count(*) FROM jobs WHERE status = 'running' AND batch_id IS NOT NULL"
)
_WAITS: Final = text(
    "SELECT extract(epoch FROM j.started_at - j.created_at) FROM jobs j JOIN tenants t"
    " ON t.id = j.tenant_id WHERE t.name = 'chat' AND j.started_at IS NOT NULL"
    " AND j.created_at >= :since AND j.created_at < :until ORDER BY 1"
)
_SHARES: Final = text(
    "SELECT t.name, count(*) FROM job_events e JOIN jobs j ON j.id = e.job_id"
    " JOIN tenants t ON t.id = j.tenant_id WHERE e.to_status = 'succeeded'"
    " AND j.batch_id IS NOT NULL AND e.at >= :since AND e.at < :until GROUP BY t.name"
)
_ENDS: Final = text(
    "SELECT count(*), count(DISTINCT job_id) FROM job_events WHERE to_status = 'succeeded'"
)
_NOW: Final = text("SELECT statement_timestamp()")


@dataclass
class Peaks:
    """The most that was seen."""

    memory: dict[str, float] = field(default_factory=dict)
    """MiB of resident memory, by process."""
    in_broker: int = 0
    running: int = 0

    def saw(self, name: str, value: float) -> None:
        self.memory[name] = max(self.memory.get(name, 0.0), value)


class Deployment:
    """The servers, an API and a worker."""

    def __init__(self, folder: Path, stack: ExitStack, args: argparse.Namespace) -> None:
        self._folder = folder
        self._args = args
        postgres = stack.enter_context(PostgreSQL(folder / "postgres"))
        valkey = stack.enter_context(Valkey(folder / "valkey"))
        self.port = free_port()
        values = {
            "DATABASE_URL": postgres.create_database(),
            "BROKER_URL": valkey.url,
            "REDIS_URL": valkey.url,
            "DATA": str(folder / "data"),
            "PORT": str(self.port),
            "API_KEYS": ",".join(f"{name}:secret-of-{name}" for name in TENANTS),
            "LEASE_SECONDS": "5",
            "HEARTBEAT_SECONDS": "1",
            "LOG_LEVEL": "WARNING",
            "ENGINE_THREADS": "1",
        }
        self._environment = os.environ | {f"VISQ_{name}": value for name, value in values.items()}
        self._environment |= {"VISQ_BENCH_STEP": "0.001", "VISQ_BENCH_SEQUENCES": "64"}
        self.settings = Settings.model_validate(
            {name.lower(): value for name, value in values.items()}
        )
        self.engine = create_engine(values["DATABASE_URL"], pool_size=2)
        self.redis = redis.Redis.from_url(valkey.url)
        self.store: ObjectStore = open_store(self.settings)
        self._visq("migrate").wait()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("API", "worker"):
            self.start(name)

    def client(self, tenant: str) -> Client:
        return Client(f"http://127.0.0.1:{self.port}", f"secret-of-{tenant}")

    def submit(self, tenant: str, number: int, gen_config: dict[str, Any]) -> str:
        """A batch of all items; returns its id."""
        answer = httpx2.post(
            f"http://127.0.0.1:{self.port}/v1/batches",
            headers={"Authorization": f"Bearer secret-of-{tenant}"},
            json={
                "input_uri": "s3://bench/in.jsonl",
                "output_uri": f"s3://bench/out-{number}.jsonl",
                "gen_config": gen_config,
            },
        )
        answer.raise_for_status()
        batch_id: str = answer.json()["id"]
        return batch_id

    def start(self, name: str) -> None:
        if name == "API":
            process = self._visq("api")
        elif self._args.small:
            process = self._visq("worker")
        else:
            process = self._run("worker", [sys.executable, "-m", "bench.played_worker"])
        self.processes[name] = process

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def ready(self) -> None:
        with self.client("acme") as client:
            while not client.ready() or not client.models.list():
                time.sleep(0.2)

    def look(self, peaks: Peaks) -> None:
        for name, process in self.processes.items():
            try:
                own = psutil.Process(process.pid)
                peaks.saw(name, own.memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                continue
        with self.engine.connect() as connection:
            peaks.in_broker = max(peaks.in_broker, connection.execute(_IN_BROKER).scalar_one())
            peaks.running = max(peaks.running, connection.execute(_RUNNING).scalar_one())

    def now(self) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(_NOW).scalar_one()

    def rows(self, statement: Any, **parameters: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(statement, parameters))

    def _visq(self, command: str) -> subprocess.Popen[bytes]:
        return self._run(command, [sys.executable, "-m", "visq", command])

    def _run(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        return start_tethered(command, log=self._folder / f"{name}.log", env=self._environment)


class Chats(threading.Thread):
    """A tenant that asks one thing after the other, at a steady pace."""

    def __init__(self, client: Client) -> None:
        super().__init__(daemon=True)
        self._client = client
        self.stopping = threading.Event()
        self.sent = 0

    def run(self) -> None:
        while not self.stopping.wait(CHAT_PAUSE):
            self._client.jobs.submit("how are you?", gen_config={"max_new_tokens": 4})
            self.sent += 1


def main() -> None:
    args = _arguments()
    where = conditions()
    with tempfile.TemporaryDirectory(prefix="visq-bench-") as folder, ExitStack() as stack:
        os.chmod(folder, 0o755)  # PostgreSQL runs as another user
        deployment = Deployment(Path(folder), stack, args)
        stack.callback(lambda: [deployment.kill(name) for name in ("worker", "API")])
        rows = measure(deployment, args)
    table = Table(["what", "seen"], [[name, value] for name, value in rows.items()])
    how = "the small model, a picture for each item" if args.small else "a stub engine"
    markdown = f"# A batch of {args.items} items, {how}\n\n{described(where)}\n\n{table}\n"
    print(f"\n{markdown}")
    if args.results is not None:
        print(write(args.name, args.results, markdown, {"conditions": where, "seen": rows}))


def measure(deployment: Deployment, args: argparse.Namespace) -> dict[str, str]:
    peaks = Peaks()
    deployment.ready()
    _put_input(deployment.store, args)
    deployment.look(peaks)
    before = dict(peaks.memory)
    chats, idle = None, None
    if args.chat:
        chats = Chats(deployment.client("chat"))
        since = deployment.now()
        chats.start()
        while chats.sent < IDLE_CHATS:
            time.sleep(0.1)
        idle = _percentiles(deployment, since, deployment.now())
    began = time.monotonic()
    since = deployment.now()
    gen_config = {"max_new_tokens": 16 if args.small else 1}
    tenants = ("acme", "rival") if args.rival else ("acme",)
    clients = {name: deployment.client(name) for name in tenants}
    batches = [
        client.batches.get(deployment.submit(tenant, number, gen_config))
        for number, (tenant, client) in enumerate(clients.items())
    ]
    kills = [("API", 0.3), ("worker", 0.6)] if args.kills else []
    both: Any = None
    halfway: Any = None
    while True:
        views = [_patiently(batch.refresh) for batch in batches]
        done = sum(view.counts.finished for view in views) / (args.items * len(views))
        if both is None and all(view.counts.total for view in views):
            both = deployment.now()
        if (
            args.rival
            and halfway is None
            and any(v.counts.finished >= v.counts.total > 0 for v in views)
        ):
            halfway = deployment.now()
        if kills and done >= kills[0][1]:
            name, _ = kills.pop(0)
            print(f"kill -9 of the {name} at {done:.0%}", flush=True)
            deployment.kill(name)
            deployment.start(name)
        deployment.look(peaks)
        if all(view.status.is_terminal for view in views):
            break
        time.sleep(LOOK_SECONDS)
    seconds = time.monotonic() - began
    until = deployment.now()
    if chats is not None:
        chats.stopping.set()
        chats.join()
    found = {
        "wall time": f"{seconds:.1f} s",
        "items a second": f"{args.items * len(batches) / seconds:.0f}",
        "status and counts": ", ".join(f"{v.status} {v.counts.model_dump()}" for v in views),
        "output": "; ".join(
            _check_output(deployment.store, f"s3://bench/out-{number}.jsonl", args.items)
            for number in range(len(batches))
        ),
        "succeeded more than once": str(_doubled(deployment)),
        "memory": ", ".join(
            f"{name} {before.get(name, 0):.0f} MiB at first, {peak:.0f} at most"
            for name, peak in peaks.memory.items()
        ),
        "in the broker at most": str(peaks.in_broker),
        "running at most": str(peaks.running),
    }
    if args.rival:
        shares = dict(
            map(tuple, deployment.rows(_SHARES, since=both or since, until=halfway or until))
        )
        total = sum(shares.values())
        found["shares while both ran"] = ", ".join(
            f"{name} {count / total:.1%} of {total}" for name, count in sorted(shares.items())
        )
    if idle is not None:
        busy = _percentiles(deployment, since, until)
        found["chat, submit to start, alone"] = str(idle)
        found["chat, submit to start, beside the batch"] = str(busy)
        found["p95 beside the batch / alone"] = f"{busy.p95 / idle.p95:.2f}"
    return found


@dataclass(frozen=True)
class Waits:
    p50: float
    p95: float
    most: float
    count: int

    def __str__(self) -> str:
        return (
            f"p50 {self.p50 * 1000:.0f} ms, p95 {self.p95 * 1000:.0f} ms, "
            f"most {self.most * 1000:.0f} ms of {self.count}"
        )


def _percentiles(deployment: Deployment, since: Any, until: Any) -> Waits:
    waits = [float(wait) for (wait,) in deployment.rows(_WAITS, since=since, until=until)]
    hundredths = statistics.quantiles(waits, n=100)
    return Waits(statistics.median(waits), hundredths[94], waits[-1], len(waits))


def _put_input(store: ObjectStore, args: argparse.Namespace) -> None:
    with store.write(parse_uri("s3://bench/in.jsonl"), "application/jsonl") as file:
        for item in _items(store, args):
            file.write(json.dumps(item).encode() + b"\n")


def _items(store: ObjectStore, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if not args.small:
        for number in range(args.items):
            yield {"custom_id": f"item-{number}", "prompt": f"What is {number} times two?"}
        return
    drawn = draw("distinct pictures", min(args.items, args.pictures), round_number=0)
    for item in drawn:
        store.put(parse_uri(item.uri), item.png, "image/png")
    for number in range(args.items):
        item = drawn[number % len(drawn)]
        yield {"custom_id": f"item-{number}", "prompt": item.question, "images": [item.uri]}


def _check_output(store: ObjectStore, uri: str, items: int) -> str:
    names, statuses = [], Counter[str]()
    with store.open(parse_uri(uri)) as file:
        for line in file:
            row = json.loads(line)
            names.append(row["custom_id"])
            statuses[row["status"]] += 1
    right = names == [f"item-{number}" for number in range(items)]
    order = "each item once, in input order" if right else "NOT the items in input order"
    return f"{len(names)} lines, {order}, {dict(statuses)}"


def _doubled(deployment: Deployment) -> int:
    [(ends, distinct)] = deployment.rows(_ENDS)
    return int(ends - distinct)


def _patiently(refresh: Any) -> BatchView:
    while True:
        try:
            view: BatchView = refresh()
            return view
        except Exception as error:  # noqa: BLE001 (the API was just killed)
            print(f"({error})", flush=True)
            time.sleep(0.5)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--small", action="store_true", help="the small model, with pictures")
    parser.add_argument("--pictures", type=int, default=5_000, help="different ones, with --small")
    parser.add_argument("--kills", action="store_true", help="kill -9 the API and the worker")
    parser.add_argument("--rival", action="store_true", help="a second tenant's batch beside it")
    parser.add_argument("--chat", action="store_true", help="a third tenant's chat jobs")
    parser.add_argument("--results", type=Path, nargs="?", const=RESULTS, help="write them there")
    parser.add_argument("--name", default="batch", help="of the results' file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
