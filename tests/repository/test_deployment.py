"""docker-compose.yml and deploy/Dockerfile: valid, and every command in them works.

No container engine is needed: the commands run as processes, against private servers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import PostgreSQL, S3Endpoint, Valkey
from tests.waiting import until
from visq.embedded.processes import end, free_port, start_tethered
from visq.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
OURS = {name: each for name, each in SERVICES.items() if "build" in each}
API_KEYS = "demo:0123456789abcdef"


def dockerfile() -> list[tuple[str, str]]:
    """Return (instruction, the rest) of each line of the Dockerfile."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text())
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_compose_file_fits_the_compose_specification() -> None:
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "check-jsonschema", "--builtin-schema"),
            *("vendor.compose-spec", COMPOSE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_service_that_another_waits_for_says_when_it_is_ready() -> None:
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]
            else:
                assert wait["condition"] == "service_completed_successfully"


def test_redis_keeps_messages_on_disk_and_never_evicts_them() -> None:
    command = shlex.join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_nothing_is_published_beyond_loopback() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_variable_of_our_services_is_a_setting() -> None:
    known = {f"VISQ_{name.upper()}" for name in Settings.model_fields}
    for service in OURS.values():
        assert set(service["environment"]) <= known


def test_the_images_are_built_from_targets_of_the_dockerfile() -> None:
    targets = {rest.split(" AS ")[1] for instruction, rest in dockerfile() if instruction == "FROM"}
    assert {service["build"]["target"] for service in OURS.values()} <= targets
    assert all((ROOT / service["build"]["dockerfile"]).exists() for service in OURS.values())


def test_no_image_runs_as_root_or_names_a_version_that_moves() -> None:
    assert ("USER", "visq") in dockerfile()
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_what_the_dockerfile_copies_is_enough_to_install(tmp_path: Path) -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    source = tmp_path / "src"
    source.mkdir()
    for instruction, rest in dockerfile():
        if instruction != "COPY" or rest.startswith("--from"):
            continue
        *names, target = rest.split()
        for name in names:
            assert f"!{name}" in allowed
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target)
            else:
                shutil.copy(ROOT / name, source / target)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    assert len(list(tmp_path.glob("visq-*.whl"))) == 1


def test_the_dockerfile_installs_extras_that_exist_with_the_pinned_versions() -> None:
    installs = [rest for instruction, rest in dockerfile() if "pip install" in rest]
    assert installs == [
        f"pip install --constraint constraints.txt '.[{extra}]'" for extra in ("api", "worker")
    ]


@pytest.fixture
def environment(
    valkey: Valkey, redis_url: str, postgres: PostgreSQL, s3: S3Endpoint, tmp_path: Path
) -> dict[str, str]:
    """The compose file's environment, with our private servers for the names in its network."""
    private = {
        "VISQ_DATABASE_URL": postgres.create_database(),
        "VISQ_REDIS_URL": redis_url,
        "VISQ_BROKER_URL": redis_url,
        **s3.environment,
    }
    written = {name for service in OURS.values() for name in service["environment"]}
    assert set(private) <= written
    s3.create_bucket("visq-uploads")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VISQ_")}
    more = {"PYTHONPATH": str(ROOT), "VISQ_DATA": str(tmp_path), "VISQ_PORT": str(free_port())}
    return {**clean, **more, "VISQ_API_KEYS": API_KEYS, **private}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def running(name: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """Run a service's command until its health check succeeds, and end it as compose does."""
    service = SERVICES[name]
    process = start_tethered(
        [sys.executable, "-m", "visq", *service["command"]],
        log=log,
        env={**environment, "VISQ_DEVICE": service["environment"].get("VISQ_DEVICE", "auto")},
    )
    health = health_check(name)
    try:
        until(
            lambda: process.poll() is not None or run(health, environment).returncode == 0,
            90,
            f"{name} to be healthy",
            every=0.2,
        )
        assert process.poll() is None, log.read_text()
        yield
    finally:
        ended_by_itself = end(process, 40)
    assert ended_by_itself
    # uvicorn ends itself by the signal once it has shut down in order.
    assert process.returncode in (0, -signal.SIGTERM), log.read_text()


def health_check(name: str) -> list[str]:
    """The health check's command of a service, in the compose file or in its image."""
    if "healthcheck" in SERVICES[name]:
        kind, *command = SERVICES[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return list(command)
    checks = [rest for instruction, rest in dockerfile() if instruction == "HEALTHCHECK"]
    target = SERVICES[name]["build"]["target"]
    (check,) = [check for check in checks if f'"{target}"' in check]
    return list(yaml.safe_load(check.split("CMD ", 1)[1]))


@pytest.mark.timeout(300)
def test_the_commands_of_the_compose_file_run_and_stop(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert ("ENTRYPOINT", '["visq"]') in dockerfile()
    migrated = run(["visq", *SERVICES["migrate"]["command"]], environment)
    assert migrated.returncode == 0, migrated.stderr
    assert run(health_check("api"), environment).returncode == 1
    assert run(health_check("worker-cpu"), environment).returncode == 1
    with (
        running("api", environment, tmp_path / "api.log"),
        running("worker-cpu", environment, tmp_path / "worker.log"),
    ):
        pass
