"""Errors of visq as OpenAI's API tells them.

The classes of `visq.errors` are the table; here is only what OpenAI's API says otherwise:

=================================== ===========================================================
of visq                             on OpenAI's routes
=================================== ===========================================================
status 422                          400
code ``unauthorized``               ``invalid_api_key`` (`visq.errors.OPENAI_CODES`)
param ``gen_config.<field>``        the field of the chat completion that it came from
=================================== ===========================================================
"""

from __future__ import annotations

from typing import Final

from visq.errors import OPENAI_CODES, VisqError, kind_of, type_of
from visq.types import Json

_FIELDS: Final = {
    "logprobs": "top_logprobs",
    "max_new_tokens": "max_completion_tokens",
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_words": "stop",
}
"""Fields of ``gen_config`` that have another name there."""


def status_of(status: int) -> int:
    """The HTTP status for what has `status` on visq's own routes."""
    return 400 if status == 422 else status


def status_of_code(code: str) -> int:
    """The HTTP status of the error with this code."""
    return status_of((kind_of(code) or VisqError).status)


def body_of(code: str, message: str, param: str | None) -> Json:
    """The body of an answer that is an error, where requests are chat completions."""
    return body_in_our_names(code, message, None if param is None else _param(param))


def body_in_our_names(code: str, message: str, param: str | None) -> Json:
    """The same where the fields of requests are visq's own."""
    return {
        "error": {
            "message": message,
            "type": type_of(code),
            "param": param,
            "code": OPENAI_CODES.get(code, code),
        }
    }


def _param(param: str) -> str:
    field = param.removeprefix("gen_config.")
    return param if field == param else _FIELDS.get(field, field)
