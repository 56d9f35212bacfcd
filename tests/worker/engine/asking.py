"""Short ways to write requests in tests."""

from __future__ import annotations

from typing import Any

from visq.pixels import PixelBuffer
from visq.types import (
    GenerationConfig,
    ImagePart,
    ImageUrl,
    Lane,
    Message,
    TextPart,
)
from worker.engine.face import EngineRequest, Failed, Finished, Outcome


def ask(
    text: str = "Hello",
    *images: PixelBuffer,
    do_preprocess: bool = True,
    lane: Lane = Lane.INTERACTIVE,
    deadline: float | None = None,
    adapter: str | None = None,
    **gen_config: Any,
) -> EngineRequest:
    """A request of one message: `images`, then `text`."""
    parts: list[TextPart | ImagePart] = [image_part() for _ in images]
    return EngineRequest(
        id="test",
        messages=[Message(role="user", content=[*parts, TextPart(text=text)])],
        images=list(images),
        gen_config=GenerationConfig(**{"max_new_tokens": 24, **gen_config}),
        do_preprocess=do_preprocess,
        adapter_name=adapter,
        lane=lane,
        deadline_seconds=deadline,
    )


def image_part() -> ImagePart:
    return ImagePart(image_url=ImageUrl(url="s3://bucket/key"))


def finished(outcome: Outcome) -> Finished:
    assert isinstance(outcome, Finished), outcome
    return outcome


def failed(outcome: Outcome) -> Failed:
    assert isinstance(outcome, Failed), outcome
    return outcome
