"""Pixels that are shared by content: real media processes, counted decodes, names in /dev/shm."""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest

from tests.waiting import until
from tests.worker.media.decoding import cpu, noise, png, segments, started
from visq.errors import ImageUndecodable, Unavailable
from visq.pixels import PixelBuffer
from worker.media.decoders import Decoders
from worker.media.pixel_cache import PixelCache, SharedPixels

PAGE = 4096
"""What each picture of `png` takes."""


class Counting:
    """Real media processes behind a door: counts the decodes, and can hold them back."""

    def __init__(self, decoders: Decoders) -> None:
        self._decoders = decoders
        self._lock = threading.Lock()
        self.began = 0
        self.open = threading.Event()
        self.open.set()
        self.fault: BaseException | None = None
        """Met by the next decode, in place of pixels."""

    def __call__(self, data: bytes, digest: str) -> PixelBuffer:
        with self._lock:
            self.began += 1
        self.open.wait(60)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        return self._decoders.decode(data, digest)


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    found = started(2)
    yield found
    found.close()


@pytest.fixture
def decode(decoders: Decoders) -> Iterator[Counting]:
    yield Counting(decoders)
    assert segments() == set()


@pytest.fixture
def cache(decode: Counting) -> Iterator[PixelCache]:
    """With room for two unused pictures of `png`."""
    cache = PixelCache(decode, 2 * PAGE)
    yield cache
    cache.close()


def get(cache: PixelCache, data: bytes) -> SharedPixels:
    return cache.get(data, sha256(data).hexdigest())


def asking(
    threads: ThreadPoolExecutor, cache: PixelCache, decode: Counting, data: bytes, count: int
) -> list[Future[SharedPixels]]:
    """Requests that all wait for one decode, which the test lets go on."""
    decode.open.clear()
    asked = [threads.submit(get, cache, data) for _ in range(count)]
    digest = sha256(data).hexdigest()
    until(
        lambda: decode.began and len(cache._used[digest].users) == count,
        20,
        "all to wait for the decode",
    )
    return asked


def test_who_asks_while_a_picture_is_decoded_shares_it_and_the_last_user_lets_it_go(
    decode: Counting,
) -> None:
    cache = PixelCache(decode, 0)
    with ThreadPoolExecutor(8) as threads:
        asked = asking(threads, cache, decode, png(), 8)
        decode.open.set()
        shares = [each.result() for each in asked]
    assert decode.began == 1
    assert len({pixels.name for pixels in shares}) == 1
    for pixels in shares:
        assert segments() == {pixels.name.removeprefix("/")}
        assert np.array_equal(pixels.array(), np.full((6, 8, 3), [1, 0, 0]))
        pixels.release()
    assert segments() == set()


def test_a_second_release_takes_nothing_from_others(decode: Counting) -> None:
    cache = PixelCache(decode, 0)
    one, other = get(cache, png()), get(cache, png())
    one.release()
    one.release()
    assert other.array().shape == (6, 8, 3)
    other.release()
    later = get(cache, png())
    other.release()
    assert later.array().shape == (6, 8, 3)
    later.release()
    assert decode.began == 2


def test_what_nobody_uses_stays_for_the_next(cache: PixelCache, decode: Counting) -> None:
    for _ in range(5):
        pixels = get(cache, png())
        assert pixels.array().shape == (6, 8, 3)
        pixels.release()
    assert decode.began == 1
    assert len(segments()) == 1


def test_the_longest_unused_go_first_and_what_is_in_use_does_not_count(
    cache: PixelCache, decode: Counting
) -> None:
    used = [get(cache, png(width)) for width in range(1, 6)]
    for width in (10, 11):
        get(cache, png(width)).release()
    get(cache, png(10)).release()  # now 11 is the longest unused
    get(cache, png(12)).release()
    assert decode.began == 8
    assert len(segments()) == 5 + 2
    for width, decodes in ((10, 8), (12, 8), (11, 9)):
        get(cache, png(width)).release()
        assert decode.began == decodes, width
    for pixels in used:
        assert pixels.array().shape == (6, pixels.width, 3)
        pixels.release()
    assert len(segments()) == 2


def test_a_picture_that_would_fill_the_cache_goes_at_once_and_no_other_with_it(
    cache: PixelCache, decode: Counting
) -> None:
    get(cache, png()).release()
    get(cache, png(60, 60)).release()
    assert len(segments()) == 1
    get(cache, png()).release()
    assert decode.began == 2


def test_an_error_is_shared_by_who_waits_and_the_next_one_tries_again(
    cache: PixelCache, decode: Counting
) -> None:
    with ThreadPoolExecutor(8) as threads:
        asked = asking(threads, cache, decode, b"no picture", 8)
        decode.open.set()
        assert all(isinstance(each.exception(), ImageUndecodable) for each in asked)
    assert decode.began == 1
    with pytest.raises(ImageUndecodable):
        get(cache, b"no picture")
    assert decode.began == 2
    assert not cache.knows(sha256(b"no picture").hexdigest())


def test_what_an_asker_meets_of_its_own_harms_no_other(cache: PixelCache, decode: Counting) -> None:
    with ThreadPoolExecutor(8) as threads:
        decode.fault = MemoryError()
        asked = asking(threads, cache, decode, png(), 8)
        decode.open.set()
        errors = [each.exception() for each in asked]
        assert [type(error) for error in errors if error is not None] == [MemoryError]
        for each in asked:
            if each.exception() is None:
                each.result().release()
    assert decode.began == 2


def test_a_media_process_that_is_killed_costs_those_who_wait_nothing() -> None:
    alone = started()
    decode = Counting(alone)
    cache = PixelCache(decode, 0)
    get(cache, png()).release()
    [pid] = alone.pids
    slow, before = noise(5000), cpu(pid)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(get, cache, slow) for _ in range(4)]
        until(lambda: cpu(pid) > before + 0.05, 30, "it to decode")
        os.kill(pid, signal.SIGKILL)
        for each in asked:
            assert each.result().array().shape == (5000, 5000, 3)
        for each in asked:
            each.result().release()
    assert decode.began == 2
    assert alone.pids != [pid]
    alone.close()
    assert segments() == set()


def test_pixels_are_held_without_their_bytes_if_they_are_here_or_come(
    cache: PixelCache, decode: Counting
) -> None:
    digest = sha256(png()).hexdigest()
    assert not cache.knows(digest)
    assert cache.held(digest) is None
    with ThreadPoolExecutor(2) as threads:
        [asked] = asking(threads, cache, decode, png(), 1)
        assert cache.knows(digest)
        holding = threads.submit(cache.held, digest)
        until(lambda: len(cache._used[digest].users) == 2, 20, "it to wait")
        decode.open.set()
        asked.result().release()
        held = holding.result()
    assert held is not None
    assert held.array().shape == (6, 8, 3)
    held.release()
    assert cache.knows(digest)
    again = cache.held(digest)
    assert again is not None
    again.release()
    assert decode.began == 1


def test_who_waits_for_pixels_without_bytes_gets_none_if_there_is_an_error(
    cache: PixelCache, decode: Counting
) -> None:
    with ThreadPoolExecutor(2) as threads:
        [asked] = asking(threads, cache, decode, b"no picture", 1)
        digest = sha256(b"no picture").hexdigest()
        holding = threads.submit(cache.held, digest)
        until(lambda: len(cache._used[digest].users) == 2, 20, "it to wait")
        decode.open.set()
        assert isinstance(asked.exception(), ImageUndecodable)
        assert holding.result() is None


def test_closing_frees_what_is_unused_at_once_and_the_rest_when_it_is_released(
    decode: Counting,
) -> None:
    cache = PixelCache(decode, 100 * PAGE)
    used = get(cache, png(1))
    get(cache, png(2)).release()
    cache.close()
    cache.close()
    assert segments() == {used.name.removeprefix("/")}
    assert used.array().shape == (6, 1, 3)
    used.release()
    assert segments() == set()


def test_what_is_decoded_while_the_cache_closes_is_not_left_behind(decode: Counting) -> None:
    cache = PixelCache(decode, 100 * PAGE)
    with ThreadPoolExecutor(2) as threads:
        asked = asking(threads, cache, decode, png(), 2)
        cache.close()
        decode.open.set()
        for each in asked:
            each.result().release()
    assert segments() == set()


def test_after_the_processes_are_closed_there_are_no_pixels() -> None:
    decoders = started()
    cache = PixelCache(decoders.decode, 100 * PAGE)
    get(cache, png()).release()
    decoders.close()
    cache.close()
    with pytest.raises(Unavailable):
        get(cache, png())
    assert segments() == set()


def test_other_processes_get_the_name_and_no_share(cache: PixelCache) -> None:
    pixels = get(cache, png())
    sent = pickle.loads(pickle.dumps(pixels))
    assert type(sent) is PixelBuffer
    assert np.array_equal(sent.array(), pixels.array())
    assert (sent.name, sent.sha256) == (pixels.name, sha256(png()).hexdigest())
    pixels.release()


def test_many_threads_with_few_pictures_leave_nothing_and_see_what_they_asked_for(
    cache: PixelCache, decode: Counting
) -> None:
    def use(seed: int) -> None:
        width = random.Random(seed).choice((1, 2, 3, 4, 0))
        if not width:
            with pytest.raises(ImageUndecodable):
                get(cache, b"no picture")
            return
        held = [get(cache, png(width)), cache.held(sha256(png(width)).hexdigest())]
        for pixels in held:
            assert pixels is not None
            assert pixels.array().shape == (6, width, 3)
            pixels.release()

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(use, range(600)))
    assert cache._used == {}
    assert len(segments()) <= 2
    cache.close()
    assert segments() == set()
