"""What a worker tells Prometheus: its runs, and what its engine holds and has done.

`ENGINE` is the list of the engine's metrics; docs/metrics.md has a table of all, which a test holds
to what is here. The engine counts in its own process (`worker.engine.stats`) and reports every
second; a scrape reads the last report. A new engine process counts from zero, as Prometheus expects
of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from visq.errors import ConfigurationError
from worker.engine.face import Engine
from worker.engine.stats import EngineStats, Histogram
from worker.runs import Run, Runs

RUN_BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
"""Seconds."""

OUTCOMES: Final = ("succeeded", "failed", "cancelled", "expired", "queued", "lost")
"""Ends of a run: the job's state after it (``queued``: it is attempted again); or ``lost``, if its
lease ran out meanwhile."""


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """A number of `EngineStats` under its public name."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    """Without the prefix, and without the ``_total`` of counters."""
    field: str
    help: str


ENGINE: Final = (
    EngineMetric("gauge", "queued_requests", "queued", "Requests that are not prepared yet."),
    EngineMetric(
        "gauge", "waiting_sequences", "waiting", "Prepared sequences not yet in the running batch."
    ),
    EngineMetric("gauge", "running_sequences", "running", "Sequences in the running batch."),
    EngineMetric("gauge", "kv_blocks", "total_blocks", "Blocks of the KV cache."),
    EngineMetric("gauge", "kv_blocks_held", "held_blocks", "Blocks that sequences hold."),
    EngineMetric(
        "gauge",
        "kv_blocks_available",
        "available_blocks",
        "Blocks that are free, or cached and can be evicted.",
    ),
    EngineMetric(
        "gauge", "host_kv_blocks", "host_blocks", "Blocks that the host's memory has room for."
    ),
    EngineMetric("gauge", "host_kv_blocks_used", "host_used_blocks", "Blocks that are kept there."),
    EngineMetric(
        "counter", "host_kv_hits", "host_hits", "Blocks that were copied back from there."
    ),
    EngineMetric(
        "gauge", "vision_cache_bytes", "vision_bytes", "Bytes of picture features that are cached."
    ),
    EngineMetric("counter", "requests", "requests", "Requests submitted to the engine."),
    EngineMetric("counter", "requests_finished", "finished", "Requests that ended with an answer."),
    EngineMetric("counter", "steps", "steps", "Steps that were computed."),
    EngineMetric(
        "counter", "computed_tokens", "step_tokens", "Tokens that were computed, of prompts too."
    ),
    EngineMetric("counter", "generated_tokens", "generated_tokens", "Tokens that were generated."),
    EngineMetric(
        "counter",
        "preemptions",
        "preemptions",
        "Sequences put back into the queue for want of blocks.",
    ),
    EngineMetric(
        "counter",
        "prefix_cache_queries",
        "prefix_queries",
        "Prompt tokens looked up in the prefix cache.",
    ),
    EngineMetric(
        "counter",
        "prefix_cache_hits",
        "prefix_hits",
        "Prompt tokens that were found in the prefix cache.",
    ),
    EngineMetric(
        "counter", "vision_cache_hits", "vision_hits", "Pictures whose features were cached."
    ),
    EngineMetric(
        "counter", "vision_cache_misses", "vision_misses", "Pictures whose features were not."
    ),
    EngineMetric("counter", "encoded_images", "encoded_images", "Pictures that were encoded."),
    EngineMetric(
        "counter",
        "vision_seconds",
        "vision_seconds",
        "Seconds in the encoding of pictures (on CUDA: in its launch).",
    ),
    EngineMetric(
        "histogram",
        "time_to_first_token_seconds",
        "first_token",
        "Time from a request's submit to the engine to its first token.",
    ),
    EngineMetric(
        "histogram",
        "time_per_output_token_seconds",
        "per_token",
        "Mean time between two tokens of an answer, one observation an answer.",
    ),
)


class Metrics:
    """The metrics of one worker, in a registry of its own."""

    def __init__(self, engine: Engine, concurrency: int) -> None:
        self.registry = CollectorRegistry()
        self._runs = Counter(
            "visq_worker_runs",
            "Attempts of jobs that ended here, by the state of the job afterwards.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in OUTCOMES:  # so that a rate is defined before the first one
            self._runs.labels(outcome)
        self._durations = PrometheusHistogram(
            "visq_worker_run_duration_seconds",
            "Time from the claim of a job to the end of its run.",
            buckets=RUN_BOUNDS,
            registry=self.registry,
        )
        self._in_flight: Callable[[], int] = int
        self.registry.register(_Collector(engine, concurrency, lambda: self._in_flight()))

    def watch(self, runs: Runs) -> None:
        """Tell of `runs` from now on."""
        self._in_flight = lambda: runs.in_flight
        runs.on_end = self._ended

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Answer ``GET /metrics`` in threads of its own; return the port and what ends it.

        :raises ConfigurationError: if the address cannot be had.
        """
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigurationError(
                f"VISQ_METRICS_HOST={host}, VISQ_METRICS_PORT={port}: this address cannot be "
                f"listened on ({error.strerror})"
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop

    def _ended(self, run: Run) -> None:
        self._runs.labels("lost" if run.outcome is None else run.outcome.value).inc()
        self._durations.observe(run.seconds())


class _Collector(Collector):
    """Reads what others count, at each scrape."""

    def __init__(self, engine: Engine, concurrency: int, in_flight: Callable[[], int]) -> None:
        self._engine = engine
        self._concurrency = concurrency
        self._in_flight = in_flight

    def describe(self) -> Iterator[Metric]:
        """Names of all that `collect` may yield."""
        yield from self._of_worker()
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        yield from self._of_worker()
        # An engine that is down, or does not count, has no numbers: a gap is better than zeros.
        if (stats := self._engine.stats()) is not None:
            yield from _families(stats)

    def _of_worker(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "visq_worker_jobs_in_flight", "Jobs that this worker runs.", self._in_flight()
        )
        yield GaugeMetricFamily(
            "visq_worker_concurrency", "Most jobs that this worker runs.", self._concurrency
        )
        yield GaugeMetricFamily(
            "visq_engine_up", "Whether the engine answers (0: it loads again).", self._engine.alive
        )


def _families(stats: EngineStats | None = None) -> Iterator[Metric]:
    """The engine's metrics with the values of `stats`, or without values."""
    for metric in ENGINE:
        name = f"visq_engine_{metric.name}"
        value = None if stats is None else getattr(stats, metric.field)
        match metric.kind:
            case "gauge":
                yield GaugeMetricFamily(name, metric.help, value)
            case "counter":
                yield CounterMetricFamily(name, metric.help, value)
            case "histogram" if value is None:
                yield HistogramMetricFamily(name, metric.help)
            case "histogram":
                yield HistogramMetricFamily(name, metric.help, _buckets(value), value.sum)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    buckets, total = [], 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets
