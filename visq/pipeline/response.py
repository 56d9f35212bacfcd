"""What comes back for a prompt: a whole answer, or a piece of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from visq.errors import VisqError

if TYPE_CHECKING:
    import torch


@dataclass(repr=False)
class Response:
    """LMDeploy's ``Response``, and below it what visq knows beyond that."""

    text: str
    generate_token_len: int
    """Tokens of the answer (in a piece: so far), without the stop token."""
    input_token_len: int
    """Tokens of the prompt, images and template included; known with the end of the answer, 0 in
    pieces before."""
    finish_reason: Literal["stop", "length", "error", "abort"] | None = None
    """``None`` in a piece that is not the last one."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    """For each token: id -> natural logarithm of the probability."""
    logits: torch.Tensor | None = None
    """``(tokens, vocabulary)``, float32, on the CPU; comes with the end of the answer."""
    last_hidden_state: torch.Tensor | None = None
    """Always ``None``."""
    index: int = 0
    """Which prompt of the call."""
    routed_experts: Any = None
    """Always ``None``."""
    cached_tokens: int = 0
    """Tokens of the prompt that came from the prefix cache."""
    error_code: str | None = None
    """`VisqError.code`, with ``finish_reason == "error"``."""
    error_message: str | None = None
    choice: int = 0
    """Which of the ``n`` choices; in pieces."""
    choices: list[Response] = field(default_factory=list)
    """All choices, if ``n`` is more than 1; the answer itself is the first."""
    ppl: float | None = None
    """With ``return_ppl``: mean negative log likelihood of the prompt's tokens."""

    @classmethod
    def of_error(cls, error: VisqError, index: int) -> Response:
        """The answer that a prompt gets which cannot be answered."""
        return cls(
            text="",
            generate_token_len=0,
            input_token_len=0,
            finish_reason="error",
            index=index,
            error_code=error.code,
            error_message=error.message,
        )

    def extend(self, other: Response) -> Response:
        """Append the next piece to this one, in place; returns itself."""
        self.text += other.text
        self.token_ids = self.token_ids + other.token_ids
        if other.logprobs:
            self.logprobs = (self.logprobs or []) + other.logprobs
        if other.logits is not None:
            self.logits = other.logits
        self.generate_token_len = other.generate_token_len
        self.input_token_len = other.input_token_len
        self.finish_reason = other.finish_reason
        self.index = other.index
        self.cached_tokens = other.cached_tokens
        self.error_code = other.error_code
        self.error_message = other.error_message
        self.choices = other.choices
        self.ppl = other.ppl
        return self

    def __str__(self) -> str:
        return f"text={self.text}\n{self._numbers()}"

    def __repr__(self) -> str:
        return f"text={self.text!r}\n{self._numbers()}"

    def _numbers(self) -> str:
        lines = [
            f"input_token_len={self.input_token_len}",
            f"generate_token_len={self.generate_token_len}",
            f'finish_reason="{self.finish_reason}"',
            f"token_ids={self.token_ids}",
            f"logprobs={self.logprobs}",
        ]
        if self.logits is not None:
            lines.append(f"logits.shape={tuple(self.logits.shape)}")
        if self.error_code is not None:
            lines.append(f"error={self.error_code}: {self.error_message}")
        return "\n".join(lines)
