"""A folder that answers to ``s3://bucket/key`` names: the object store of the embedded default.

``root/bucket/key`` is the object, so a picture can be put there with a file manager. It keeps one
version of an object and no content types, and a key cannot also be the folder of another key (S3
allows both ``a`` and ``a/b``).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from visq.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    Unavailable,
)
from visq.objects.ref import ObjectRef
from visq.objects.store import FetchedObject, NotModified

INCOMING: Final = ".incoming"
"""Where writers prepare files, in the root so that the rename is atomic; no bucket's name."""

_MAX_NAME_BYTES: Final = 240
_LOST: Final = "its folder is gone: is a disk not mounted?"
_HASHED: Final = "%~"


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
            raise ImageFetchFailed(f"image {ref} could not be read ({_name(error)})") from error

    def put(self, ref: ObjectRef, data: bytes, content_type: str) -> None:
        del content_type  # decoding goes by the bytes
        target = self._path(ref)
        incoming = self._root / INCOMING / uuid.uuid4().hex
        if self._is_lost():
            raise Unavailable(f"{ref} could not be written ({_LOST})")
        try:
            incoming.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_outside(ref, target)
            with open(incoming, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            incoming.replace(target)
        except PermissionError:
            raise ImageForbidden(f"{ref} may not be written by this process") from None
        except OSError as error:
            raise Unavailable(f"{ref} could not be written ({_name(error)})") from error
        finally:
            with suppress(OSError):
                incoming.unlink()

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
        path = self._path(ref)
        self._refuse_outside(ref, path)
        # O_NONBLOCK: opening a named pipe must not wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(path)
            etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"'
            if etag == if_none_match:
                return NotModified()
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ImageTooLarge(f"image {ref} has more than {max_bytes} bytes")
        return FetchedObject(data, etag)

    def _path(self, ref: ObjectRef) -> Path:
        """The file of an object. Keys hold no ``.`` or ``..`` segments: `ObjectRef` sees to it."""
        return self._root.joinpath(ref.bucket, *map(_file_name, ref.key.split("/")))

    def _refuse_outside(self, ref: ObjectRef, path: Path) -> None:
        """Refuse what symbolic links lead out of the root."""
        if not path.resolve().is_relative_to(self._root.resolve()):
            raise ImageForbidden(f"{ref} lies outside the object store")


def _file_name(segment: str) -> str:
    """A segment of a key as a file name: itself, or a hash where no file can be named so."""
    name = segment.encode()
    if segment and len(name) <= _MAX_NAME_BYTES and not segment.startswith(_HASHED):
        return segment
    return _HASHED + hashlib.sha256(name).hexdigest()


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
