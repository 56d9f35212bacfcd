"""The lines of a file of items, read as a stream: plain or packed with gzip, whatever its name.

A file that is no text at all is refused as a whole (`BatchInputError`). What is wrong with one line
is said of that line, and the next one is read.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from visq.errors import BatchInputError

_GZIP: Final = b"\x1f\x8b"
_UTF8_BOM: Final = b"\xef\xbb\xbf"
_HEAD: Final = 512
_PIECE: Final = 1024 * 1024
_UNPACKED: Final = 64 * 1024 * 1024
"""Bytes that are unpacked between two calls of `alive`."""

# A packed file of 10 MB may be 10 GB of nothing, or one line.
_MOST_BLANK: Final = 4 * 1024 * 1024
"""Bytes of blank lines after each other."""
_LONGEST_LINE: Final = 256 * 1024 * 1024
"""A longer one is not looked through for its end."""

_OTHER_FORMATS: Final = {
    b"\xff\xfe": "it is UTF-16",
    b"\xfe\xff": "it is UTF-16",
    b"PAR1": "it is a Parquet file, whose name must end with `.parquet`",
    b"PK\x03\x04": "it is a zip archive; pack it with gzip, or not at all",
    b"\x28\xb5\x2f\xfd": "it is packed with zstd; use gzip",
    b"BZh": "it is packed with bzip2; use gzip",
    _GZIP: "it is packed with gzip twice",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank."""

    number: int
    """From 1."""
    offset: int
    """Bytes of the (unpacked) file up to its end: reading can go on from there."""
    data: bytes | None
    """Without its end; ``None``: it is longer than lines may be."""
    fault: str | None = None
    """What its reader found wrong with it; `data` then says no more than whose item it is."""


def lines(
    file: BinaryIO,
    *,
    max_bytes: int,
    number: int = 0,
    offset: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[Line]:
    """The lines of `file` after `number` lines, which take `offset` bytes.

    Lines end with LF or CRLF; a byte order mark of UTF-8 is not part of the first one.

    :param file: seekable, at its beginning.
    :param max_bytes: of a line; no more of it is read into memory.
    :param alive: called while there is no line for long; what it raises is passed on.
    :raises BatchInputError: the file is no text, its packing is broken, or there is next to nothing
        in it for its size.
    """
    packed = file.read(len(_GZIP)) == _GZIP
    if packed:
        file.seek(0)
        file = cast("BinaryIO", gzip.GzipFile(fileobj=file))
    else:
        file.seek(0)
    try:
        head = file.read(_HEAD)
        _check_text(head)
        if packed:  # all before it is unpacked again
            for unpacked in range(_UNPACKED, offset, _UNPACKED):
                file.seek(unpacked)
                alive()
        file.seek(offset)
        blank = 0
        longest = max_bytes + len(b"\r\n") + (0 if number else len(_UTF8_BOM))
        while line := file.readline(longest):
            offset += len(line)
            number += 1
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                text = text.removeprefix(_UTF8_BOM)
            if len(text) > max_bytes:
                if not line.endswith(b"\n"):
                    offset += _rest_of_line(file, number, alive)
                blank = 0
                yield Line(number, offset, None)
            elif text.strip():
                blank = 0
                yield Line(number, offset, text)
            elif (blank := blank + len(line)) > _MOST_BLANK:
                raise BatchInputError(
                    f"there are more than {_MOST_BLANK} bytes of blank lines up to line {number}"
                )
    except EOFError:
        raise BatchInputError(
            f"the file ends in the middle of its gzip packing, after line {number}: it was cut off"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BatchInputError(
            f"the gzip packing of the file is broken after line {number}: {error}"
        ) from None


def _rest_of_line(file: BinaryIO, number: int, alive: Callable[[], None]) -> int:
    """Read it, and forget it.

    :returns: its bytes.
    """
    size = 0
    while piece := file.readline(_PIECE):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
        if size > _LONGEST_LINE:
            raise BatchInputError(f"line {number} does not end within {_LONGEST_LINE} bytes")
        alive()
    return size


def _check_text(head: bytes) -> None:
    for magic, meaning in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise BatchInputError(f"the file is not JSON lines in UTF-8: {meaning}")
    if b"\0" in head:
        raise BatchInputError("the file is not JSON lines in UTF-8: it is binary")
