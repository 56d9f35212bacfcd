"""What an engine is told at its start; a small part of `visq.settings`, without secrets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from visq.errors import ConfigurationError
from visq.settings import Settings

SMALL_MODEL: Final = Path(__file__).resolve().parent.parent / "small_model"
"""Folder of the model that ships with visq."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model to load, and where."""

    model: str = "small"
    """``small``, a folder, or a name that transformers loads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0
    """CPU threads; 0: torch's own choice."""
    log_level: str = "INFO"

    @classmethod
    def from_settings(cls, settings: Settings) -> EngineConfig:
        return cls(
            model=settings.model,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.engine_threads,
            log_level=settings.log_level,
        )

    @property
    def source(self) -> str:
        """Folder or name of the model, for transformers."""
        return str(SMALL_MODEL) if self.model == "small" else self.model

    def check(self) -> None:
        """Say plainly that a folder holds no model, before transformers asks the hub for its name.

        :raises ConfigurationError: naming the folder.
        """
        folder = Path(self.source)
        is_folder = folder.exists() or self.source.startswith((".", "/"))
        if is_folder and not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"VISQ_MODEL={self.model}: the folder {folder} holds no model (no config.json)"
            )
