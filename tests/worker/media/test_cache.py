"""The image cache: real files, damage, a bound in bytes, faults of the disk, two workers."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from tests.worker.media.conftest import DISK
from visq.objects import ObjectRef
from worker.media.cache import CachedObject, DiskCache

MIB = 1024 * 1024


def ref(number: int = 0, version: str | None = None) -> ObjectRef:
    return ObjectRef("pictures", f"{number}.jpg", version)


def item(data: bytes = b"picture") -> CachedObject:
    return CachedObject(data, sha256(data).hexdigest(), '"etag"')


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_was_kept_comes_back_also_to_another_worker(tmp_path: Path) -> None:
    DiskCache(tmp_path, MIB).put(ref(), item())
    assert DiskCache(tmp_path, MIB).get(ref()) == item()


def test_versions_are_kept_apart(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(version="1"), item(b"one"))
    cache.put(ref(version="2"), item(b"two"))
    assert cache.get(ref()) is None
    assert cache.get(ref(version="1")) == item(b"one")
    assert cache.get(ref(version="2")) == item(b"two")


def test_a_dropped_object_is_gone(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(), item())
    cache.drop(ref())
    cache.drop(ref())
    assert cache.get(ref()) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"{}\nx", b"{", b"\xff\xfe\n\0"])
def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path: Path, content: bytes) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(), item())
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert cache.get(ref()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_is_a_miss(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(), item())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cache.get(ref()) is None


def test_the_folder_stays_within_its_bound_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(0), item(bytes(20_000)))
    cache.put(ref(1), item(bytes(20_000)))
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))  # both long unused
    assert cache.get(ref(0)) is not None  # and now one is used
    for number in range(2, 100):
        cache.put(ref(number), item(bytes(20_000)))
        assert size(tmp_path) <= MIB
        assert cache.get(ref(0)) is not None
    assert cache.get(ref(1)) is None
    assert cache.get(ref(99)) is not None


def test_an_object_that_would_fill_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, MIB)
    cache.put(ref(), item(bytes(MIB)))
    assert cache.get(ref()) is None


def test_what_killed_writers_left_is_removed_and_living_ones_are_not_disturbed(
    tmp_path: Path,
) -> None:
    dead, living = tmp_path / "dead.unfinished", tmp_path / "living.unfinished"
    dead.write_bytes(b"x")
    living.write_bytes(b"x")
    os.utime(dead, (1, 1))
    DiskCache(tmp_path, MIB).put(ref(), item())
    assert not dead.exists()
    assert living.exists()


def test_an_unusable_folder_is_no_cache_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file" / "cache", MIB)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.put(ref(), item())
            assert cache.get(ref()) is None
    assert len(caplog.records) == 1
    assert "without the cache" in caplog.text


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hashlib import sha256
from visq.objects import ObjectRef
from worker.media.cache import CachedObject, DiskCache

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as on a full disk, writes fail half-way
folder = Path(sys.argv[1])
data = bytes(5000)
cache = DiskCache(folder, 1024 * 1024)
cache.put(ObjectRef("pictures", "a"), CachedObject(data, sha256(data).hexdigest(), None))
print(cache.get(ObjectRef("pictures", "a")), list(folder.iterdir()))
"""


def test_a_write_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "None []"
    assert "without the cache" in done.stderr


def test_on_a_full_disk_there_is_no_cache_it_is_said_once_and_with_room_it_works_again(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(DISK - 8192))
    cache = DiskCache(small_disk / "cache", MIB)
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            cache.put(ref(number), item(bytes(20_000)))
            assert cache.get(ref(number)) is None
    [record] = caplog.records
    assert "without the cache" in record.getMessage()
    assert list((small_disk / "cache").iterdir()) == []
    ballast.unlink()
    cache.put(ref(), item(bytes(20_000)))
    assert cache.get(ref()) == item(bytes(20_000))


def test_on_a_disk_smaller_than_its_bound_the_cache_goes_on_with_what_is_new(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(small_disk, 100 * MIB)
    with caplog.at_level(logging.WARNING):
        for number in range(60):
            cache.put(ref(number), item(bytes([number]) * 20_000))
    kept = [number for number in range(60) if cache.get(ref(number)) is not None]
    assert len(kept) > 5
    assert kept[0] > 40, "the oldest stayed"
    assert all(path.suffix == ".image" for path in small_disk.iterdir())
    assert len(caplog.records) == 1


def test_a_new_failure_is_told_though_it_began_soon_after_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("worker.media.cache.time.monotonic", lambda: clock[0])
    cache = DiskCache(tmp_path / "cache", MIB)

    def fail() -> int:
        (tmp_path / "cache").write_bytes(b"")  # a file where the folder was
        cache.put(ref(), item())
        (tmp_path / "cache").unlink()
        return len(caplog.records)

    with caplog.at_level(logging.WARNING):
        assert fail() == 1
        cache.put(ref(), item())
        assert cache.get(ref()) == item()
        shutil.rmtree(tmp_path / "cache")
        assert fail() == 1, "too soon"
        clock[0] += 601
        assert fail() == 2
        clock[0] += 601
        assert fail() == 2, "it has been said"


def test_a_folder_deleted_while_in_use_is_an_empty_cache(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", MIB)
    cache.put(ref(), item())
    shutil.rmtree(tmp_path / "cache")
    assert cache.get(ref()) is None
    cache.put(ref(), item())
    assert cache.get(ref()) == item()


def test_a_folder_that_may_only_be_read_is_read(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(small_disk, MIB)
    cache.put(ref(), item())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with caplog.at_level(logging.WARNING):
        cache.put(ref(1), item())
        assert cache.get(ref()) == item()
        assert cache.get(ref(1)) is None
    assert len(caplog.records) == 1


def test_two_workers_share_a_folder(tmp_path: Path) -> None:
    workers = [DiskCache(tmp_path, MIB), DiskCache(tmp_path, MIB)]

    def use(number: int) -> bool:
        cache, mine = workers[number % 2], ref(number % 50)
        found = cache.get(mine)
        cache.put(mine, item(bytes([number % 50]) * 30_000))
        return found is None or found == item(bytes([number % 50]) * 30_000)

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(use, range(600)))
    assert size(tmp_path) <= MIB * 1.2  # several threads at a time are on their way
    assert all(path.suffix == ".image" for path in tmp_path.iterdir())
