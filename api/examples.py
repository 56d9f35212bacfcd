"""The examples in the OpenAPI: the same small story in all of them."""

from __future__ import annotations

from typing import Any, Final

JOB_ID: Final = "job_0197f2a4c1d87cc2a1b2c3d4e5f60718"
SESSION_ID: Final = "ses_0197f2a4c1d07aa2b1c2d3e4f5061728"
BATCH_ID: Final = "bat_0197f2a9e0107bb2c1d2e3f405162738"
IMAGE_ID: Final = "img_0197f2a1b2c37dd2d1e2f30415263748"
FILE_ID: Final = "fil_0197f2a3c4d57ee2e1f2031425364758"
SHA256: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

JOB_BODIES: Final[dict[str, Any]] = {
    "short form": {"prompt": "How many circles are there?", "images": ["s3://pictures/shapes.png"]},
    "messages": {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "s3://pictures/shapes.png"}},
                    {"type": "text", "text": "How many circles are there?"},
                ],
            },
        ],
        "gen_config": {"max_new_tokens": 16},
    },
    "first turn of a session": {
        "prompt": "What is in this picture?",
        "images": [IMAGE_ID],
        "session": {"metadata": {"customer": "7451"}},
    },
    "next turn": {"prompt": "And what is left of the square?", "session_id": SESSION_ID},
}

JOB: Final[dict[str, Any]] = {
    "id": JOB_ID,
    "object": "job",
    "kind": "chat",
    "status": "queued",
    "lane": "interactive",
    "session_id": SESSION_ID,
    "turn": 1,
    "batch_id": None,
    "custom_id": None,
    "position": None,
    "attempt": 0,
    "max_attempts": 3,
    "metadata": {},
    "result_queue": None,
    "result": None,
    "error": None,
    "waiting_for": None,
    "created_at": "2026-01-05T09:30:00Z",
    "started_at": None,
    "finished_at": None,
    "expires_at": None,
}

WAITING_JOB: Final[dict[str, Any]] = JOB | {
    "waiting_for": {"reason": "lane", "job_id": None, "position": 3, "at": None}
}

ENDED_JOB: Final[dict[str, Any]] = JOB | {
    "status": "succeeded",
    "attempt": 1,
    "result": {
        "text": "Three.",
        "finish_reason": "stop",
        "token_ids": None,
        "logprobs": None,
        "usage": {"prompt_tokens": 87, "completion_tokens": 3, "images": 1, "cached_tokens": 64},
        "model": "small",
        "choices": None,
        "ppl": None,
    },
    "started_at": "2026-01-05T09:30:00.020Z",
    "finished_at": "2026-01-05T09:30:00.740Z",
}

EVENTS: Final = (
    'id: 1767605400020-0\nevent: attempt\ndata: {"attempt": 1}\n\n'
    'id: 1767605400310-0\nevent: token\ndata: {"attempt": 1, "text": "Three"}\n\n'
    'id: 1767605400352-0\nevent: token\ndata: {"attempt": 1, "text": "."}\n\n'
    f'id: 1767605400740-0\nevent: end\ndata: {{"id": "{JOB_ID}", "status": "succeeded", ...}}\n\n'
)

HISTORY: Final[dict[str, Any]] = {
    "object": "list",
    "data": [
        {
            "at": "2026-01-05T09:30:00Z",
            "from_status": None,
            "to_status": "queued",
            "attempt": 0,
            "worker": None,
            "reason": "submitted",
        },
        {
            "at": "2026-01-05T09:30:00.020Z",
            "from_status": "queued",
            "to_status": "running",
            "attempt": 1,
            "worker": "gpu-1",
            "reason": None,
        },
    ],
    "next_cursor": None,
}

SESSION: Final[dict[str, Any]] = {
    "id": SESSION_ID,
    "object": "session",
    "turns": 1,
    "metadata": {"customer": "7451"},
    "forked_from": None,
    "created_at": "2026-01-05T09:30:00Z",
    "updated_at": "2026-01-05T09:30:00Z",
}

BATCH_BODIES: Final[dict[str, Any]] = {
    "two pictures": {
        "items": [
            {"custom_id": "a", "prompt": "How many circles?", "images": ["s3://pictures/a.png"]},
            {"custom_id": "b", "prompt": "How many circles?", "images": ["s3://pictures/b.png"]},
        ],
        "gen_config": {"max_new_tokens": 16},
        "result_queue": "counts",
    },
    "a file": {
        "input_uri": "s3://data/in.jsonl.gz",
        "output_uri": "s3://data/out.jsonl",
        "gen_config": {"max_new_tokens": 64},
        "expires_in": 86400,
    },
    "all images under a prefix": {
        "input_uri": "s3://pictures/2026/",
        "prompt": "Describe the picture in one sentence.",
        "output_uri": "s3://data/captions.parquet",
    },
    "OpenAI's form": {
        "input_file_id": FILE_ID,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
}
BATCH: Final[dict[str, Any]] = {
    "id": BATCH_ID,
    "object": "batch",
    "endpoint": None,
    "status": "in_progress",
    "errors": None,
    "input_file_id": None,
    "completion_window": None,
    "output_file_id": None,
    "error_file_id": None,
    "created_at": 1767605700,
    "in_progress_at": 1767605700,
    "expires_at": None,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 2, "completed": 1, "failed": 0},
    "usage": {
        "input_tokens": 131,
        "output_tokens": 4,
        "total_tokens": 135,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    },
    "metadata": {},
    "lane": "batch",
    "counts": {"total": 2, "succeeded": 1, "failed": 0, "cancelled": 0, "expired": 0},
    "intake_done": True,
    "input_uri": None,
    "output_uri": None,
    "error_uri": None,
    "summary_uri": None,
    "max_in_flight": None,
    "on_item_error": "continue",
    "dedupe": False,
    "result_queue": "counts",
    "finished_at": None,
}

IMAGE: Final[dict[str, Any]] = {
    "id": IMAGE_ID,
    "object": "image",
    "uri": f"s3://visq-uploads/demo/{SHA256}",
    "sha256": SHA256,
    "size": 48_213,
    "created_at": "2026-01-05T09:29:00Z",
}

FILE: Final[dict[str, Any]] = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 1_482_213,
    "created_at": 1767605340,
    "expires_at": None,
    "filename": "photos.jsonl",
    "purpose": "batch",
    "status": "processed",
}

_MESSAGES: Final[list[Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "How many circles are there?"},
            {"type": "image_url", "image_url": {"url": "s3://pictures/shapes.png"}},
        ],
    }
]

CHAT_BODIES: Final[dict[str, Any]] = {
    "an image": {"model": "small", "messages": _MESSAGES, "max_completion_tokens": 16},
    "a stream": {
        "model": "small",
        "messages": _MESSAGES,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}

COMPLETION: Final[dict[str, Any]] = {
    "id": "chatcmpl-0197f2a4c1d87cc2a1b2c3d4e5f60718",
    "object": "chat.completion",
    "created": 1767605400,
    "model": "small",
    "system_fingerprint": None,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Three.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 80,
        "completion_tokens": 3,
        "total_tokens": 83,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}

CHUNKS: Final = """\
data: {"id":"chatcmpl-0197f2a4c1d87cc2a1b2c3d4e5f60718","object":"chat.completion.chunk",\
"created":1767605400,"model":"small","system_fingerprint":null,"choices":[{"index":0,\
"delta":{"content":"Three."},"logprobs":null,"finish_reason":null}]}

data: [DONE]

"""
