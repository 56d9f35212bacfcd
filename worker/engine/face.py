"""The face that every engine of visq has: submit a request, iterate its events, cancel it.

Light on purpose (no torch): the Celery worker and the tests import it without the model. The
engines behind it are `worker.engine.native` (continuous batching), `worker.engine.generate` (the
plain fallback), both in this process, and `worker.engine.process` (either in a process of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from visq.errors import VisqError
from visq.pixels import PixelBuffer
from visq.types import GenerationConfig, Lane, Message
from worker.engine.stats import EngineStats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class KnownImage:
    """A picture that was shown before: its pixels are asked for only if the model must read them
    again, which a hit in the prefix cache or in the vision cache spares."""

    sha256: str
    """SHA-256, hexadecimal, of its encoded bytes."""
    height: int
    width: int
    """Of the decoded picture, in pixels."""
    load: Callable[[], PixelBuffer] = field(compare=False, repr=False)
    """Gives its pixels, which belong to the caller as those of any image; may block, is called in
    a thread of the engine, and fails the request if it raises a `VisqError`."""


EngineImage: TypeAlias = PixelBuffer | KnownImage


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and how to answer it."""

    id: str
    """The caller's name of the request; for the log only, it need not be unique."""
    messages: list[Message]
    images: Sequence[EngineImage] = ()
    """One for each image part of `messages`, in their order. They belong to the caller, who must
    keep them until the request has ended; the engine only reads them."""
    gen_config: GenerationConfig = field(default_factory=GenerationConfig)
    do_preprocess: bool = True
    """``False``: the text parts are the raw prompt, image placeholders and special tokens in it
    are meant; no chat template is applied."""
    adapter_name: str | None = None
    prompt_ids: list[int] | None = None
    """The whole prompt as tokens, in place of `messages` (empty then) and without images."""
    cache_salt: str = ""
    """Only requests with the same salt share cached blocks and pictures: the tenant's name."""
    goes_on: bool = False
    """Whether a next turn may come: what is cached of this one is then also kept in the host's
    memory, where it stays longer than on a busy device."""
    answer_ids: Mapping[int, list[int]] = field(default_factory=dict)
    """For assistant messages (by their index in `messages`): the exact tokens that this model
    generated then, used in place of the tokens of the text. Only from a trusted store."""
    logits_processors: tuple[Callable[..., Any], ...] = ()
    """LMDeploy's: ``(token ids (T,), logits (vocabulary,)) -> logits``, as tensors, called before
    each token; the ids are the prompt's and the generated ones. For engines in the caller's own
    process only."""
    lane: Lane = Lane.INTERACTIVE
    deadline_seconds: float | None = None
    """Seconds from the submit after which the request ends as ``Stopped("expired")``."""


Logprobs: TypeAlias = dict[int, float]
"""Of one generated token: token id -> natural logarithm of its probability by the raw logits; the
generated token first, then the likeliest ones."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New text, and the tokens that made it. All deltas of a choice concatenate to its text."""

    text: str
    token_ids: list[int]
    index: int = 0
    """Which of the ``n`` choices."""
    logprobs: list[Logprobs] | None = None
    """One for each of `token_ids`, if asked for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One complete answer."""

    text: str
    finish_reason: FinishReason
    """``stop``: an end token or a stop word; ``length``: ``max_new_tokens`` or the full context."""
    token_ids: list[int]
    """All generated tokens but the stop token; with a stop word, up to the token that ended it."""
    logprobs: list[Logprobs] | None = None
    """One for each of `token_ids`, if asked for."""
    tokens: dict[int, str] | None = None
    """Of every token in `logprobs`: its text (`visq.token_text`)."""
    logits: NDArray[np.float32] | None = None
    """Raw logits that `output_logits` asked for: ``(tokens, vocabulary)``, of the generated tokens,
    or of the prompt's tokens and then of the generated ones (``all``)."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    choices: tuple[Choice, ...]
    """One, or the ``n`` that were asked for."""
    prompt_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    ppl: float | None = None
    """If ``return_ppl``: mean of the negative log likelihood (natural) of the prompt's tokens, each
    given those before it; the first has none."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def completion_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class Failed:
    """The request cannot be answered; ``error.retryable`` says whether trying again may help."""

    error: VisqError


@dataclass(frozen=True, slots=True)
class Stopped:
    """The request ended before its answer was complete, because somebody wanted it so."""

    reason: Literal["cancelled", "expired"]


Outcome: TypeAlias = Finished | Failed | Stopped
"""How a request ends: exactly one of these is its last event."""

Event: TypeAlias = TokenEvent | Outcome


class Handle:
    """A request in an engine: iterate it once, in one thread, for its events; the last one is its
    outcome."""

    def __init__(
        self, cancel: Callable[[], None], sink: Callable[[Event], None] | None = None
    ) -> None:
        """:param sink: takes the events in place of the iterator; called in the engine's thread."""
        self._cancel = cancel
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._sink = sink or self._events.put
        self._outcome: Outcome | None = None
        self.ended = False
        """Whether the outcome has been published (read or not)."""

    def __iter__(self) -> Iterator[Event]:
        """Yield the events as they come (blocking); ends after the outcome."""
        while self._outcome is None:
            event = self._events.get()
            if not isinstance(event, TokenEvent):
                self._outcome = event
            yield event

    def result(self) -> Outcome:
        """Wait for the outcome, dropping the token events not yet read."""
        for _ in self:
            pass
        assert self._outcome is not None
        return self._outcome

    def cancel(self) -> None:
        """Ask for the end of the request, from any thread; does nothing once it has ended."""
        self._cancel()

    def publish(self, event: Event) -> None:
        """For engines: hand out the next event."""
        self.ended = not isinstance(event, TokenEvent)
        self._sink(event)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine has loaded."""

    model: str
    """As asked for: ``small``, a folder, or a name."""
    engine: str
    """Which engine answers: ``native`` or ``generate``."""
    device: str
    dtype: str
    load_seconds: float
    max_context: int
    """Most tokens of prompt and answer together."""
    capacity: int = 1
    """Requests that it can usefully hold at a time; more of them would only wait inside it."""
    tokenizer: str = ""
    """Names the vocabulary: engines that say the same mean the same by a token's number. Empty:
    unknown, so that tokens mean nothing to another engine."""


class Engine(Protocol):
    """What the worker needs of an engine. All methods may be called from any thread."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded."""

    @property
    def alive(self) -> bool:
        """Whether requests are being answered right now."""

    def submit(self, request: EngineRequest, sink: Callable[[Event], None] | None = None) -> Handle:
        """Take a request; never raises for its content: that ends as a `Failed` event.

        :param sink: takes the events in place of the handle's iterator, in a thread of the engine:
            it must be quick, must not raise, and must not call the engine.
        """

    def stats(self) -> EngineStats | None:
        """What it holds and has done; ``None`` if it does not count, or is down."""

    def close(self) -> None:
        """End quickly; open requests end as `Failed` with a retryable error. Repeatable."""
