"""What becomes of each field of LMDeploy's configs: ours, nothing, or a refusal by name.

A field that is left at LMDeploy's default leaves ours at our default. So prefix caching stays on
although LMDeploy's default is off: it changes no answer. Whoever wants it off gives our own
`EngineConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from visq import rooms
from visq.errors import ConfigurationError
from visq.pipeline.configs import ChatTemplateConfig, PytorchEngineConfig, TurbomindEngineConfig

if TYPE_CHECKING:
    from worker.engine.config import EngineConfig

OURS: Final[Mapping[str, str]] = {
    "dtype": "dtype",
    "device_type": "device",
    "session_len": "session_len",
    "max_batch_size": "max_batch_size",
    "max_prefill_token_num": "max_step_tokens",
    "cache_max_entry_count": "gpu_memory_utilization",
    "block_size": "block_size",
    "cache_block_seq_len": "block_size",
    "enable_prefix_caching": "prefix_caching",
    "adapters": "adapters",
    "eager_mode": "eager_mode",
}
"""LMDeploy's field -> that of `EngineConfig`."""

ACCEPTED: Final = frozenset(
    {
        # How LMDeploy's own engine schedules, caches and measures; no answer depends on it.
        "async_",
        "cache_checkpoint_interval",
        "cache_chunk_size",
        "cache_generation",
        "cache_prompt",
        "cache_prompt_boundary_skip",
        "communicator",
        "cudagraph_capture_batch_sizes",
        "enable_metrics",
        "enable_mp_engine",
        "kernel_block_size",
        "max_prefill_iters",
        "mp_engine_backend",
        "num_tokens_per_iter",
        "prefill_interval",
        "prefix_cache_decode_state_interval",
        "prefix_cache_state_budget",
        "thread_safe",
    }
)
"""Fields that have no effect."""

ONLY: Final[Mapping[str, tuple[object, ...]]] = {
    "model_format": ("hf",),
    "devices": ([0],),
    "logprobs_mode": ("raw_logprobs",),
    "device_type": ("cpu", "cuda"),
    "dtype": ("float16", "bfloat16", "float32"),
}
"""Fields of which these values, beside the default, can be honoured. Fields that stand nowhere in
these tables can only be left at their default."""

_ADVICE: Final[Mapping[str, str]] = {
    "tp": "; visq runs a model on one GPU, and as many workers as there are GPUs",
    "quant_policy": "; its KV cache is not quantised",
    "revision": "; download that revision and give its folder as `model_path`",
    "download_dir": "; download the model and give its folder as `model_path`",
    "model_format": "; give the model in Hugging Face's format",
}

_TEMPLATE_HONOURED: Final = frozenset({"model_name", "meta_instruction", "stop_words"})


def engine_config(model_path: str, config: Any, log_level: str) -> EngineConfig:
    """What the engine is started with.

    :param config: one of LMDeploy's configs, our own, or ``None``.
    :raises ConfigurationError: naming a field that cannot be honoured.
    """
    rooms.mount(guest=True)
    from worker.engine.config import EngineConfig

    # Processes of its own would each run the caller's script once more, if it lacks the usual
    # ``if __name__ == "__main__"``: only who asks for them gets them.
    if isinstance(config, EngineConfig):
        return dataclasses.replace(config, model=model_path, preparers=config.preparers or 0)
    ours: dict[str, Any] = {"model": model_path, "log_level": log_level, "preparers": 0}
    if config is None:
        return EngineConfig(**ours)
    if not isinstance(config, TurbomindEngineConfig | PytorchEngineConfig):
        raise ConfigurationError(
            "`backend_config` is a TurbomindEngineConfig, PytorchEngineConfig or EngineConfig, "
            f"not {type(config).__name__}"
        )
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in _given(config).items():
        if name in ACCEPTED:
            continue
        target = OURS.get(name)
        honoured = target in known if name in OURS else name in ONLY
        if not honoured or (name in ONLY and value not in ONLY[name]):
            raise _refusal(type(config).__name__, name, value)
        if target is not None:
            ours[target] = _checked(type(config).__name__, name, value)
    return EngineConfig(**ours)


def check_template(config: ChatTemplateConfig | None) -> None:
    """:raises ConfigurationError: naming a field that cannot be honoured."""
    for name, value in {} if config is None else _given(config).items():
        if name in _TEMPLATE_HONOURED or (name == "capability" and value == "chat"):
            continue
        raise ConfigurationError(
            f"ChatTemplateConfig.{name} cannot be honoured: visq uses the model's own chat "
            "template; put yours into the model's folder as `chat_template.jinja`, or send raw "
            "prompts with `do_preprocess=False`"
        )


def _given(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }


def _checked(config: str, name: str, value: Any) -> Any:
    positive = name in ("session_len", "max_batch_size", "max_prefill_token_num", "block_size")
    if positive and (not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{config}.{name} is a whole number from 1, not {value!r}")
    if name == "cache_max_entry_count" and not (isinstance(value, float) and 0 < value < 1):
        raise ConfigurationError(f"{config}.{name} is a share between 0 and 1, not {value!r}")
    return value


def _refusal(config: str, name: str, value: object) -> ConfigurationError:
    if name in ONLY:
        values = ", ".join(map(repr, ONLY[name]))
        advice = _ADVICE.get(name, "")
        return ConfigurationError(f"{config}.{name}={value!r} is not one of {values}{advice}")
    return ConfigurationError(
        f"{config}.{name}={value!r} cannot be honoured{_ADVICE.get(name, '')}; leave it out"
    )
