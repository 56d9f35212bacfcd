"""The pictures and files that the jobs of the rounds use, and what becomes of them in the store."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from PIL import Image

BUCKET: Final = "pictures"
FILES: Final = "batches"
"""The bucket of what batches read and write."""
COUNT: Final = 12
MISSING: Final = f"s3://{BUCKET}/there-is-none.png"


def picture(seed: object) -> bytes:
    """A small picture of one colour, as a PNG file."""
    colour = tuple(random.Random(f"{seed}").randrange(256) for _ in range(3))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Pictures:
    """What each object has been in this round. Filled by several threads."""

    versions: dict[str, list[str]] = field(default_factory=dict)
    """SHA-256 of the files that it was, by its name (``s3://``); the last one is what it is."""
    gone: set[str] = field(default_factory=set)
    """Those that were not there for a while."""
    names: list[str] = field(default_factory=list)
    """Those that jobs may name, and scenarios break."""

    def uploaded(self, name: str, sha256: str) -> None:
        """The API has stored it: nobody replaces it."""
        self.versions[name] = [sha256]

    def changed(self, names: Sequence[str]) -> bool:
        """Whether one of them was something else before."""
        return any(len(self.versions[name]) > 1 for name in names)


class Gallery:
    """Puts pictures into the bucket, replaces them and takes them away."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._files: dict[str, bytes] = {}
        self.pictures = Pictures()
        for number in range(COUNT):
            name = f"s3://{BUCKET}/{number}.png"
            self.pictures.names.append(name)
            self._put(name, picture(number))

    def replace(self, name: str, seed: object) -> None:
        self._put(name, picture(seed))

    def delete(self, name: str) -> None:
        self.pictures.gone.add(name)
        self._client.delete_object(Bucket=BUCKET, Key=_key(name))

    def heal(self) -> None:
        """All pictures are there."""
        for name in self.pictures.gone:
            self._client.put_object(Bucket=BUCKET, Key=_key(name), Body=self._files[name])

    def put_file(self, name: str, data: bytes) -> None:
        """The input of a batch."""
        self._client.put_object(Bucket=FILES, Key=_key(name), Body=data)

    def files(self) -> dict[str, bytes]:
        """What batches have read and written in this round, by name."""
        listed = self._client.list_objects_v2(Bucket=FILES).get("Contents", [])
        return {
            f"s3://{FILES}/{key}": self._client.get_object(Bucket=FILES, Key=key)["Body"].read()
            for key in (each["Key"] for each in listed)
        }

    def unfinished_uploads(self) -> list[str]:
        """Names of objects of which there are parts only."""
        listed = self._client.list_multipart_uploads(Bucket=FILES).get("Uploads", [])
        return [f"s3://{FILES}/{each['Key']}" for each in listed]

    def begin_round(self) -> None:
        """What they were in earlier rounds is over."""
        for name in self.files():
            self._client.delete_object(Bucket=FILES, Key=_key(name))
        self.pictures.gone.clear()
        for name, versions in self.pictures.versions.items():
            self.pictures.versions[name] = versions[-1:]

    def _put(self, name: str, file: bytes) -> None:
        self._files[name] = file
        sha256 = hashlib.sha256(file).hexdigest()
        # Before it is there: a job may be shown it at once.
        self.pictures.versions.setdefault(name, []).append(sha256)
        self._client.put_object(Bucket=BUCKET, Key=_key(name), Body=file)


def _key(name: str) -> str:
    return name.rpartition("/")[2]
