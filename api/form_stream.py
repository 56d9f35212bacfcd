"""A multipart form with a file of any size, parsed as it comes: the file is passed on, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from visq.errors import InvalidRequest, MalformedBody, UnsupportedMediaType

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELDS: Final = 16
MAX_FIELD_BYTES: Final = 4096
OVERHEAD_BYTES: Final = 256 * 1024
"""More than all fields, headers and boundaries of such a form take."""


class FormStream:
    """What a form has said so far. The file may stand before, between or behind the fields.

    :raises UnsupportedMediaType: `content_type` is that of no form.
    :raises MalformedBody: (here, fed or ended) it is not a form, or too large a one.
    :raises InvalidRequest: (fed or ended) it has no file in its field ``file``, or several.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise UnsupportedMediaType("send a form: `Content-Type: multipart/form-data`")
        if not options.get(b"boundary"):
            raise MalformedBody("the form cannot be read: its Content-Type names no boundary")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """As the form has it; ``None``: the file has not begun."""
        self._name = ""
        self._in_file = False
        self._header = self._header_value = b""
        self._disposition = b""
        self._value = bytearray()
        self._taken: list[bytes] = []
        self._is_whole = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        with _told():
            self._parser = MultipartParser(options[b"boundary"], callbacks)

    def feed(self, data: bytes) -> bytes:
        """Parse what has come; returns the bytes of the file in it."""
        with _told():
            self._parser.write(data)
        taken, self._taken = b"".join(self._taken), []
        return taken

    def end(self) -> str:
        """No more comes; returns the name of the file."""
        if not self._is_whole:
            raise MalformedBody("the form cannot be read: it ends too early")
        if self.filename is None:
            raise InvalidRequest("the form has no file in its field `file`", param="file")
        return self.filename

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._value = bytearray()
        self._in_file = False

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise MalformedBody("the form cannot be read: a field has no name")
        self._name = options[b"name"].decode(errors="replace")
        if b"filename" in options:
            if self._name != "file" or self.filename is not None:
                raise InvalidRequest("send one file, in the field `file`", param=self._name)
            self._in_file = True
            self.filename = options[b"filename"].decode(errors="replace")
        elif self._name in self.fields:
            raise InvalidRequest("the field comes twice", param=self._name)
        elif len(self.fields) == MAX_FIELDS:
            raise MalformedBody(f"the form has more than {MAX_FIELDS} fields")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._taken.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"more than {MAX_FIELD_BYTES} bytes", param=self._name)

    def _on_part_end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self._is_whole = True


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise MalformedBody(f"the form cannot be read: {error}") from None
