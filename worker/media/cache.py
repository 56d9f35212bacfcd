"""A folder of objects that were fetched before, bounded in bytes; workers may share it.

One file an object, named by the hash of its name: a line of JSON (ETag, SHA-256, and the name
without a URL's secrets), then the bytes. Files appear by rename, so nobody sees half of one; the
SHA-256 is compared at every read, so a torn or damaged file is a miss. The time of a file is when
it was last used, and the longest unused go first.

The cache makes fetching faster and never fails it: with a full disk or an unwritable folder there
is no cache, and the log says so once. On a full disk the cache also gives back some of what it has:
others may need it more, and what is new is worth more than what is old.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from visq.objects.images import ImageRef

log = logging.getLogger(__name__)

_SUFFIX: Final = ".image"
_UNFINISHED: Final = ".unfinished"
_UNFINISHED_SECONDS: Final = 600.0
"""A file that its writer left behind, killed, is removed after this."""

# Each worker looks at the folder whenever it has written this share of the limit, and then makes
# room below the other; so two workers on one folder stay within the limit, and more pass it by a
# twentieth each at most.
_LOOK_SHARE: Final = 0.05
_KEEP_SHARE: Final = 0.85

_QUIET_SECONDS: Final = 600.0
"""Two warnings are at least so far apart: near the end of a disk, small files may find room where
large ones do not."""

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class CachedObject:
    """An object as it was fetched."""

    data: bytes
    sha256: str
    etag: str | None


class DiskCache:
    """The cache in `folder`, of at most `max_bytes`; thread-safe."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._written = max_bytes  # since the folder was last looked at: look at the first write
        self._works = self._said = True
        self._warned_at = -_QUIET_SECONDS

    def get(self, ref: ImageRef) -> CachedObject | None:
        """The object, if it is here and whole."""
        path = self._path(ref)
        try:
            content = path.read_bytes()
            with suppress(OSError):  # of a folder that may only be read
                os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        found = _parse(ref, content)
        if found is None:
            log.warning("a damaged file of the image cache is removed: %s", path)
            self.drop(ref)
        return found

    def put(self, ref: ImageRef, found: CachedObject) -> None:
        """Keep the object, unless it would take much of the cache."""
        head = {"uri": str(ref), "sha256": found.sha256, "etag": found.etag}
        content = json.dumps(head).encode() + b"\n" + found.data
        if len(content) > self._max_bytes * _LOOK_SHARE:
            return
        unfinished = self._folder / f"{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(len(content))
            unfinished.write_bytes(content)
            unfinished.replace(self._path(ref))
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            self._warn(error)
            if error.errno in _FULL:
                self._shrink()
        else:
            self._works = True

    def drop(self, ref: ImageRef) -> None:
        """Forget the object."""
        with suppress(OSError):  # not there, or not removable: the next read decides again
            self._path(ref).unlink()

    def _make_room(self, coming: int) -> None:
        """Evict what was not used for longest, if it is time to look."""
        with self._lock:
            self._written += coming
            if self._written <= self._max_bytes * _LOOK_SHARE:
                return
            self._written = coming
        self._evict(self._files(), coming, self._max_bytes * _KEEP_SHARE)

    def _shrink(self) -> None:
        """The disk is full: there is less room for the cache than it may take."""
        with suppress(OSError):
            files = self._files()
            self._evict(files, 0, sum(size for _, size, _ in files) * _KEEP_SHARE)

    @staticmethod
    def _evict(files: list[tuple[float, int, Path]], coming: int, most: float) -> None:
        """Remove the first of `files` until they take, with what is `coming`, at most `most`."""
        total = coming + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= most:
                return
            with suppress(OSError):  # another worker was faster
                path.unlink()
            total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every file, longest unused first."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                path = Path(entry.path)
                if path.suffix == _SUFFIX:
                    files.append((found.st_mtime, found.st_size, path))
                elif (
                    path.suffix == _UNFINISHED
                    and found.st_mtime < time.time() - _UNFINISHED_SECONDS
                ):
                    path.unlink(missing_ok=True)
        return sorted(files)

    def _path(self, ref: ImageRef) -> Path:
        return self._folder / (hashlib.sha256(ref.uri.encode()).hexdigest() + _SUFFIX)

    def _warn(self, error: OSError) -> None:
        """Say once, until it works again, that there is no cache."""
        if self._works:
            self._works = self._said = False
        now = time.monotonic()
        if not self._said and now - self._warned_at >= _QUIET_SECONDS:
            self._said, self._warned_at = True, now
            log.warning("images are fetched without the cache in %s: %s", self._folder, error)


def _parse(ref: ImageRef, content: bytes) -> CachedObject | None:
    """What a file of the cache holds; ``None`` if it is not a whole, undamaged file of `ref`."""
    line, _, data = content.partition(b"\n")
    try:
        head = json.loads(line)
    except ValueError:
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    if not isinstance(head, dict) or head.get("uri") != str(ref) or head.get("sha256") != sha256:
        return None
    return CachedObject(data, sha256, head.get("etag"))
