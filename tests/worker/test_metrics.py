"""What a worker tells Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import until
from visq import Client
from visq.embedded.processes import free_port
from visq.embedded.stack import Stack
from visq.errors import ConfigurationError
from visq.settings import Settings
from visq.types import JobStatus
from worker.engine.face import Engine
from worker.engine.stats import Histogram
from worker.metrics import OUTCOMES, Metrics

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"


class DownEngine:
    alive = False

    def stats(self) -> None:
        return None


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(cast("Engine", DownEngine()), 4)


def test_the_table_in_the_docs_is_what_there_is(metrics: Metrics) -> None:
    documented = re.findall(r"^\| `(visq_\w+)` \| (\w+) \| (.+) \|$", TABLE.read_text(), re.M)
    described = [
        (f"{m.name}_total" if m.type == "counter" else m.name, m.type, m.documentation)
        for collector in metrics.registry._collector_to_names
        for m in collector.describe()
    ]
    assert documented == described


def test_the_outcomes_are_the_states_after_a_run() -> None:
    after_a_run = {status.value for status in JobStatus} - {"waiting", "running"}
    assert set(OUTCOMES) == after_a_run | {"lost"}


def test_an_address_that_is_taken_is_a_configuration_error(metrics: Metrics) -> None:
    port, stop = metrics.serve("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigurationError, match=f"VISQ_METRICS_PORT={port}"):
            metrics.serve("127.0.0.1", port)
    finally:
        stop()


def test_an_observation_at_a_bound_counts_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.sum) == ([2, 1, 1], 4, 12.0)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    settings = Settings(
        data=tmp_path, port=0, device="cpu", engine_threads=1, metrics_port=free_port()
    )
    with Stack(settings) as running:
        yield running


def scrape(stack: Stack) -> dict[str, float]:
    """Samples by their name, or ``name{label value}``."""
    url = f"http://127.0.0.1:{stack.settings.metrics_port}/metrics"
    text = httpx2.get(url, trust_env=False).raise_for_status().text
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.timeout(300)
def test_a_real_worker_counts_its_jobs_and_its_engines_work(stack: Stack) -> None:
    with Client(stack.url, stack.api_key) as client:
        asked = {"max_new_tokens": 6, "ignore_eos": True}
        jobs = [client.jobs.submit(prompt="hello", gen_config=asked) for _ in range(3)]
        refused = client.jobs.submit(prompt="hello", adapter_name="none-such")
        for job in jobs:
            assert job.wait(120).status is JobStatus.SUCCEEDED
        assert refused.wait(120).status is JobStatus.FAILED
    until(lambda: scrape(stack).get("visq_engine_requests_finished_total") == 3, 30, "a report")
    found = scrape(stack)
    assert stack.worker is not None
    assert found["visq_worker_concurrency"] == stack.worker.concurrency == 64
    assert found["visq_worker_runs_total{succeeded}"] == 3
    assert found["visq_worker_runs_total{failed}"] == 1
    assert found["visq_worker_run_duration_seconds_count"] == 4
    assert found["visq_worker_jobs_in_flight"] == 0
    assert found["visq_engine_up"] == 1
    assert found["visq_engine_generated_tokens_total"] == 18
    assert found["visq_engine_time_to_first_token_seconds_count"] == 3
    assert found["visq_engine_time_to_first_token_seconds_bucket{+Inf}"] == 3
    assert found["visq_engine_time_per_output_token_seconds_count"] == 3
    assert found["visq_engine_kv_blocks_available"] > 0
