"""Settings: what the environment may say, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from visq.errors import ConfigurationError
from visq.settings import Settings, parse_api_keys


def test_each_name_in_the_keys_is_a_tenant() -> None:
    assert parse_api_keys(" acme:s3cret:with:colons , other-1:x ") == {
        "acme": "s3cret:with:colons",
        "other-1": "x",
    }
    assert parse_api_keys("") == {}


@pytest.mark.parametrize(
    "keys", ["acme", "acme:", ":secret", "a b:x", "a.b:x", "äcme:x", "a:x,a:y", "a" * 65 + ":x"]
)
def test_keys_that_cannot_name_a_tenant_are_refused(keys: str) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_API_KEYS"):
        parse_api_keys(keys)


def test_what_is_not_set_lies_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VISQ_DATABASE_URL", "VISQ_OBJECT_STORE"):
        monkeypatch.delenv(name, raising=False)
    settings = Settings(data=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/visq.db"
    assert settings.objects == (tmp_path / "objects").as_uri()


def test_secrets_are_not_in_the_printed_settings() -> None:
    settings = Settings.model_validate({"api_keys": "acme:very-secret"})
    assert "very-secret" not in repr(settings)


def test_adapters_are_names_and_folders() -> None:
    settings = Settings(adapters=" legal=/models/legal , x = loras/a=b ")
    assert settings.adapter_folders == {"legal": "/models/legal", "x": "loras/a=b"}
    assert Settings().adapter_folders == {}


@pytest.mark.parametrize("adapters", ["legal", "legal=", "=/folder", "a=/x,a=/y"])
def test_adapters_without_a_name_or_folder_are_refused(adapters: str) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_ADAPTERS"):
        Settings(adapters=adapters)
