"""The settings as a person may see them: secrets hidden, defaults worked out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from visq.settings import Settings

HIDDEN: Final = "********"
_URL_PASSWORD: Final = re.compile(r"(?<=://)([^:/@]*):(.*)@")
_QUERY_SECRET: Final = re.compile(r"(?i)\b([\w-]*(?:password|secret|token)[\w-]*=)[^&]+")


@dataclass(frozen=True)
class Row:
    variable: str
    value: str
    meaning: str
    is_set: bool
    """Whether it was given (in the environment or by the command), not defaulted."""


def shown(settings: Settings) -> list[Row]:
    """Return one row a setting, in the order of the class."""
    return [
        Row(
            variable=f"VISQ_{name.upper()}",
            value=_value(settings, name),
            meaning=(field.description or "").strip(),
            is_set=name in settings.model_fields_set,
        )
        for name, field in Settings.model_fields.items()
    ]


def _value(settings: Settings, name: str) -> str:
    if name == "database_url":
        return hide_password(settings.database)
    if name == "object_store":
        return settings.objects
    if name == "api_keys":
        return ",".join(f"{tenant}:{HIDDEN}" for tenant in settings.tenants)
    value = getattr(settings, name)
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return hide_password(secret) if "://" in secret else HIDDEN if secret else ""
    return "" if value is None else str(value)


def hide_password(url: str) -> str:
    """Return `url` with the passwords in it replaced; the rest stays readable."""
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", url))
