"""Which answers the next turns may repeat as the exact tokens that were generated.

The same rule for sessions in SQL and for those of a program.
"""

from __future__ import annotations

from visq.types import GenerationConfig


def exact_ids(
    token_ids: list[int], finish_reason: str | None, config: GenerationConfig
) -> list[int] | None:
    """The tokens that may stand for the answer's text in the next turns, or ``None``.

    They say what the text says, and more exactly: characters that storage or decoding cannot keep
    are whole in them. But where the text ends at a stop word, the tokens run on to the end of it,
    and with ``include_stop_str_in_output`` they may end with the end token that the chat template
    writes as well. Such answers are remembered by their text.

    :param token_ids: all generated tokens.
    :param config: how they were generated.
    """
    runs_on = config.stop_words or config.include_stop_str_in_output
    if finish_reason == "stop" and runs_on:
        return None
    return token_ids or None
