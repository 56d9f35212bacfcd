"""What all commands share: the console, and how settings are read and server code is found."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from rich.console import Console

from visq.errors import ConfigurationError
from visq.settings import Settings

console = Console(highlight=False)
"""For what a command answers."""

errors = Console(stderr=True, highlight=False)
"""For what went wrong."""


def load_settings(**given: Any) -> Settings:
    """Read the settings from the environment; those in `given` that are not None go first.

    :raises ConfigurationError: names each variable that cannot be used, but not its value.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = "; ".join(
            f"VISQ_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"settings: {wrong}") from None


def mount_rooms(extra: str, needed: str) -> None:
    """Make the server rooms importable.

    :raises ConfigurationError: the module `needed` is missing; names the extra that has it.
    """
    from importlib.util import find_spec

    from visq import rooms

    if find_spec(needed) is None:
        raise ConfigurationError(f"this command needs the extra: pip install 'visq[{extra}]'")
    rooms.mount()
