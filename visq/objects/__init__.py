"""The object store: where images and files lie, by ``s3://bucket/key`` names.

`ref` is a name, parsed once; `store` is what every store can do; `s3` and `folder` are the two
stores. Which one a process uses is a setting: `open_store`.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from visq.errors import ConfigurationError
from visq.objects.ref import ObjectRef, check_access, parse_uri
from visq.objects.store import (
    FetchedObject,
    ListedObject,
    NotModified,
    ObjectInfo,
    ObjectStore,
)
from visq.settings import Settings

__all__ = [
    "FetchedObject",
    "ListedObject",
    "NotModified",
    "ObjectInfo",
    "ObjectRef",
    "ObjectStore",
    "check_access",
    "open_store",
    "parse_uri",
    "store_folder",
]


def open_store(settings: Settings) -> ObjectStore:
    """The store that ``VISQ_OBJECT_STORE`` names.

    :raises ConfigurationError: if it is neither ``s3`` nor ``file:///folder``.
    """
    folder = store_folder(settings)
    if folder is None:
        from visq.objects.s3 import S3Store  # boto3 is not part of the light client

        return S3Store(settings)
    from visq.objects.folder import FolderStore

    return FolderStore(folder)


def store_folder(settings: Settings) -> Path | None:
    """The folder that ``VISQ_OBJECT_STORE`` names; ``None``: it is S3.

    :raises ConfigurationError: if it is neither ``s3`` nor ``file:///folder``.
    """
    if settings.objects == "s3":
        return None
    url = urlsplit(settings.objects)
    if url.scheme != "file" or url.netloc or not url.path.startswith("/"):
        raise ConfigurationError("VISQ_OBJECT_STORE must be `s3` or `file:///an/absolute/folder`")
    return Path(unquote(url.path))
