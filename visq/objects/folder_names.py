"""Keys as names of files, both ways: what is listed of a folder is what can be read from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from visq.objects.store import ListedObject

_MAX_NAME_BYTES: Final = 240
_HASHED: Final = "%~"


def file_name(segment: str) -> str:
    """A segment of a key as a file name: itself, or a hash where no file can be named so."""
    name = segment.encode()
    if segment and len(name) <= _MAX_NAME_BYTES and not segment.startswith(_HASHED):
        return segment
    return _HASHED + hashlib.sha256(name).hexdigest()


_EMPTY: Final = file_name("")


def listed(folder: Path, prefix: str, after: str | None) -> Iterator[ListedObject]:
    """The objects of the bucket in `folder`, as `ObjectStore.list` gives them.

    Left out is what has no readable name: segments that are stored as a hash (longer than 240
    bytes, or beginning with ``%~``; the empty one is known), names that are not UTF-8, and
    symbolic links. The names of one folder at a time are in memory.

    :raises OSError: the folder, or one below it, cannot be listed.
    """
    range_ = _Range(prefix.encode(), (after or "").encode())
    open_folders = [_entries(folder, b"", range_)]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.is_folder:
            with suppress(FileNotFoundError):  # deleted meanwhile
                open_folders.append(_entries(Path(entry.found.path), entry.key, range_))
        else:
            with suppress(FileNotFoundError):
                size = entry.found.stat(follow_symlinks=False).st_size
                yield ListedObject(entry.key.decode(), size)


class _Entry(NamedTuple):
    key: bytes
    """Of a folder: what all keys in it begin with."""
    is_folder: bool
    found: os.DirEntry[str]


class _Range(NamedTuple):
    prefix: bytes
    after: bytes

    def holds(self, key: bytes) -> bool:
        return key.startswith(self.prefix) and key > self.after

    def meets(self, folder: bytes) -> bool:
        """Whether a key that begins with `folder` may be in it."""
        if not (folder.startswith(self.prefix) or self.prefix.startswith(folder)):
            return False
        return folder > self.after or self.after.startswith(folder)


def _entries(folder: Path, base: bytes, range_: _Range) -> Iterator[_Entry]:
    """In the order of keys, which is that of names once those of folders end with a ``/``."""
    entries: list[_Entry] = []
    with os.scandir(folder) as all_found:
        for found in all_found:
            segment = _segment(found.name)
            if segment is None:
                continue
            key = base + segment
            if found.is_dir(follow_symlinks=False):
                if range_.meets(key + b"/"):
                    entries.append(_Entry(key + b"/", True, found))
            elif found.is_file(follow_symlinks=False) and range_.holds(key):
                entries.append(_Entry(key, False, found))
    entries.sort(key=lambda entry: entry.key)
    return iter(entries)


def _segment(name: str) -> bytes | None:
    """The segment of a key that is stored under `name`; ``None``: not known, or none."""
    if name == _EMPTY:
        return b""
    try:
        return name.encode() if file_name(name) == name else None
    except UnicodeEncodeError:
        return None
