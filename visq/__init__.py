"""visq: vision-language models behind a message queue, and the same engine as a library.

A plain install is the client and the consumer; the servers come with the extras ``api``, ``worker``
and ``all``. Names are imported when they are first used, so ``import visq`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from visq.client import AsyncClient, Client
    from visq.consumer import Event, consume
    from visq.consumer_dead import bring_back
    from visq.errors import VisqError
    from visq.pipeline import (
        ChatTemplateConfig,
        EngineConfig,
        GenerationConfig,
        Pipeline,
        PytorchEngineConfig,
        RemotePipeline,
        Response,
        SpeculativeConfig,
        TurbomindEngineConfig,
        VisionConfig,
        pipeline,
    )
    from visq.settings import Settings
    from visq.vl import load_image

__version__: Final = "0.1.0"

__all__ = [
    "AsyncClient",
    "ChatTemplateConfig",
    "Client",
    "EngineConfig",
    "Event",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "RemotePipeline",
    "Response",
    "Settings",
    "SpeculativeConfig",
    "TurbomindEngineConfig",
    "VisionConfig",
    "VisqError",
    "bring_back",
    "consume",
    "load_image",
    "pipeline",
]

_HOMES: Final = {
    "AsyncClient": "visq.client",
    "ChatTemplateConfig": "visq.pipeline",
    "Client": "visq.client",
    "EngineConfig": "visq.pipeline",
    "Event": "visq.consumer",
    "GenerationConfig": "visq.pipeline",
    "Pipeline": "visq.pipeline",
    "PytorchEngineConfig": "visq.pipeline",
    "RemotePipeline": "visq.pipeline",
    "Response": "visq.pipeline",
    "Settings": "visq.settings",
    "SpeculativeConfig": "visq.pipeline",
    "TurbomindEngineConfig": "visq.pipeline",
    "VisionConfig": "visq.pipeline",
    "VisqError": "visq.errors",
    "bring_back": "visq.consumer_dead",
    "consume": "visq.consumer",
    "load_image": "visq.vl",
    "pipeline": "visq.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
