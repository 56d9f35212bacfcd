"""One answer as it grows: its tokens, its text, where it stops.

Knows nothing of models or tensors: an engine feeds it one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final, TypeAlias

from visq.types import GenerationConfig
from worker.engine.face import Choice, Logprobs, TokenEvent
from worker.engine.text import Detokenizer, StopWords

TAIL: Final = 200
"""Characters of the newest text that are kept for bad words: their greatest length."""


TextsOf: TypeAlias = Callable[[Iterable[int]], dict[int, str]]
"""Tells the texts of tokens: `worker.engine.token_texts.TokenTexts.of`."""


class Answer:
    """Collects tokens, says when the answer stops, and gives the events to publish."""

    def __init__(
        self,
        config: GenerationConfig,
        decode: Callable[[list[int]], str],
        stop_ids: Collection[int],
        stop_words: Collection[str],
        index: int = 0,
        texts_of: TextsOf | None = None,
    ) -> None:
        """
        :param stop_ids: tokens that end the answer.
        :param stop_words: strings that end it.
        :param index: which of the request's choices it is.
        :param texts_of: tells the texts of the tokens in the log probabilities.
        """
        self._may_hold = not (stop_words or config.bad_words)
        self.token_ids: list[int] = []
        self._logprobs: list[Logprobs] | None = None if config.logprobs is None else []
        self._index = index
        self._texts_of = texts_of
        self.stopped = False
        """Whether a stop token or a stop word has come."""
        self.tail = ""
        """The newest decoded text, shown or not."""
        self._stop_ids = frozenset(stop_ids)
        self._include_stop = config.include_stop_str_in_output
        self._min_tokens = config.min_new_tokens or 0
        self._detokenizer = Detokenizer(decode)
        self._stop_words = StopWords(sorted(stop_words), include=self._include_stop)
        self._text: list[str] = []
        self._cut = False  # a stop word has ended the text: what follows is not shown
        self._published = 0

    def append(
        self, token_id: int, logprobs: Logprobs | None = None, *, hold: int = 1
    ) -> TokenEvent | None:
        """Add a token; return the event to publish, if it has made new text certain.

        :param hold: after the first one, make text of so many tokens at a time only. Ignored where
            the text decides how the answer goes on.
        """
        if token_id in self._stop_ids:
            self.stopped = True
            if not self._include_stop:
                return None
        self.token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        if self._may_hold and self._published and len(self.token_ids) - self._published < hold:
            self._detokenizer.add(token_id)
            return None
        return self._event(self._show(self._detokenizer.append(token_id)))

    def held(self) -> TokenEvent | None:
        """The event of tokens that were held back: the answer ends here, incomplete. Of their text
        it has what is certain; half a character may be missing."""
        if self._published == len(self.token_ids):
            return None
        return self._event(self._show(self._detokenizer.advance()), final=True)

    def finish(self) -> tuple[TokenEvent | None, Choice]:
        """End the answer; return the last token event, if something was held back, and the end."""
        rest = ""
        if not self._cut:
            rest = self._show(self._detokenizer.flush())
        if not self._cut:
            rest += self._stop_words.flush()
        event = self._event(rest, final=True)
        return event, Choice(
            text="".join(self._text),
            finish_reason="stop" if self.stopped else "length",
            token_ids=self.token_ids,
            logprobs=self._logprobs,
            tokens=self._tokens(),
        )

    def _tokens(self) -> dict[int, str] | None:
        if self._logprobs is None or self._texts_of is None:
            return None
        return self._texts_of(token for each in self._logprobs for token in each)

    def _show(self, text: str) -> str:
        """Return the part of the new text that can be shown."""
        self.tail = (self.tail + text)[-TAIL:]
        if len(self.token_ids) < self._min_tokens:
            return text
        shown, self._cut = self._stop_words.feed(text)
        self.stopped = self.stopped or self._cut
        return shown

    def _event(self, text: str, *, final: bool = False) -> TokenEvent | None:
        token_ids = self.token_ids[self._published :]
        if not text and not (final and token_ids):
            return None
        logprobs = None if self._logprobs is None else self._logprobs[self._published :]
        self._published = len(self.token_ids)
        self._text.append(text)
        return TokenEvent(text, token_ids, self._index, logprobs)
