"""Slots: fair between buckets, and no waiting without end at one that hangs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.waiting import until
from visq.errors import ImageFetchFailed, ImageNotFound
from visq.objects import ObjectRef
from worker.media.slots import Slots


class Readers:
    """Threads that each hold a slot until they are told to end."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._threads = ThreadPoolExecutor(64)
        self._lock = threading.Lock()
        self.inside: list[str] = []

    def read(
        self, bucket: str, end: threading.Event, error: Exception | None = None
    ) -> Future[None]:
        return self._threads.submit(self._read, bucket, end, error)

    def _read(self, bucket: str, end: threading.Event, error: Exception | None) -> None:
        with self._slots.taken(ObjectRef(bucket, "a")):
            with self._lock:
                self.inside.append(bucket)
            try:
                assert end.wait(20)
                if error is not None:
                    raise error
            finally:
                with self._lock:
                    self.inside.remove(bucket)

    def close(self) -> None:
        self._threads.shutdown()


def test_a_bucket_that_hangs_leaves_slots_to_others() -> None:
    readers, end = Readers(Slots(8, 20.0)), threading.Event()
    hanging = [readers.read("hanging", end) for _ in range(20)]
    until(lambda: len(readers.inside) == 6, 5, "three quarters of the slots")
    done = threading.Event()
    done.set()
    for _ in range(5):
        readers.read("well", done).result(5)
    assert readers.inside == ["hanging"] * 6
    end.set()
    for each in hanging:
        each.result(5)
    readers.close()


def test_the_bucket_with_the_fewest_readers_comes_next() -> None:
    readers = Readers(Slots(3, 20.0))
    first, rest = threading.Event(), threading.Event()
    readers.read("busy", first)
    for _ in range(12):
        readers.read("busy", rest)
    until(lambda: len(readers.inside) == 3, 5, "all slots to be taken")
    late = readers.read("late", rest)
    time.sleep(0.05)  # nothing tells when a thread waits
    first.set()
    until(lambda: "late" in readers.inside, 5, "the newcomer to pass by the others")
    rest.set()
    late.result(5)
    readers.close()


def test_who_waits_at_a_bucket_that_answers_nobody_gives_up() -> None:
    readers, end = Readers(Slots(1, 0.2)), threading.Event()
    readers.read("hanging", end)
    until(lambda: readers.inside, 5, "the slot to be taken")
    with pytest.raises(ImageFetchFailed, match=r"image s3://hanging/a .* answered nobody for 0\.2"):
        readers.read("hanging", end).result(5)
    end.set()
    readers.read("hanging", end).result(5)
    readers.close()


@pytest.mark.parametrize("error", [None, ImageNotFound("gone")])
def test_where_others_get_answers_one_waits_for_as_long_as_it_takes(
    error: Exception | None,
) -> None:
    slots = Slots(1, 0.4)

    def read() -> None:
        with slots.taken(ObjectRef("slow", "a")):
            time.sleep(0.15)
            if error is not None:
                raise error

    with ThreadPoolExecutor(6) as threads:  # the last one waits for 0.75 s
        reads = [threads.submit(read) for _ in range(6)]
        assert [each.exception(10) for each in reads] == [error] * 6
