"""What every object store can do. The two stores are in `s3` and `folder`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, Protocol

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


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without reading it."""

    size: int
    """In bytes."""
    etag: str | None
    """Changes whenever the bytes do."""


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One object of a listing."""

    key: str
    """As it is: of another's bucket it may be one that `ObjectRef` refuses."""
    size: int
    """In bytes."""


class ObjectStore(Protocol):
    """A store of objects by name. Thread-safe; every error names the ``s3://`` URI only.

    `get` and `put` are for pictures: small, whole, with the errors of images. The others take
    objects of any size and kind; a file that `open` or `write` gives is for one thread at a time.
    """

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

    def open(self, ref: ObjectRef, *, if_match: str | None = None) -> BinaryIO:
        """Open one object for reading, as a seekable, buffered file; close it (``with``).

        Some MB of it are in memory at a time. All that is read is of one version, and reading
        ends where the object ends, or raises; also what is read later raises these errors.

        :param if_match: the ETag that it must still have.
        :raises ObjectNotFound: no such bucket, key or version.
        :raises ObjectForbidden: the store refuses it.
        :raises ObjectChanged: it has another ETag, or was replaced while it was read.
        :raises Unavailable: the store does not answer.
        """
        ...

    def write(self, ref: ObjectRef, content_type: str) -> AbstractContextManager[BinaryIO]:
        """Write one object in pieces; makes the upload bucket if it is missing.

        It appears, whole, when the block ends; if the block raises, nothing does. Some MB of it
        are in memory at a time. Closing the file inside the block changes nothing of this.

        :raises ObjectForbidden: (inside the block or at its end) the store refuses it.
        :raises Unavailable: (there) the store did not take it.
        """
        ...

    def list(self, bucket: str, prefix: str, *, after: str | None = None) -> Iterator[ListedObject]:
        """The objects whose keys begin with `prefix`, in the order of the keys' UTF-8 bytes.

        They come page by page; an error comes with the page that meets it.

        :param after: only keys behind this one, which need not exist.
        :raises InvalidRequest: no bucket can be named so.
        :raises ObjectNotFound: no such bucket.
        :raises ObjectForbidden: the store refuses it.
        :raises Unavailable: the store does not answer.
        """
        ...

    def delete(self, ref: ObjectRef) -> None:
        """Delete one object. Idempotent.

        :raises ObjectForbidden: the store refuses it.
        :raises Unavailable: the store does not answer.
        """
        ...

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        """Look at one object.

        :raises ObjectNotFound: no such bucket, key or version.
        :raises ObjectForbidden: the store refuses it.
        :raises Unavailable: the store does not answer.
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
