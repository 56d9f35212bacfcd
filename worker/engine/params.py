"""What of ``gen_config`` the sampler needs, resolved once per choice.

Semantics as LMDeploy's, with two differences: the repetition penalty counts under greedy decoding
as well, and ``ignore_eos`` masks the model's own end tokens but leaves a request its own stop
tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from visq.errors import InvalidRequest
from visq.types import GenerationConfig

COLDEST: Final = 1e-5
"""Temperatures below mean greedy."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice of a request is sampled."""

    greedy: bool
    """Take the likeliest token; `temperature`, `top_k`, `top_p` and `min_p` have no effect."""
    temperature: float
    top_k: int
    """0: no limit."""
    top_p: float
    min_p: float
    repetition_penalty: float
    """Over generated tokens only; 1: none."""
    seed: int
    """63 bits."""
    banned_ids: tuple[int, ...]
    """Tokens that never come: ``bad_token_ids``, and the end tokens under ``ignore_eos``."""
    min_new_tokens: int
    stop_ids: tuple[int, ...]
    """Tokens that do not come before ``min_new_tokens`` others."""
    logprobs: int | None
    """Number of alternatives to report; ``None``: no report; 0: of the generated token only."""

    @property
    def plain(self) -> bool:
        """Whether each token is the one of the largest logit, but for `banned_ids`."""
        return (
            self.greedy
            and self.repetition_penalty == 1.0
            and self.logprobs is None
            and not (self.stop_ids and self.min_new_tokens)
        )


def check(config: GenerationConfig, vocab_size: int, end_ids: Collection[int]) -> None:
    """Refuse what the sampler cannot honour. (``response_format``: `GrammarCompiler.compile`.)

    :raises InvalidRequest: naming the field.
    """
    for field in ("stop_token_ids", "bad_token_ids"):
        for token in getattr(config, field) or ():
            if token >= vocab_size:
                raise InvalidRequest(
                    f"`{field}` has the token {token}, but the model has only {vocab_size}",
                    param=f"gen_config.{field}",
                )
    if len(_banned(config, end_ids)) >= vocab_size:
        also = " and `ignore_eos`" if config.ignore_eos else ""
        raise InvalidRequest(
            f"`bad_token_ids`{also} forbid every token of the model; leave some",
            param="gen_config.bad_token_ids",
        )
    if (config.logprobs or 0) > vocab_size:
        raise InvalidRequest(
            f"`logprobs` is {config.logprobs}, but the model has only {vocab_size} tokens",
            param="gen_config.logprobs",
        )


def resolve(
    config: GenerationConfig,
    *,
    vocab_size: int,
    end_ids: Collection[int],
    stop_ids: Collection[int],
) -> tuple[SamplingParams, ...]:
    """The parameters of each of the ``n`` choices.

    Without ``random_seed`` a random one is drawn here: keep the result, so that a sequence that
    starts again goes on as before.

    :param end_ids: the model's own end tokens.
    :param stop_ids: all tokens that end the answer (without `end_ids` under ``ignore_eos``).
    """
    seed = secrets.randbits(63) if config.random_seed is None else config.random_seed
    greedy = (
        not config.do_sample
        or config.temperature < COLDEST
        or config.top_k == 1
        or config.top_p == 0.0
    )
    return tuple(
        SamplingParams(
            greedy=greedy,
            temperature=config.temperature,
            top_k=min(config.top_k, vocab_size),
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            seed=choice_seed(seed, index),
            banned_ids=tuple(sorted(t for t in _banned(config, end_ids) if t < vocab_size)),
            min_new_tokens=config.min_new_tokens or 0,
            stop_ids=tuple(sorted(token for token in set(stop_ids) if token < vocab_size)),
            logprobs=config.logprobs,
        )
        for index in range(config.n)
    )


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: `seed` itself for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = blake2b(
        seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8, person=b"choice"
    ).digest()
    return int.from_bytes(digest, "little") >> 1


def _banned(config: GenerationConfig, end_ids: Collection[int]) -> set[int]:
    return set(config.bad_token_ids or ()) | (set(end_ids) if config.ignore_eos else set())
