"""Which answers are repeated by their exact tokens."""

from __future__ import annotations

from typing import Any

import pytest

from visq.exact import exact_ids
from visq.types import GenerationConfig


@pytest.mark.parametrize(
    ("config", "finish_reason", "kept"),
    [
        ({}, "stop", True),
        ({}, "length", True),
        ({"stop_words": ["."]}, "stop", False),
        ({"stop_words": ["."]}, "length", True),
        ({"include_stop_str_in_output": True}, "stop", False),
        ({"include_stop_str_in_output": True}, "length", True),
        ({"stop_token_ids": [9]}, "stop", True),
    ],
)
def test_tokens_that_may_run_on_beyond_the_text_are_not_kept(
    config: dict[str, Any], finish_reason: str, kept: bool
) -> None:
    found = exact_ids([5, 6], finish_reason, GenerationConfig(**config))
    assert found == ([5, 6] if kept else None)


def test_an_empty_answer_is_remembered_by_its_text() -> None:
    assert exact_ids([], "stop", GenerationConfig()) is None
