"""A conversation that a program holds, whichever pipeline answers it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from visq.errors import Conflict

if TYPE_CHECKING:
    from visq.pipeline.generation import GenConfig
    from visq.pipeline.response import Response


class RequestConflict(Conflict):
    """The session has a turn that has not ended; wait for it, or `Session.abort` it."""

    code = "request_conflict"


class Turn:
    """A turn on its way."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.abort: Callable[[], None] = lambda: None

    def succeeded(self, response: Response, token_ids: list[int] | None = None) -> None:
        """Append it to the history, unless the session was reset meanwhile.

        :param token_ids: exact tokens that may stand for its text (`visq.exact`).
        """
        session = self._session
        if session._turn is self:
            session.response = response
            session.history.append((session.prompt, response.text))
            if token_ids is not None:
                session.token_ids[len(session.history) - 1] = (response.text, token_ids)

    def failed(self, response: Response) -> None:
        """Show it; the history stays as it was."""
        if self._session._turn is self:
            self._session.response = response


class Session:
    """What was said, and the answer to the last prompt. Made by ``pipe.session()`` or
    ``pipe.chat(...)``."""

    def __init__(
        self, session_id: int | str, on_close: Callable[[Session], None] | None = None
    ) -> None:
        self.session_id = session_id
        self.prompt: Any = None
        """The last one."""
        self.response: Response | None = None
        """The answer to it, or why there is none; ``None`` while it is on its way."""
        self.history: list[tuple[Any, str]] = []
        """(prompt, answer) of each turn that succeeded. It may be changed between two turns."""
        self.gen_config: GenConfig | None = None
        """For turns that give none."""
        self.token_ids: dict[int, tuple[str, list[int]]] = {}
        """Index in `history` -> an answer's text and its exact tokens, if they may stand for it;
        used as long as the text stays the same. Empty for sessions of a server."""
        self.pictures: dict[str, Any] = {}
        """What the references in prompts led to when they were first shown."""
        self._turn: Turn | None = None
        self._lock = threading.Lock()
        self._on_close = on_close

    def update(self, **fields: Any) -> None:
        """Set `prompt`, `response` or `gen_config`."""
        for name in ("prompt", "response", "gen_config"):
            setattr(self, name, fields.get(name, getattr(self, name)))

    def abort(self) -> None:
        """End the turn that is on its way, if there is one; its `finish_reason` is ``abort``."""
        if (turn := self._turn) is not None:
            turn.abort()

    def close(self) -> None:
        """Abort, and forget everything. Repeatable."""
        self.abort()
        if self._on_close is not None:
            self._on_close(self)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the id."""
        with self._lock:
            self._turn = None
            self.prompt = self.response = self.gen_config = None
            self.history, self.token_ids, self.pictures = [], {}, {}

    @contextmanager
    def turn(self, prompt: Any) -> Iterator[Turn]:
        """For pipelines: the session is this turn's until the block ends.

        :raises RequestConflict: another turn has it.
        """
        with self._lock:
            if self._turn is not None:
                raise RequestConflict(
                    f"session {self.session_id} has a turn that has not ended; wait for it, or "
                    "`abort()` it"
                )
            turn = self._turn = Turn(self)
            self.prompt, self.response = prompt, None
        try:
            yield turn
        finally:
            with self._lock:
                if self._turn is turn:
                    self._turn = None

    def __repr__(self) -> str:
        return f"Session(session_id={self.session_id}, history_len={len(self.history)})"

    def __str__(self) -> str:
        turns = [f"USER:\n{asked}\nASSISTANT:\n{said}" for asked, said in self.history]
        return "\n".join([f"Session(id={self.session_id})", *turns])
