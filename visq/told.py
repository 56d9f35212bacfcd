"""What a reader of a token stream has been told, while a job is attempted more than once.

A worker may die while it answers; the next attempt begins again. What it says again is not told
twice: only what goes beyond it is new.
"""

from __future__ import annotations


class ToldOtherwise(Exception):  # noqa: N818  (not a failure: what the reader does is his choice)
    """This attempt says something else than what the reader knows already."""


class Told:
    """The text of one answer."""

    def __init__(self) -> None:
        self._text = ""  # of the present attempt
        self._known = ""  # to the reader

    def begin(self) -> None:
        """A new attempt begins."""
        self._text = ""

    def say(self, text: str) -> str:
        """The attempt says `text`; returns what of it the reader does not know.

        :raises ToldOtherwise: see `start_over`.
        """
        self._text += text
        if self._known.startswith(self._text):
            return ""
        return self._new()

    def end(self, text: str) -> str:
        """The whole answer is `text`, whatever the stream lacked; returns what the reader lacks.

        :raises ToldOtherwise: see `start_over`.
        """
        self._text = text
        if self._known.startswith(text) and self._known[len(text) :].isspace():
            return ""  # a whole answer may lack white space at its end
        return self._new()

    def start_over(self) -> str:
        """Tell the reader the whole text so far, who forgets what he was told."""
        self._known = self._text
        return self._text

    def _new(self) -> str:
        if not self._text.startswith(self._known):
            raise ToldOtherwise
        new = self._text[len(self._known) :]
        self._known = self._text
        return new
