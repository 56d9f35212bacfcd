"""Child processes that never outlive their owner, and free ports for them.

On Linux the kernel itself signals the child when its owner dies, even by ``kill -9``. Elsewhere a
child is ended only by an orderly stop of its owner.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1

# Loaded before any fork: a child between fork and exec must not load a library.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def start_tethered(
    command: Sequence[str | Path],
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own; it gets `death_signal` when this thread ends.

    The kernel ties the signal to the *thread* that starts the child: call this from the main
    thread, or from one that lives as long as the child.

    :param log: file that its output is appended to; None: inherited.
    :param env: its whole environment; None: ours.
    :param popen: more arguments of :class:`subprocess.Popen` (``user``, ``group``, ``cwd``).
    """
    owner = os.getpid()

    def tether() -> None:
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, int(death_signal))
            if os.getppid() != owner:  # it died before the call above
                os._exit(1)

    arguments = [str(part) for part in command]
    if log is None:
        return subprocess.Popen(
            arguments, env=env, preexec_fn=tether, start_new_session=True, **popen
        )
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            env=env,
            preexec_fn=tether,
            start_new_session=True,  # Ctrl-C in the terminal reaches the owner only
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **popen,
        )


def end(
    process: subprocess.Popen[bytes], seconds: float, ask: signal.Signals = signal.SIGTERM
) -> bool:
    """Ask `process` to end and wait; after `seconds` kill it with its whole session.

    Returns whether it ended by itself.
    """
    if process.poll() is None:
        process.send_signal(ask)
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(
    ready: Callable[[], bool],
    seconds: float,
    *,
    process: subprocess.Popen[bytes] | None = None,
    every: float = 0.01,
) -> bool:
    """Poll `ready` until it is true; False after `seconds` or when `process` has ended."""
    deadline = time.monotonic() + seconds
    while not ready():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def free_port(wanted: int = 0, host: str = "127.0.0.1") -> int:
    """Return `wanted` if nothing listens there, else a free port."""
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {host}")
