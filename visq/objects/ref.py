"""The name of an object, and who may read it.

A reference is parsed once, where it enters, and travels as an `ObjectRef`; nothing below takes it
apart again, so what is checked is what is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from visq.errors import ImageForbidden, InvalidRequest
from visq.settings import Settings

MAX_KEY_BYTES: Final = 1024
"""S3's own limit, in UTF-8."""

VERSION_MARK: Final = "?versionId="

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_VERSION = re.compile(r"[A-Za-z0-9._~+=-]{1,1024}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """One object of the store; `uri` and `parse_uri` are inverse to each other.

    The key is taken literally: ``%``, spaces, ``?``, ``#`` and ``\\`` are characters like others.
    """

    bucket: str
    key: str
    version_id: str | None = None

    def __post_init__(self) -> None:
        check_bucket(self.bucket)
        if reason := _fault_of_key(self.key):
            raise InvalidRequest(f"an object name in bucket `{self.bucket}` {reason}")
        if self.version_id is not None and not _VERSION.fullmatch(self.version_id):
            raise InvalidRequest(
                f"`s3://{self.bucket}/{self.key}` has an empty or malformed `versionId`"
            )

    @property
    def uri(self) -> str:
        version = "" if self.version_id is None else f"{VERSION_MARK}{self.version_id}"
        return f"s3://{self.bucket}/{self.key}{version}"

    def __str__(self) -> str:
        return self.uri


def check_bucket(bucket: str) -> None:
    """:raises InvalidRequest: no bucket can be named so."""
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise InvalidRequest(
            "the bucket in an `s3://bucket/key` name has 3 to 63 characters: lower-case "
            "letters, digits, `-` and `.`, with a letter or a digit at both ends"
        )


def check_listing(bucket: str, *texts: str) -> None:
    """:raises InvalidRequest: no bucket can be named so, or no key begins with such a text."""
    check_bucket(bucket)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"a name in bucket `{bucket}` is not valid Unicode") from None


def parse_uri(uri: str) -> ObjectRef:
    """Parse ``s3://bucket/key`` or ``s3://bucket/key?versionId=v``.

    :raises InvalidRequest: if it is anything else. The message never repeats a reference of
        another kind, since those may carry credentials (signed URLs) or megabytes (``data:``).
    """
    scheme, separator, rest = uri.partition("://")
    if scheme != "s3" or not separator:
        raise InvalidRequest(
            "an image in the object store is named `s3://bucket/key` or "
            "`s3://bucket/key?versionId=...`; other references are not read here"
        )
    bucket, _, name = rest.partition("/")
    key, mark, version = name.partition(VERSION_MARK)
    return ObjectRef(bucket, key, version if mark else None)


def check_access(ref: ObjectRef, tenant: str, settings: Settings) -> None:
    """Raise `ImageForbidden` if jobs of `tenant` may not read `ref`.

    Uploads are each tenant's own: in the upload bucket only keys below ``<tenant>/``. Of the other
    buckets, those that ``s3_buckets`` lists (a listed prefix ends at a ``/``: ``bucket/a`` allows
    ``a/x`` and not ``ab/x``), or all if it lists none.
    """
    if ref.bucket == settings.upload_bucket:
        if ref.key.startswith(f"{tenant}/"):
            return
        raise ImageForbidden(f"image {ref} is not an upload of this tenant")
    allowed = [entry.strip().strip("/") for entry in settings.s3_buckets.split(",")]
    allowed = [entry for entry in allowed if entry]
    path = f"{ref.bucket}/{ref.key}"
    if allowed and not any(path.startswith(f"{entry}/") for entry in allowed):
        raise ImageForbidden(f"image {ref} is not in a bucket that this server reads")


def _fault_of_key(key: str) -> str | None:
    """What is wrong with `key`, as the end of a sentence; ``None`` if nothing is."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not key:
        return "has an empty key; give `s3://bucket/key`"
    if size > MAX_KEY_BYTES:
        return f"has a key of {size} bytes; S3 takes {MAX_KEY_BYTES}"
    if _CONTROL.search(key):
        return "has control characters in its key"
    if VERSION_MARK in key:
        return f"has `{VERSION_MARK}` in its key"
    # HTTP clients and proxies resolve these, so another object than the checked one would be read.
    if any(segment in (".", "..") for segment in key.split("/")):
        return "has a `.` or `..` segment in its key"
    return None
