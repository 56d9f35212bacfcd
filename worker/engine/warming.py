"""What an engine does on CUDA before its first request, so that hardly any has to wait for it: only
graphs for contexts beyond 4,096 tokens are made when the first one comes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch

from worker.engine.families.base import Family
from worker.engine.runner import Runner
from worker.engine.scheduler import Limits

logger = logging.getLogger(__name__)

SIDE: Final = 448
"""Of the picture that is encoded, in pixels."""


def warm_up(runner: Runner, family: Family, limits: Limits, max_context: int) -> None:
    """Compile and capture, and say so: the first start on a machine takes a minute or two, later
    ones find the compiled code (``TORCHINDUCTOR_CACHE_DIR``, ``TRITON_CACHE_DIR``)."""
    with _told("the decoder: prompts"):
        for tokens in (1, 64, limits.max_step_tokens):
            runner.warm_up(tokens)
    if family.image_token_id is not None:
        with _told("the vision tower"):
            picture = family.prepare_image(np.zeros((SIDE, SIDE, 3), dtype=np.uint8))
            most = max(1, limits.max_encode_tokens // len(picture.token_ids))
            for count in (1, most):
                family.image_features([picture] * count)
    if runner.prefiller is not None:
        with _told("the decoder: CUDA graphs for short prompts"):
            runner.prefiller.warm_up(limits.max_step_tokens)
    if runner.decoder is not None:
        with _told("the decoder: CUDA graphs for single tokens"):
            runner.decoder.warm_up(limits.max_sequences, max_context)


@contextmanager
def _told(what: str) -> Iterator[None]:
    logger.info("warming up %s", what)
    begun = time.monotonic()
    yield
    torch.cuda.synchronize()
    logger.info("warmed up %s in %.1f s", what, time.monotonic() - begun)
