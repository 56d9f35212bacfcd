"""What every object store can do. The two stores are in `s3` and `folder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from visq.objects.ref import ObjectRef


@dataclass(frozen=True, slots=True)
class FetchedObject:
    """An object's bytes as stored, all of them."""

    data: bytes
    etag: str | None
    """Changes whenever the bytes do; give it back as `if_none_match`."""


@dataclass(frozen=True, slots=True)
class NotModified:
    """The object still has the ETag that the caller knows."""


class ObjectStore(Protocol):
    """A store of objects by name. Thread-safe; every error names the ``s3://`` URI only."""

    remote: ClassVar[bool]
    """Whether a read goes over a network, so that a local copy is worth keeping."""

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        """Read one object.

        :raises ImageNotFound: no such bucket, key or version.
        :raises ImageForbidden: the store refuses it.
        :raises ImageTooLarge: it has more than `max_bytes`; no more than that is read.
        :raises ImageFetchFailed: the store did not answer, or not to the end.
        """
        ...

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        """Write one object, whole or not at all; makes the upload bucket if it is missing.

        :raises ImageForbidden: the store refuses it.
        :raises Unavailable: the store did not take it.
        """
        ...

    def ping(self) -> None:
        """Return if the store answers.

        :raises Unavailable: it does not; the message says why.
        """
        ...

    def close(self) -> None:
        """Close the connections. Idempotent."""
        ...
