"""`pipeline`: the way in."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from visq import rooms

if TYPE_CHECKING:
    from visq.pipeline.configs import (
        ChatTemplateConfig,
        PytorchEngineConfig,
        SpeculativeConfig,
        TurbomindEngineConfig,
    )
    from visq.pipeline.local import Pipeline
    from worker.engine.config import EngineConfig


def pipeline(
    model_path: str | os.PathLike[str],
    backend_config: TurbomindEngineConfig | PytorchEngineConfig | EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: SpeculativeConfig | None = None,
    allowed_media_domains: Collection[str] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Load a model into this program.

    ::

        pipe = visq.pipeline("OpenGVLab/InternVL3-2B-hf")
        print(pipe(("describe this image", visq.load_image("photo.jpg"))).text)

    :param model_path: a folder, a name that transformers loads, or ``small``: the model that ships
        with visq.
    :param backend_config: our `EngineConfig`, or one of LMDeploy's, whose fields are taken for
        ours (docs/pipeline.md says how).
    :param chat_template_config: `ChatTemplateConfig.meta_instruction` and `.stop_words` count.
    :param log_level: of visq's loggers.
    :param max_log_len: no effect: prompts are not logged.
    :param trust_remote_code: no effect: visq never runs a model's own code.
    :param speculative_config: must be ``None``.
    :param allowed_media_domains: hosts that image URLs in prompts may lead to; by default all that
        are public.
    :param kwargs: ``vision_config``, without effect.
    :raises ConfigurationError: the model cannot be loaded, or a field cannot be honoured.
    """
    rooms.mount(guest=True)
    from visq.pipeline.local import Pipeline

    return Pipeline(
        model_path,
        backend_config,
        chat_template_config,
        log_level,
        max_log_len,
        trust_remote_code,
        speculative_config,
        allowed_media_domains,
        **kwargs,
    )
