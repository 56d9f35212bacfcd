"""Where the server rooms (`api`, `models`, `worker`, `migrations`) are; how to import them.

In a checkout they are top-level packages beside `visq`. In the wheel they lie in ``visq/_rooms``,
so that ``pip install visq`` puts nothing but `visq` into site-packages
(docs/decisions/001-packaging.md). A server command mounts them first; so does code of `visq` that
runs the engine in somebody else's program.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from visq.errors import ConfigurationError

ROOMS: Final = ("api", "migrations", "models", "worker")


def folder() -> Path:
    """Return the folder that holds the rooms."""
    package = Path(__file__).resolve().parent
    bundled = package / "_rooms"
    return bundled if bundled.is_dir() else package.parent


def mount(*, guest: bool = False) -> None:
    """Make the rooms importable in this process, and in those that it spawns; repeatable.

    :param guest: the process is somebody else's program (a notebook, a web service). It may have
        a package `models` of its own: say so instead of hiding it.
    :raises ConfigurationError: if another package stands where a room should.
    """
    home = folder()
    if str(home) not in sys.path:
        sys.path.insert(len(sys.path) if guest else 0, str(home))
    for room in ROOMS:
        spec = find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != home / room / "__init__.py":
            raise ConfigurationError(
                f"visq needs the name `{room}` for its own package, but this program has another "
                f"one ({found or 'a namespace package'}); run visq in a process of its own"
            )
