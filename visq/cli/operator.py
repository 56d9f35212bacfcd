"""What the operators' commands (``doctor``, ``dead``) share: which servers they ask, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from pydantic import SecretStr

from visq.cli.console import load_settings, mount_rooms
from visq.embedded.connection import ConnectionInfo
from visq.errors import ConfigurationError
from visq.settings import Settings

if TYPE_CHECKING:
    import redis

    from models.database import Database

SOCKET_SECONDS: Final = 5.0

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Data folder of the embedded stack.", envvar="VISQ_DATA"),
]


def operator_settings(data: Path | None) -> Settings:
    """The settings; what is not set is that of the `visq up` that runs on the data folder.

    :raises ConfigurationError: a setting cannot be used.
    """
    settings = load_settings(data=data)
    running = ConnectionInfo.read(settings.data)
    if running is None:
        return settings
    found = {"redis_url": running.redis_url, "broker_url": running.broker_url}
    return settings.model_copy(
        update={
            name: SecretStr(url)
            for name, url in found.items()
            if name not in settings.model_fields_set
        }
    )


@contextmanager
def operator_database(settings: Settings) -> Iterator[Database]:
    """The database, past the API: every tenant's rows.

    :raises ConfigurationError: it is not there, or not at the revision of this visq.
    :raises Unavailable: it does not answer.
    """
    mount_rooms("api", "sqlalchemy")
    from models import checkup, revision

    try:
        database = checkup.connect(settings.database)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error.message}: {WHICH_DATABASE}") from error
    try:
        if checkup.ask_revision(database) != revision.REVISION:
            database.read(revision.check)
        yield database
    finally:
        database.close()


def redis_client(url: str, variable: str) -> redis.Redis:
    """A client that waits no longer than `SOCKET_SECONDS`.

    :param variable: the name of the setting, for the error.
    :raises ConfigurationError: it is no URL of a Redis.
    """
    import redis

    try:
        return redis.Redis.from_url(
            url, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
        )
    except ValueError as error:
        raise ConfigurationError(f"{variable}: {error}") from error


WHICH_DATABASE = "name the folder of a `visq up` with --data, or set VISQ_DATABASE_URL"
