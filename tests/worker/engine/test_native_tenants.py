"""Nothing of a former tenant reaches the next one: not its parameters, numbers, or pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.models import IMAGE
from tests.worker.engine.native_engines import engine_for, known, outcome_of
from visq.errors import ImageChanged
from visq.pixels import PixelBuffer
from worker.engine.face import EngineRequest, KnownImage
from worker.engine.native import NativeEngine

Picture = Callable[[int], PixelBuffer]


@dataclass
class Overflowing:
    """A decoder whose numbers overflow when it sees position `at`, as those of float16 may."""

    decoder: Any
    at: int

    def __call__(self, *, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        if (kwargs["position_ids"] == self.at).any():
            inputs_embeds = inputs_embeds * float("nan")
        return self.decoder(inputs_embeds=inputs_embeds, **kwargs)


def answer_of(engine: NativeEngine, request: EngineRequest) -> list[int]:
    return finished(outcome_of(engine.submit(request))).token_ids


@pytest.mark.parametrize("chunk", [512, 24], ids=["whole prompts", "prompts in chunks"])
def test_numbers_that_overflowed_in_a_block_do_not_reach_its_next_owner(
    text_model: Path, chunk: int
) -> None:
    engine = engine_for(
        text_model, block_size=16, blocks=12, prefix_caching=False, max_step_tokens=chunk
    )
    try:
        request = ask("hello", max_new_tokens=20, ignore_eos=True)
        answer = answer_of(engine, request)
        engine._family.decoder = Overflowing(engine._family.decoder, at=100)
        answer_of(engine, replace(ask("x" * 120, max_new_tokens=3), cache_salt="evil"))
        assert engine._cache.pool.isnan().any()
        assert answer_of(engine, request) == answer
    finally:
        engine.close()


def test_a_slot_does_not_keep_the_parameters_of_the_one_who_had_it_before(
    vision_model: Path, picture: Picture
) -> None:
    # A prompt that begins with a known picture is admitted before it has anything to compute.
    shown = ask(f"{IMAGE}What?", picture(1), do_preprocess=False, max_new_tokens=8)
    engine = engine_for(vision_model, max_batch_size=1)
    try:
        answer = answer_of(engine, shown)
        answer_of(engine, ask("secret", bad_token_ids=answer, max_new_tokens=3))
        engine._vision.clear()
        again = replace(shown, images=[known(picture(1), [])], cache_salt="another")
        assert answer_of(engine, again) == answer
    finally:
        engine.close()


def test_a_picture_that_is_not_the_one_that_it_is_said_to_be_is_refused_and_not_kept(
    vision_model: Path, picture: Picture
) -> None:
    engine = engine_for(vision_model)
    try:
        right, wrong = picture(1), picture(2)
        assert (right.height, right.width) == (wrong.height, wrong.width)
        request = ask("What?", right, max_new_tokens=4)
        lying = KnownImage(right.sha256, right.height, right.width, lambda: wrong)
        refused = outcome_of(engine.submit(replace(request, images=[lying])))
        assert isinstance(failed(refused).error, ImageChanged)
        assert engine.stats().vision_bytes == 0
        after = answer_of(engine, request)
    finally:
        engine.close()
    engine = engine_for(vision_model)
    try:
        assert answer_of(engine, request) == after
    finally:
        engine.close()
