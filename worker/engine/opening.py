"""Opens the engine that fits a model: the native one where it can serve it, else `generate`."""

from __future__ import annotations

import logging
from typing import TypeAlias

from visq.errors import ConfigurationError
from worker.engine.config import EngineConfig
from worker.engine.families import family_of
from worker.engine.generate import GenerateEngine
from worker.engine.loading import load
from worker.engine.native import NativeEngine
from worker.engine.probe import refusal

LocalEngine: TypeAlias = NativeEngine | GenerateEngine
"""An engine in this process."""

logger = logging.getLogger(__name__)


def open_engine(config: EngineConfig) -> LocalEngine:
    """Load a model and start its engine in this process.

    :raises ConfigurationError: if the model cannot be loaded, or ``config.engine`` is ``native``
        and the native engine cannot serve it; if there are adapters, and it is not served by the
        native engine, or one that is to be loaded at the start cannot be used.
    """
    loaded = load(config)
    family = None
    if config.engine != "generate":
        family = family_of(loaded.model, loaded.processor)
    if family is not None and (reason := refusal(loaded, family)) is not None:
        logger.warning("the model %s runs on transformers' generate: %s", loaded.name, reason)
        family = None
    if family is not None:
        return NativeEngine(loaded, family, config)
    if config.engine == "native":
        raise ConfigurationError(
            f"VISQ_MODEL={config.model}: the native engine cannot serve this model of type "
            f"{loaded.model.config.model_type} (the log says why); use the engine `generate`"
        )
    if config.adapters:
        raise ConfigurationError(
            f"VISQ_MODEL={config.model}: adapters need the native engine, but this model is served "
            "by the engine `generate`"
        )
    if config.engine == "auto":
        logger.warning(
            "the model %s (%s) is served by the slow engine `generate`, one request after another",
            loaded.name,
            loaded.model.config.model_type,
        )
    return GenerateEngine(loaded)
