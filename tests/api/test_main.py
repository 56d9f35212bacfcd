"""How the API starts, and when it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.main import check_keys, serve
from tests.api.conftest import settings_for
from tests.servers import Valkey
from visq.embedded.processes import free_port
from visq.errors import ConfigurationError, Unavailable
from visq.settings import Settings


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::", "api.example.org"])
def test_it_does_not_listen_without_keys(host: str) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_API_KEYS"):
        serve(Settings(host=host))


def test_it_listens_anywhere_with_keys() -> None:
    check_keys(Settings(host="0.0.0.0", api_keys="demo:secret"))


def test_it_says_that_the_database_must_be_migrated(
    database_url: str, valkey: Valkey, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="visq migrate"):
        serve(settings_for(database_url, valkey.url, tmp_path))


def test_it_says_that_the_database_does_not_answer(valkey: Valkey, tmp_path: Path) -> None:
    url = f"postgresql://postgres@127.0.0.1:{free_port()}/visq"
    with pytest.raises(Unavailable, match="database"):
        serve(settings_for(url, valkey.url, tmp_path))
