"""``response_format``: answers that follow a JSON schema or a regular expression, by llguidance.

A grammar says before each token which tokens may come (a bit mask for the sampler) and is told
which one came. Why llguidance: docs/decisions/006-grammar.md.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from visq.errors import EngineError, InvalidRequest, UnsupportedParameter

FIELD: Final = "gen_config.response_format"
MAX_BYTES: Final = 64 * 1024
"""Longest schema (as JSON) or expression."""

Source: TypeAlias = tuple[str, str]
"""Kind (``json`` or ``regex``), and the schema as JSON or the expression."""


class CompiledGrammar:
    """A grammar that is known to be good."""

    def __init__(self, vocabulary: LLTokenizer, text: str, words: int) -> None:
        """
        :param text: the grammar in llguidance's form.
        :param words: length of a bit mask.
        """
        self._vocabulary = vocabulary
        self._text = text
        self._words = words

    def start(self, stop_ids: Collection[int], generated: Sequence[int] = ()) -> Grammar:
        """The grammar of an answer; takes about a millisecond.

        Nothing is shared between answers: copies of one matcher share its lexer, and an answer that
        exhausts its limits would then end all of them.

        :param stop_ids: the tokens that end this answer, all of the vocabulary.
        :param generated: what the answer has already, if it goes on after a preemption.
        :raises EngineError: if `generated` does not follow the grammar.
        """
        grammar = Grammar(self.matcher(), self._words, stop_ids)
        for token in generated:
            grammar.accept(token)
        return grammar

    def matcher(self) -> LLMatcher:
        # The limits of work per step are llguidance's own, but for memory: 1 to 2 kB a state.
        limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
        return LLMatcher(self._vocabulary, self._text, log_level=0, limits=limits)


class Grammar:
    """Where one answer stands in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, words: int, stop_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._words = words
        self._stop_ids = frozenset(stop_ids)
        self.finished = False
        """Whether the answer is complete: a stop token has come, or nothing else could. The answer
        then ends, whatever ``min_new_tokens`` and ``ignore_eos`` say: there is no next token."""

    def bitmask(self) -> torch.Tensor:
        """What may come next: (ceil(vocabulary / 32),) int32 on the CPU, for `SampleRow.bitmask`.

        Stop tokens may come as soon as the answer would be complete.

        :raises InvalidRequest: if the grammar has become too complex to follow.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)[: self._words].copy()
        if self._matcher.is_error():
            raise self._too_complex()
        if self._matcher.is_accepting():
            for token in self._stop_ids:
                mask[token >> 5] |= np.uint32(1 << (token & 31))
        return torch.from_numpy(mask.view(np.int32))

    def accept(self, token_id: int) -> None:
        """Tell the token that came.

        :raises EngineError: if it does not follow the grammar (as can be if logits processors
            forbid all that the grammar allows).
        :raises InvalidRequest: if the grammar has become too complex to follow.
        """
        if token_id in self._stop_ids:
            self.finished = True
        elif self._matcher.consume_token(token_id):
            self.finished = self._matcher.is_stopped()
        elif self._matcher.stop_reason() in ("LexerTooComplex", "ParserTooComplex"):
            raise self._too_complex()
        else:
            raise EngineError(
                f"the token {token_id} came, which the grammar of `response_format` does not allow"
            )

    def _too_complex(self) -> InvalidRequest:
        return InvalidRequest(
            "the grammar of `response_format` is too complex at this place of the answer; "
            f"simplify it ({_reason(self._matcher.get_error())})",
            param=FIELD,
        )


class GrammarCompiler:
    """Compiles what requests ask for; all methods may be called from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Collection[int]) -> None:
        """
        :param tokenizer: transformers' tokenizer of the model.
        :param vocab_size: columns of the model's logits.
        :param stop_ids: the model's own end tokens.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, response_format: Mapping[str, Any] | None) -> CompiledGrammar | None:
        """The grammar that a request asks for; ``None`` if it wants plain text.

        The first call of all takes a second or two for a large vocabulary.

        :raises InvalidRequest: if the format is malformed, too large, or allows no answer.
        :raises UnsupportedParameter: for a kind that is not known, or if the model's tokenizer
            cannot be constrained.
        """
        source = _source(response_format)
        if source is None:
            return None
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
        kind, text = source
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(text)
            else:
                grammar = LLMatcher.grammar_from_regex(text)
        except ValueError as error:
            raise _refusal(str(error)) from error
        compiled = CompiledGrammar(self._vocabulary, grammar, (self._vocab_size + 31) // 32)
        self._check(compiled)
        return compiled

    @staticmethod
    def _check(compiled: CompiledGrammar) -> None:
        """Take the first step, to see that there is one.

        :raises InvalidRequest: if there is none.
        """
        matcher = compiled.matcher()
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        if not any(mask):
            raise _refusal("no token can be the first one")

    def _read_vocabulary(self) -> LLTokenizer:
        tokens = max(self._tokenizer.get_vocab().values()) + 1
        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer,
                n_vocab=max(tokens, self._vocab_size),
                eos_token=self._stop_ids or None,  # None: the tokenizer's own
            )
        except ValueError as error:
            raise UnsupportedParameter(
                "this model does not support `response_format`: the bytes of its tokens are not "
                f"known ({_reason(str(error))})",
                param=FIELD,
            ) from error


def _source(response_format: Mapping[str, Any] | None) -> Source | None:
    """What to compile; ``None``: nothing.

    :raises InvalidRequest, UnsupportedParameter: see `GrammarCompiler.compile`.
    """
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        source, fields = None, {"type"}
    elif kind == "json_object":
        source, fields = ("json", '{"type":"object"}'), {"type"}
    elif kind == "json_schema":
        source, fields = ("json", _schema(response_format.get(kind))), {"type", kind}
    elif kind == "regex_schema":
        text = response_format.get(kind)
        if not isinstance(text, str):
            raise InvalidRequest("`regex_schema` must be a regular expression", param=FIELD)
        source, fields = ("regex", text), {"type", kind}
    else:
        raise UnsupportedParameter(
            f"`response_format` of type {kind!r} is not known; use json_schema, json_object, "
            "regex_schema or text",
            param=FIELD,
        )
    if unknown := sorted(response_format.keys() - fields):
        raise InvalidRequest(f"`response_format` has no field {unknown[0]!r}", param=FIELD)
    if source is not None and len(source[1].encode(errors="surrogatepass")) > MAX_BYTES:
        raise InvalidRequest(
            f"the grammar of `response_format` is longer than {MAX_BYTES} bytes; shorten it",
            param=FIELD,
        )
    return source


def _schema(value: Any) -> str:
    """The schema of ``{"name": ..., "schema": ...}`` (or given as a string of JSON), as JSON."""
    if isinstance(value, Mapping):
        if unknown := sorted(value.keys() - {"name", "description", "strict", "schema"}):
            raise InvalidRequest(f"`json_schema` has no field {unknown[0]!r}", param=FIELD)
        value = value.get("schema")
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping | bool):
        raise InvalidRequest('`json_schema` must be {"name": ..., "schema": {...}}', param=FIELD)
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _refusal(str(error)) from error


def _refusal(reason: str) -> InvalidRequest:
    return InvalidRequest(f"`response_format` cannot be used: {_reason(reason)}", param=FIELD)


def _reason(error: str) -> str:
    """The first words of an error of llguidance, in one line."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:300]
