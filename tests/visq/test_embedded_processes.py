"""Children of the embedded stack end with their owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import until
from visq.embedded.connection import ConnectionInfo, write_secret
from visq.embedded.data_folder import DataFolder
from visq.embedded.processes import end, free_port, start_tethered
from visq.embedded.service import QUICK_DEATHS, Service
from visq.errors import ConfigurationError, Unavailable

FOREVER = [sys.executable, "-c", "import time; time.sleep(600)"]
OWNER = """
import sys, time
from pathlib import Path
from visq.embedded.processes import start_tethered
child = start_tethered([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its owner")
def test_a_child_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(note)])
    try:
        child = int(until(lambda: note.exists() and note.read_text(), 30, "the child's pid"))
        assert alive(child)
    finally:
        owner.kill()
        owner.wait()
    until(lambda: not alive(child), 10, "the child to end")


def test_ending_a_process_that_ignores_the_request_kills_its_whole_session(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    stubborn = (
        "import signal, subprocess, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(inner.pid))\n"
        "time.sleep(600)\n"
    )
    process = start_tethered([sys.executable, "-c", stubborn])
    inner = int(until(lambda: note.exists() and note.read_text(), 30, "the inner process"))

    assert end(process, 0.2) is False
    assert process.returncode == -signal.SIGKILL
    until(lambda: not alive(inner), 10, "the inner process to end")


def test_a_free_port_is_the_wanted_one_unless_it_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_a_service_that_ends_by_itself_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    service = Service("it", FOREVER, log=tmp_path / "log", is_ready=lambda: True)
    service.start()
    try:
        assert service.process is not None
        first = service.process.pid
        service.process.kill()

        def revived() -> bool:
            service.revive(said.append)
            return service.process is not None and service.process.pid != first

        until(revived, 20, "another process")
        assert service.alive
        assert said == ["it ended (signal SIGKILL); starting it again in 0.5 s"]
    finally:
        service.stop()


def test_a_service_that_always_dies_soon_is_given_up_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visq.embedded.service.FIRST_WAIT_SECONDS", 0.001)
    said: list[str] = []
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    service = Service("the worker", command, log=tmp_path / "log", is_ready=lambda: False)
    service.start()
    with pytest.raises(Unavailable, match="no such model"):
        until(lambda: service.revive(said.append), 60, "the service to be given up")
    assert len(said) == QUICK_DEATHS - 1
    assert "exit status 1" in said[0]


def test_a_service_that_does_not_become_ready_is_ended(tmp_path: Path) -> None:
    service = Service(
        "it", FOREVER, log=tmp_path / "log", is_ready=lambda: False, start_seconds=0.1
    )
    service.start()
    process = service.process
    assert process is not None
    with pytest.raises(Unavailable, match="it did not start"):
        service.wait_ready()
    assert process.returncode == -signal.SIGKILL


def test_a_data_folder_serves_one_stack_at_a_time(tmp_path: Path) -> None:
    with DataFolder(tmp_path), pytest.raises(ConfigurationError, match="another `visq up`"):
        DataFolder(tmp_path).__enter__()
    with DataFolder(tmp_path):
        pass


def test_a_data_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="data folder cannot be used"):
        DataFolder(tmp_path / "file" / "data").__enter__()


def test_the_key_of_a_data_folder_is_made_once_and_only_its_owner_can_read_it(
    tmp_path: Path,
) -> None:
    with DataFolder(tmp_path) as folder:
        key = folder.api_key()
    with DataFolder(tmp_path) as folder:
        assert folder.api_key() == key
    assert len(key) >= 40
    assert (tmp_path / "api-key").stat().st_mode & 0o777 == 0o600


def test_a_connection_is_found_only_while_its_process_lives(tmp_path: Path) -> None:
    assert ConnectionInfo.read(tmp_path) is None
    with subprocess.Popen(FOREVER) as process:
        info = ConnectionInfo(
            url="http://127.0.0.1:1",
            api_key="secret",
            redis_url="redis://127.0.0.1:2/0",
            broker_url="redis://127.0.0.1:2/0",
            pid=process.pid,
        )
        info.write(tmp_path)
        assert ConnectionInfo.path(tmp_path).stat().st_mode & 0o777 == 0o600
        assert ConnectionInfo.read(tmp_path) == info
        process.kill()
    assert ConnectionInfo.read(tmp_path) is None


def test_a_secret_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old and readable by all")
    path.chmod(0o644)
    write_secret(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["secret"]
