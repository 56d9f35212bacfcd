"""The inference engine: a library of its own, without Celery, SQL, S3 or HTTP.

`worker.engine.face` says what every engine does; `start_engine` starts one.
"""

from __future__ import annotations

from visq.settings import Settings
from worker.engine.config import EngineConfig
from worker.engine.face import Engine
from worker.engine.process import ProcessEngine

__all__ = ["Engine", "start_engine"]


def start_engine(settings: Settings) -> ProcessEngine:
    """Start the engine that `settings` ask for, in a process of its own, with its model loaded.

    :raises ConfigurationError: if the model cannot be loaded.
    """
    return ProcessEngine(EngineConfig.from_settings(settings))
