"""Lines of files: plain and packed, whole and broken, from the beginning and from the middle."""

from __future__ import annotations

import gzip
import io
import random
import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visq.batch_files.lines import Line, lines
from visq.errors import BatchInputError

MIB = 1024 * 1024

Pack = Callable[[bytes], bytes]


def read(data: bytes, max_bytes: int = 1000, number: int = 0, offset: int = 0) -> list[Line]:
    return [*lines(io.BytesIO(data), max_bytes=max_bytes, number=number, offset=offset)]


def texts(data: bytes, max_bytes: int = 1000) -> list[tuple[int, bytes | None]]:
    return [(line.number, line.data) for line in read(data, max_bytes)]


def members(data: bytes) -> bytes:
    """As `cat a.gz b.gz` makes it; the second member begins in the middle of a line."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:])


@pytest.fixture(params=[bytes, gzip.compress, members], ids=["plain", "gzip", "members"])
def pack(request: pytest.FixtureRequest) -> Pack:
    found: Pack = request.param
    return found


def test_lines_have_numbers_from_1_and_the_offset_of_their_end(pack: Pack) -> None:
    assert read(pack(b"one\ntwo\n")) == [Line(1, 4, b"one"), Line(2, 8, b"two")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"\xef\xbb\xbf", []),
        (b"one", [(1, b"one")]),
        (b"one\ntwo", [(1, b"one"), (2, b"two")]),
        (b"one\r\ntwo\r\n", [(1, b"one"), (2, b"two")]),
        (b"one\n\n \t\r\ntwo\n", [(1, b"one"), (4, b"two")]),
        (b"\xef\xbb\xbfone\ntwo\n", [(1, b"one"), (2, b"two")]),
        (b"one\n\xef\xbb\xbftwo\n", [(1, b"one"), (2, b"\xef\xbb\xbftwo")]),
        (b"caf\xe9\ntwo\n", [(1, b"caf\xe9"), (2, b"two")]),
    ],
    ids=[
        "empty",
        "blank",
        "only a mark",
        "no end",
        "no end of the last",
        "CRLF",
        "blank lines count",
        "a mark at the beginning",
        "no mark later",
        "latin-1",
    ],
)
def test_the_lines_of_a_text(
    pack: Pack, data: bytes, expected: list[tuple[int, bytes | None]]
) -> None:
    assert texts(pack(data)) == expected


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=["LF", "CRLF", "none"])
def test_a_line_may_have_max_bytes_and_no_more(mark: bytes, end: bytes) -> None:
    assert texts(mark + b"x" * 10 + end, max_bytes=10) == [(1, b"x" * 10)]
    assert texts(mark + b"x" * 11 + end, max_bytes=10) == [(1, None)]
    assert texts(b"\n" + b"x" * 10 + end, max_bytes=10) == [(2, b"x" * 10)]
    assert texts(b"\n" + b"x" * 11 + end, max_bytes=10) == [(2, None)]


@pytest.mark.parametrize("more", [b"\r\rx", b"\r\r\r\r\r\rx", b"\rx", b"xxxxxx"])
@pytest.mark.parametrize("before", [b"", b"\n", b"\xef\xbb\xbf"])
def test_what_is_read_of_a_longer_line_is_never_taken_for_all_of_it(
    before: bytes, more: bytes
) -> None:
    found = texts(before + b"x" * 10 + more + b"\nnext\n", max_bytes=10)
    number = 1 + before.count(b"\n")
    assert found == [(number, None), (number + 1, b"next")]


def test_a_line_that_is_too_long_is_not_read_into_memory(pack: Pack) -> None:
    long = b"x" * (10 * MIB)
    file = io.BytesIO(pack(b"one\n" + long + b"\nthree\n" + long))
    del long
    tracemalloc.start()
    try:
        found = [*lines(file, max_bytes=MIB)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(line.number, line.data) for line in found] == [
        (1, b"one"),
        (2, None),
        (3, b"three"),
        (4, None),
    ]
    assert found[1].offset == 4 + 10 * MIB + 1
    assert peak < 6 * MIB


LINE = st.one_of(
    st.binary(max_size=30).filter(lambda line: b"\n" not in line and b"\0" not in line),
    st.sampled_from(
        [b"", b" ", b"{}", b"x" * 20, b"x" * 21, b"x" * 40, b"\r", b"x" * 20 + b"\r\r"]
    ),
)


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    last=LINE,
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    packing=st.sampled_from([bytes, gzip.compress, members]),
)
def test_reading_goes_on_after_any_line_as_if_it_had_not_stopped(
    parts: list[tuple[bytes, bytes]], last: bytes, mark: bytes, packing: Pack
) -> None:
    # "{" keeps what is random from looking like another format.
    data = mark + b"{" + b"".join(line + end for line, end in parts) + last
    file = packing(data)
    whole = read(file, max_bytes=20)
    for index, line in enumerate(whole):
        rest = read(file, max_bytes=20, number=line.number, offset=line.offset)
        assert rest == whole[index + 1 :]
    pieces = [0, *(line.offset for line in whole)]
    for (start, end), line in zip(pairwise(pieces), whole, strict=True):
        assert data[:end].count(b"\n") == line.number - (not data[:end].endswith(b"\n"))
        if line.data is not None:
            assert line.data in data[start:end]
            text = data[start:end].removeprefix(b"" if start else mark)
            assert text.strip() == line.data.strip()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("one\n".encode("utf-16"), "UTF-16"),
        ("one\n".encode("utf-16-be"), "binary"),
        ("one\n".encode("utf-32-le"), "binary"),
        (b"PAR1....", "its name|whose name must end with `.parquet`"),
        (b"PK\x03\x04....", "zip"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"BZh91AY", "bzip2"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
        (gzip.compress(b"one\n", mtime=0), "gzip twice"),
    ],
    ids=["UTF-16", "UTF-16 BE", "UTF-32", "Parquet", "zip", "zstd", "bzip2", "PNG", "gzip"],
)
def test_what_is_no_text_is_refused_as_a_whole(data: bytes, said: str) -> None:
    if not data.startswith(b"\x1f\x8b"):
        with pytest.raises(BatchInputError, match=said):
            read(data)
    with pytest.raises(BatchInputError, match=said):
        read(gzip.compress(data))


def packed_lines() -> bytes:
    chance = random.Random(1)
    return gzip.compress(b"".join(b"%030x\n" % chance.getrandbits(120) for _ in range(2000)))


def until_it_breaks(data: bytes) -> tuple[list[Line], str]:
    found: list[Line] = []
    with pytest.raises(BatchInputError) as caught:
        found.extend(lines(io.BytesIO(data), max_bytes=100))
    return found, str(caught.value)


@pytest.mark.parametrize("size", [2, 5, 12])
def test_of_a_packed_file_that_is_cut_off_at_its_head_nothing_is_read(size: int) -> None:
    found, said = until_it_breaks(packed_lines()[:size])
    assert (found, "cut off" in said) == ([], True)


@pytest.mark.parametrize("missing", [1, 8, 20_000])
def test_of_a_packed_file_that_is_cut_off_the_lines_before_are_read(missing: int) -> None:
    whole = read(packed_lines(), max_bytes=100)
    found, said = until_it_breaks(packed_lines()[:-missing])
    assert 0 < len(found) <= 2000
    assert found == whole[: len(found)]
    assert f"after line {len(found)}: it was cut off" in said


@pytest.mark.parametrize("place", [2, 20_000, -6, -3])
def test_of_a_packed_file_that_is_broken_it_is_said(place: int) -> None:
    broken = bytearray(packed_lines())
    broken[place : place + 2] = bytes(255 - byte for byte in broken[place : place + 2])
    _, said = until_it_breaks(bytes(broken))
    assert "gzip packing of the file" in said


def test_garbage_behind_a_packed_file_is_an_error_and_padding_is_none() -> None:
    assert len(read(packed_lines() + b"\0" * 100)) == 2000
    found, said = until_it_breaks(packed_lines() + b"garbage")
    assert f"broken after line {len(found)}: Not a gzipped file" in said


def test_the_file_stays_open(pack: Pack) -> None:
    file = io.BytesIO(pack(b"one\n"))
    assert len([*lines(file, max_bytes=10)]) == 1
    assert not file.closed
