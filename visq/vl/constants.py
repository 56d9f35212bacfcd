"""Names that prompts about pictures use."""

from __future__ import annotations

from typing import Final

IMAGE_TOKEN: Final = "<IMAGE_TOKEN>"
"""Stands for an image inside a text: the first one for the message's first image, and so on."""
