"""A folder that answers to ``s3://bucket/key`` names: the object store of the embedded default.

``root/bucket/key`` is the object, so a picture can be put there with a file manager. It keeps one
version of an object and no content types, and a key cannot also be the folder of another key (S3
allows both ``a`` and ``a/b``).
"""

from __future__ import annotations

import io
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, Final

from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    Unavailable,
    VisqError,
)
from visq.objects.folder_files import IncomingFile, OutgoingFile, os_error_name
from visq.objects.folder_names import file_name, listed
from visq.objects.ref import ObjectRef, check_listing
from visq.objects.store import FetchedObject, ListedObject, NotModified, ObjectInfo

INCOMING: Final = ".incoming"
"""Where writers prepare files, in the root so that the rename is atomic; no bucket's name."""

_BUFFER_BYTES: Final = 1024 * 1024
_LOST: Final = "its folder is gone: is a disk not mounted?"


class FolderStore:
    """The store in folder `root`, which is made when first needed."""

    remote: ClassVar[bool] = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = root.is_dir()
        """Whether the folder has been there: then, without it, a disk is not mounted."""

    def get(
        self, ref: ObjectRef, *, max_bytes: int, if_none_match: str | None = None
    ) -> FetchedObject | NotModified:
        if ref.version_id is not None:
            raise ImageNotFound(f"image {ref} is not found: a folder store keeps no versions")
        try:
            found = self._read(ref, max_bytes, if_none_match)
            self._seen = True
            return found
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if self._is_lost():
                raise ImageFetchFailed(f"image {ref} could not be read ({_LOST})") from None
            raise ImageNotFound(f"image {ref} is not found") from None
        except PermissionError:
            raise ImageForbidden(f"image {ref} may not be read by this process") from None
        except OSError as error:
            raise ImageFetchFailed(
                f"image {ref} could not be read ({os_error_name(error)})"
            ) from error

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        try:
            with self.write(ref, content_type) as file:
                file.write(data)
        except ObjectForbidden as error:
            raise ImageForbidden(error.message) from None

    def open(self, ref: ObjectRef, *, if_match: str | None = None) -> BinaryIO:
        with self._reading(ref):
            descriptor = self._open(ref)
            if if_match is not None and _etag(os.fstat(descriptor)) != if_match:
                os.close(descriptor)
                raise ObjectChanged(f"{ref} has changed")
            return io.BufferedReader(OutgoingFile(ref, descriptor), _BUFFER_BYTES)

    @contextmanager
    def write(self, ref: ObjectRef, content_type: str) -> Iterator[BinaryIO]:
        del content_type  # decoding goes by the bytes
        target = self._path(ref)
        incoming = self._root / INCOMING / uuid.uuid4().hex
        with self._writing(ref):
            if self._is_outside(target):
                raise ObjectForbidden(f"{ref} lies outside the object store")
            incoming.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            file = io.BufferedWriter(IncomingFile(ref, incoming), _BUFFER_BYTES)
        try:
            yield file
            with self._writing(ref):
                file.close()
                _sync(incoming)
                incoming.replace(target)
        finally:
            with suppress(OSError, VisqError):
                file.close()
            with suppress(OSError):
                incoming.unlink()

    def list(self, bucket: str, prefix: str, *, after: str | None = None) -> Iterator[ListedObject]:
        """What cannot be listed: `folder_names.listed`."""
        check_listing(bucket, prefix, after or "")
        try:
            yield from listed(self._root / bucket, prefix, after)
        except (FileNotFoundError, NotADirectoryError):
            if self._is_lost():
                raise Unavailable(f"bucket `{bucket}` could not be listed ({_LOST})") from None
            raise ObjectNotFound(f"bucket `{bucket}` is not found") from None
        except PermissionError:
            raise ObjectForbidden(f"bucket `{bucket}` may not be listed by this process") from None
        except OSError as error:
            raise Unavailable(
                f"bucket `{bucket}` could not be listed ({os_error_name(error)})"
            ) from error

    def delete(self, ref: ObjectRef) -> None:
        with suppress(ObjectNotFound), self._reading(ref):
            os.close(self._open(ref))  # what is no object is not deleted
            self._path(ref).unlink()

    def stat(self, ref: ObjectRef) -> ObjectInfo:
        with self._reading(ref):
            descriptor = self._open(ref)
            try:
                found = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            return ObjectInfo(found.st_size, _etag(found))

    def ping(self) -> None:
        # The folder is not made here: a probe would hide that a disk is not mounted.
        if self._is_lost():
            raise Unavailable(f"the object store fails: {_LOST}")
        there = next(each for each in [self._root, *self._root.parents] if each.exists())
        if not there.is_dir() or not os.access(there, os.R_OK | os.W_OK | os.X_OK):
            raise Unavailable("the object store's folder may not be read and written")

    def _is_lost(self) -> bool:
        is_there = self._root.is_dir()
        self._seen = self._seen or is_there
        return self._seen and not is_there

    def close(self) -> None:
        """A folder needs no closing."""

    def _read(
        self, ref: ObjectRef, max_bytes: int, if_none_match: str | None
    ) -> FetchedObject | NotModified:
        with open(self._open(ref), "rb") as file:
            etag = _etag(os.fstat(file.fileno()))
            if etag == if_none_match:
                return NotModified()
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ImageTooLarge(f"image {ref} has more than {max_bytes} bytes")
        return FetchedObject(data, etag)

    def _open(self, ref: ObjectRef) -> int:
        """A descriptor of the object's file.

        :raises OSError: there is none, or it lies outside (`PermissionError`).
        """
        path = self._path(ref)
        if ref.version_id is not None:
            raise FileNotFoundError(path)
        if self._is_outside(path):
            raise PermissionError(path)
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(path)
        self._seen = True
        return descriptor

    @contextmanager
    def _reading(self, ref: ObjectRef) -> Iterator[None]:
        """What the system's errors mean for an object that is there, or not."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if self._is_lost():
                raise Unavailable(f"{ref} could not be read ({_LOST})") from None
            raise ObjectNotFound(f"{ref} is not found") from None
        except PermissionError:
            raise ObjectForbidden(f"{ref} may not be used by this process") from None
        except OSError as error:
            raise Unavailable(f"{ref} could not be read ({os_error_name(error)})") from error

    @contextmanager
    def _writing(self, ref: ObjectRef) -> Iterator[None]:
        """What the system's errors mean for an object that is to appear."""
        if self._is_lost():
            raise Unavailable(f"{ref} could not be written ({_LOST})")
        try:
            yield
        except PermissionError:
            raise ObjectForbidden(f"{ref} may not be written by this process") from None
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise ObjectForbidden(
                f"{ref} cannot be written: in a folder, a key cannot also be the folder of another"
            ) from None
        except OSError as error:
            raise Unavailable(f"{ref} could not be written ({os_error_name(error)})") from error

    def _path(self, ref: ObjectRef) -> Path:
        """The file of an object. Keys hold no ``.`` or ``..`` segments: `ObjectRef` sees to it."""
        return self._root.joinpath(ref.bucket, *map(file_name, ref.key.split("/")))

    def _is_outside(self, path: Path) -> bool:
        """Whether symbolic links lead out of the root."""
        return not path.resolve().is_relative_to(self._root.resolve())


def _etag(found: os.stat_result) -> str:
    return f'"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"'


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
