"""Loads a model's processor, without its video part where torchvision is missing.

The processors of half of the families have a part for videos, which transformers loads with
torchvision only; visq shows models no videos. Everything else works without torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


def load_processor(source: str | Path) -> Any:
    """Load the processor of the vision-language model at `source` (a folder or a name).

    :raises ImportError: if another part of it needs a package that is not installed.
    :raises OSError: if there is no processor.
    :raises ValueError: if it is of an unknown kind.
    """
    try:
        return AutoProcessor.from_pretrained(source)
    except (ImportError, ValueError):  # they say both of a missing torchvision
        config = AutoConfig.from_pretrained(source)
        kind = PROCESSOR_MAPPING.get(type(config), None)
        if is_torchvision_available() or kind is None or "video_processor" not in _parts(kind):
            raise
        return _without_video(kind).from_pretrained(source)


def _parts(kind: Any) -> list[str]:
    return list(kind.get_attributes())


def _without_video(kind: Any) -> Any:
    """A subclass of the processor class `kind` that has no video part."""

    def get_attributes(cls: type[Any]) -> list[str]:
        return [part for part in _parts(kind) if part != "video_processor"]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})
