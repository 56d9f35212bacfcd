"""What an answer of a loaded model is made of, whichever engine makes it: ends, text, room."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from visq.errors import ContextLengthExceeded
from visq.types import GenerationConfig
from worker.engine.answer import Answer
from worker.engine.bad_words import BadWords, Pieces
from worker.engine.loading import LoadedModel
from worker.engine.token_texts import TokenTexts


class Answering:
    def __init__(self, loaded: LoadedModel, max_context: int) -> None:
        """:param max_context: most tokens of prompt and answer together."""
        self._loaded = loaded
        self._max_context = max_context

    def room(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens may be generated.

        :raises ContextLengthExceeded: if prompt and answer do not fit.
        """
        context = self._max_context
        room = context - prompt_tokens
        if room < (max_new_tokens or 1):
            asked = "" if max_new_tokens is None else f" and `max_new_tokens` is {max_new_tokens}"
            advice = f"ask for at most {room}, or shorten" if room > 0 else "shorten"
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens{asked}, but the context of the model "
                f"{self._loaded.name} has {context}; {advice} the prompt",
                param="gen_config.max_new_tokens" if room > 0 else "messages",
            )
        return room if max_new_tokens is None else max_new_tokens

    def stop_ids(self, config: GenerationConfig) -> frozenset[int]:
        """Tokens that end the answer.

        A stop word that is an added token (``<|im_end|>``) is looked for as that token: as text it
        is not seen when special tokens are skipped.
        """
        added = self._loaded.tokenizer.get_added_vocab()
        ids = {added[word] for word in config.stop_words or () if word in added}
        ids.update(config.stop_token_ids or ())
        if not config.ignore_eos:
            ids |= self._loaded.end_ids
        return frozenset(token for token in ids if token < self._loaded.vocab_size)

    def answer(self, config: GenerationConfig, index: int = 0) -> Answer:
        """An empty answer; `index` says which of the request's choices it is."""
        words = set(config.stop_words or ())
        texts_of = None if config.logprobs is None else self._token_texts.of
        return Answer(config, self._decoder(config), self.stop_ids(config), words, index, texts_of)

    def bad_words(self, config: GenerationConfig) -> BadWords | None:
        return BadWords(config.bad_words, self._pieces) if config.bad_words else None

    def _decoder(self, config: GenerationConfig) -> Callable[[list[int]], str]:
        tokenizer = self._loaded.tokenizer
        plain = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
        if plain and not tokenizer.clean_up_tokenization_spaces:
            # The same without transformers' wrapper, which costs more than the decoding.
            core, skip = tokenizer.backend_tokenizer, config.skip_special_tokens
            return lambda ids: str(core.decode(ids, skip_special_tokens=skip))

        def decode(ids: list[int]) -> str:
            return str(
                tokenizer.decode(
                    ids,
                    skip_special_tokens=config.skip_special_tokens,
                    spaces_between_special_tokens=config.spaces_between_special_tokens,
                )
            )

        return decode

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self._loaded.tokenizer)

    @cached_property
    def _pieces(self) -> Pieces:
        tokenizer = self._loaded.tokenizer
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        return Pieces(
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            anchor,
            min(len(tokenizer), self._loaded.vocab_size),
        )
