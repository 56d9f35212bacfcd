"""Every error that visq raises or stores, in one tree.

Each class carries a stable ``code`` (what programs branch on), the HTTP ``status`` that the API
answers with, and ``retryable``: whether a job that met it is attempted again by itself.

::

    VisqError
    ├── InvalidRequest            422  the request does not fit its schema
    │   ├── MalformedBody         400
    │   ├── LineTooLong, DuplicateCustomId, BatchInputError
    │   └── UnsupportedParameter  422
    ├── Unauthorized              401
    ├── NotFound                  404
    │   ├── ModelNotFound         404
    │   └── ObjectNotFound        404  an object of the store (names it)
    ├── ObjectForbidden           403
    ├── PayloadTooLarge           413
    ├── UnsupportedMediaType      415
    ├── Conflict                  409
    │   ├── IdempotencyConflict   409
    │   ├── NotRetriable          409
    │   └── ObjectChanged         409
    ├── Unavailable               503
    ├── ImageError                     a job's image cannot be used (names the image)
    │   ├── ImageNotFound, ImageForbidden, ImageTooLarge, ImageUndecodable, ImageChanged
    │   └── ImageFetchFailed           retryable: the store did not answer
    ├── EngineError               500  the model could not answer
    │   ├── ContextLengthExceeded 422
    │   ├── AdapterNotFound       404
    │   └── EngineCrashed, EngineDown  503, retryable: it died, or has not come up again
    ├── InternalError                  retryable: visq met something that it did not expect
    └── JobFailed                 500  a job ended without an answer
        ├── AttemptsExhausted     500
        ├── JobCancelled          499
        └── JobExpired            504
    ConfigurationError                 the process cannot start as it is set up

What only a job can meet has a status for the routes that wait for the job: chat completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final


class VisqError(Exception):
    """Base of all errors of visq; ``str(error)`` says what is wrong and what to do about it."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (media and engine processes): keep ``param``.
        return _rebuild, (type(self), self.message, self.param)


def _rebuild(kind: type[VisqError], message: str, param: str | None) -> VisqError:
    return kind(message, param=param)


class InternalError(VisqError):
    """visq met something that it did not expect; tried again by itself, since it may be the
    machine (no memory, no file descriptors), and the next attempt may be on another."""

    retryable = True


class ConfigurationError(VisqError):
    """A setting is missing or contradictory; raised at start, never while serving."""

    code = "configuration_error"


class InvalidRequest(VisqError):
    """A field is missing, unknown, or out of range; ``param`` names it."""

    code = "invalid_request"
    status = 422


class MalformedBody(InvalidRequest):
    """The body is not JSON."""

    code = "malformed_body"
    status = 400


class LineTooLong(InvalidRequest):
    """A line of a batch's input is longer than lines may be."""

    code = "line_too_long"


class DuplicateCustomId(InvalidRequest):
    """An item before this one, in the same batch, has its ``custom_id`` already."""

    code = "duplicate_custom_id"

    @classmethod
    def of(cls, custom_id: str) -> DuplicateCustomId:
        message = f"an item before this one has the `custom_id` {custom_id!r} already"
        return cls(message, param="custom_id")


class BatchInputError(InvalidRequest):
    """The input of a batch cannot be read, or not to its end; nothing more of the batch starts."""

    code = "batch_input_invalid"


class UnsupportedParameter(InvalidRequest):
    """The parameter is known, but this engine or model cannot honour it."""

    code = "unsupported_parameter"


class Unauthorized(VisqError):
    """No key, or a key that is not known."""

    code = "unauthorized"
    status = 401


class NotFound(VisqError):
    """No such thing for this tenant (another tenant's thing answers the same)."""

    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    """No worker serves this model; the message names those that are served."""

    code = "model_not_found"


class ObjectNotFound(NotFound):
    """The bucket, the key or the version does not exist."""

    code = "object_not_found"


class ObjectForbidden(VisqError):
    """The store refuses the object, or the tenant may not use it."""

    code = "object_forbidden"
    status = 403


class PayloadTooLarge(VisqError):
    """The body or the upload is larger than this server takes."""

    code = "payload_too_large"
    status = 413


class UnsupportedMediaType(VisqError):
    """The body is of a kind that this route does not take; send ``Content-Type``."""

    code = "unsupported_media_type"
    status = 415


class Conflict(VisqError):
    """The thing is in a state in which this cannot be done."""

    code = "conflict"
    status = 409


class IdempotencyConflict(Conflict):
    """The ``Idempotency-Key`` was used before with another body."""

    code = "idempotency_conflict"


class NotRetriable(Conflict):
    """Only a failed job can be retried."""

    code = "not_retriable"


class ObjectChanged(Conflict):
    """The object was replaced while it was read."""

    code = "object_changed"


class Unavailable(VisqError):
    """A server that this needs does not answer; the same request may succeed later."""

    code = "unavailable"
    status = 503
    retryable = True


class ImageError(VisqError):
    """An image of a job cannot be used; the message names the image."""

    code = "image_error"
    status = 422


class ImageNotFound(ImageError):
    """The bucket or key does not exist."""

    code = "image_not_found"


class ImageForbidden(ImageError):
    """The store refuses the object, or the tenant may not read it."""

    code = "image_forbidden"


class ImageTooLarge(ImageError):
    """More bytes or pixels than the limits allow."""

    code = "image_too_large"


class ImageUndecodable(ImageError):
    """The bytes are not an image in a format that visq reads."""

    code = "image_undecodable"


class ImageChanged(ImageError):
    """An image of the session's history has other bytes than those that were shown."""

    code = "image_changed"


class ImageFetchFailed(ImageError):
    """The object store failed or was too slow; tried again by itself."""

    code = "image_fetch_failed"
    retryable = True


class EngineError(VisqError):
    """The engine could not answer this request."""

    code = "engine_error"


class ContextLengthExceeded(EngineError):
    """Prompt and answer do not fit the model's context."""

    code = "context_length_exceeded"
    status = 422


class AdapterNotFound(EngineError):
    """``adapter_name`` names no adapter of this worker."""

    code = "adapter_not_found"
    status = 404


class EngineCrashed(EngineError):
    """The engine process died while this request was in it; tried again by itself."""

    code = "engine_crashed"
    status = 503
    retryable = True


class EngineDown(EngineError):
    """The engine has died and is not up again yet; the request was not in it."""

    code = "engine_down"
    status = 503
    retryable = True


class JobFailed(VisqError):
    """The job ended without an answer, for a reason that has no class of its own here."""

    code = "job_failed"


class AttemptsExhausted(JobFailed):
    """Every attempt of the job died with its worker."""

    code = "attempts_exhausted"


class JobCancelled(JobFailed):
    """The job was cancelled."""

    code = "job_cancelled"
    status = 499  # as proxies say it of a client that has left


class JobExpired(JobFailed):
    """The job's deadline passed before it ended."""

    code = "job_expired"
    status = 504


OPENAI_CODES: Final = {"unauthorized": "invalid_api_key"}
"""Codes that OpenAI's API has other words for; its routes say those."""


def kind_of(code: str) -> type[VisqError] | None:
    """The class with this code, or with OpenAI's word for it; ``None``: a later version's code."""
    for kind in _tree(VisqError):
        if code in (kind.code, OPENAI_CODES.get(kind.code)):
            return kind
    return None


def type_of(code: str) -> str:
    """What OpenAI's API calls ``type``: whether the request or the server is to blame."""
    kind = kind_of(code)
    return "server_error" if kind is not None and kind.status >= 500 else "invalid_request_error"


def _tree(kind: type[VisqError]) -> Iterator[type[VisqError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)
