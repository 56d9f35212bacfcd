"""LMDeploy's Pipeline on visq's engine, in this program or behind the queue.

================ =========================================================================
`api`, `local`   ``pipeline(...)``, and the `Pipeline` that it returns: an engine in here
`remote`         `RemotePipeline`: the same face over the queue
`base`           the forms of a call, which both have
`prompts`        the forms of a prompt
`session`        `Session`, for ``chat``
`response`       `Response`; `collecting` makes it of an engine's events
`flight`         requests on their way through an engine
`generation`     `GenerationConfig`
`configs`        LMDeploy's configs; `mapping` says what becomes of each field
================ =========================================================================

The module can be called: ``visq.pipeline(...)`` is ``visq.pipeline.pipeline(...)``, so that
``from visq import pipeline`` gives something to call whatever was imported before.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from visq.pipeline.api import pipeline

if TYPE_CHECKING:
    from visq.pipeline.configs import (
        ChatTemplateConfig,
        PytorchEngineConfig,
        SpeculativeConfig,
        TurbomindEngineConfig,
        VisionConfig,
    )
    from visq.pipeline.generation import GenerationConfig
    from visq.pipeline.local import Pipeline
    from visq.pipeline.remote import RemotePipeline
    from visq.pipeline.response import Response
    from visq.pipeline.session import RequestConflict, Session
    from worker.engine.config import EngineConfig

__all__ = [
    "ChatTemplateConfig",
    "EngineConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "RemotePipeline",
    "RequestConflict",
    "Response",
    "Session",
    "SpeculativeConfig",
    "TurbomindEngineConfig",
    "VisionConfig",
    "pipeline",
]

_HOMES: Final = {
    "ChatTemplateConfig": "visq.pipeline.configs",
    "EngineConfig": "worker.engine.config",
    "GenerationConfig": "visq.pipeline.generation",
    "Pipeline": "visq.pipeline.local",
    "PytorchEngineConfig": "visq.pipeline.configs",
    "RemotePipeline": "visq.pipeline.remote",
    "RequestConflict": "visq.pipeline.session",
    "Response": "visq.pipeline.response",
    "Session": "visq.pipeline.session",
    "SpeculativeConfig": "visq.pipeline.configs",
    "TurbomindEngineConfig": "visq.pipeline.configs",
    "VisionConfig": "visq.pipeline.configs",
}
_ENGINE: Final = frozenset({"EngineConfig", "Pipeline"})
"""Names that need the server rooms."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visq.pipeline' has no attribute {name!r}")
    if name in _ENGINE:
        from visq import rooms

        rooms.mount(guest=True)
    return getattr(import_module(_HOMES[name]), name)


class _Callable(ModuleType):
    __call__ = staticmethod(pipeline)


sys.modules[__name__].__class__ = _Callable
