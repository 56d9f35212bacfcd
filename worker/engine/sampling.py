"""``gen_config`` in the words of transformers' `generate`, or a named refusal.

Order on the logits as in LMDeploy: repetition penalty (over generated tokens), bad words, stop
tokens that may not come yet, temperature, top-k, top-p, min-p. Unlike LMDeploy, the repetition
penalty also counts under greedy decoding, and ``ignore_eos`` still leaves the request its own stop
words.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig as HFGenerationConfig
from transformers import (
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from visq.errors import AdapterNotFound, InvalidRequest, UnsupportedParameter
from visq.types import GenerationConfig
from worker.engine.bad_words import BadWords
from worker.engine.face import EngineRequest
from worker.engine.params import COLDEST


def check(request: EngineRequest, vocab_size: int) -> None:
    """Refuse by name what `generate` cannot honour.

    :raises UnsupportedParameter, AdapterNotFound, InvalidRequest: naming the field.
    """
    config = request.gen_config
    if request.adapter_name is not None:
        raise AdapterNotFound(
            f"this worker has no adapter {request.adapter_name!r} (nor any other)",
            param="adapter_name",
        )
    asked = {
        "n": config.n > 1,
        "logprobs": config.logprobs is not None,
        "response_format": config.response_format is not None,
        "output_logits": config.output_logits is not None,
        "return_ppl": config.return_ppl,
        "logits_processors": bool(request.logits_processors),
        "repetition_ngram_size": config.repetition_ngram_size > 0,
        "repetition_ngram_threshold": config.repetition_ngram_threshold > 0,
    }
    for field, wanted in asked.items():
        if wanted:
            raise UnsupportedParameter(
                f"the engine `generate` of this worker does not support `{field}`",
                param=f"gen_config.{field}",
            )
    _check_token_ids(config, vocab_size)


def _check_token_ids(config: GenerationConfig, vocab_size: int) -> None:
    for field in ("stop_token_ids", "bad_token_ids"):
        for token in getattr(config, field) or ():
            if token >= vocab_size:
                raise InvalidRequest(
                    f"`{field}` has the token {token}, but the model has only {vocab_size}",
                    param=f"gen_config.{field}",
                )
    if len(set(config.bad_token_ids or ())) >= vocab_size:
        raise InvalidRequest("every token is a bad token", param="gen_config.bad_token_ids")


def is_greedy(config: GenerationConfig) -> bool:
    return not config.do_sample or config.temperature < COLDEST


def hf_generation_config(config: GenerationConfig, max_new_tokens: int) -> HFGenerationConfig:
    """The sampling part; end tokens and stop words are the answer's business."""
    fields: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if not is_greedy(config):
        fields |= {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
        }
    return HFGenerationConfig(**fields)


def logits_processors(
    config: GenerationConfig,
    *,
    prompt_tokens: int,
    end_ids: Collection[int],
    stop_ids: Collection[int],
    bad_words: BadWords | None,
    text: Callable[[], str],
) -> LogitsProcessorList:
    """What changes the logits before the sampling.

    :param end_ids: the model's end tokens.
    :param stop_ids: all tokens that end the answer; they wait for ``min_new_tokens``.
    :param text: gives the newest text, for `bad_words`.
    """
    found: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        found.append(
            RepetitionPenaltyLogitsProcessor(
                config.repetition_penalty, prompt_ignore_length=prompt_tokens
            )
        )
    if config.bad_token_ids:
        found.append(_Mask(config.bad_token_ids))
    if bad_words is not None:
        found.append(_BadWordsMask(bad_words, text))
    if config.ignore_eos:
        found.append(_Mask(list(end_ids)))
    if config.min_new_tokens:
        found.append(_Mask(list(stop_ids), until=prompt_tokens + config.min_new_tokens))
    if not is_greedy(config):
        # A NaN in multinomial fails on the CPU, and ends the whole process on CUDA.
        found.append(InfNanRemoveLogitsProcessor())
    return LogitsProcessorList(found)


class _Mask(LogitsProcessor):  # type: ignore[misc]
    """Tokens that do not come, up to a length of the whole sequence."""

    def __init__(self, token_ids: Sequence[int], until: int | None = None) -> None:
        self._token_ids = sorted(set(token_ids))
        self._until = until

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._until is None or input_ids.shape[1] < self._until:
            scores[:, self._token_ids] = -torch.inf
        return scores


class _BadWordsMask(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, bad_words: BadWords, text: Callable[[], str]) -> None:
        self._bad_words = bad_words
        self._text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._bad_words.banned(self._text())] = -torch.inf
        return scores
