"""`GenerationConfig` as a program has it: the JSON form of `visq.types`, and what JSON cannot
hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import ConfigDict, ValidationError, model_validator

from visq import types
from visq.pipeline.prompts import PromptError

LogitsProcessor = Callable[[Any, Any], Any]
"""From the token ids so far and the logits of the next token (both torch) to other logits."""

_NEVER: Final[Mapping[str, object]] = {
    "output_last_hidden_state": None,
    "with_cache": False,
    "preserve_cache": False,
    "migration_request": None,
    "return_routed_experts": False,
}
"""Fields of LMDeploy that visq has not, with the only value that it takes for them."""


class GenerationConfig(types.GenerationConfig):
    """How to generate; names and defaults of LMDeploy's ``GenerationConfig``.

    A value that is out of range, and a field that visq does not have, is a ``ValueError`` (of
    pydantic) that names the field.
    """

    model_config = ConfigDict(validate_assignment=True, arbitrary_types_allowed=True)

    logits_processors: list[LogitsProcessor] | None = None
    """Functions that change the logits before the sampling, in their order."""

    @model_validator(mode="before")
    @classmethod
    def _as_lmdeploy(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, only in _NEVER.items():
            if values.pop(name, only) != only:
                raise ValueError(f"visq does not support `{name}`; leave it at {only!r}")
        ngram = ("repetition_ngram_size", "repetition_ngram_threshold")
        given = [values[name] for name in ngram if name in values]
        if given and (len(given) < 2 or any(isinstance(n, int) and n <= 0 for n in given)):
            values |= dict.fromkeys(ngram, 0)  # one without the other means neither
        return values

    def as_json_form(self) -> types.GenerationConfig:
        """All of it but the functions."""
        fields = self.model_dump(exclude={"logits_processors"}, exclude_unset=True)
        return types.GenerationConfig.model_validate(fields)


GenConfig = GenerationConfig | types.GenerationConfig | Mapping[str, Any]
"""What a ``gen_config`` argument may be."""


def config_for_each(
    gen_config: GenConfig | Sequence[GenConfig] | None, prompts: int
) -> list[GenerationConfig]:
    """One config for each prompt.

    :raises ValueError: a list of another length; a config that does not fit.
    """
    if isinstance(gen_config, Sequence):
        if len(gen_config) != prompts:
            raise PromptError(
                f"`gen_config` has {len(gen_config)} entries for {prompts} prompts: give one for "
                "all, or a list with one for each",
                param="gen_config",
            )
        return [as_config(config) for config in gen_config]
    return [as_config(gen_config)] * prompts


def as_config(config: GenConfig | None) -> GenerationConfig:
    """:raises InvalidRequest: it is none, or a field does not fit."""
    if config is None:
        return GenerationConfig()
    if isinstance(config, GenerationConfig):
        return config
    if isinstance(config, types.GenerationConfig):
        config = config.model_dump(exclude_unset=True)
    if not isinstance(config, Mapping):
        raise PromptError(
            f"`gen_config` is a GenerationConfig, not {type(config).__name__}", param="gen_config"
        )
    try:
        return GenerationConfig(**config)
    except ValidationError as error:
        raise PromptError(f"gen_config: {first_fault(error)}", param="gen_config") from None


def with_stop_words(config: GenerationConfig, words: Sequence[str]) -> GenerationConfig:
    """`config` with the stop words of the chat template beside its own."""
    if not words:
        return config
    return config.model_copy(update={"stop_words": [*(config.stop_words or []), *words]})


def first_fault(error: ValidationError) -> str:
    """What pydantic has to say, in a line, without the value (which may be a picture)."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
