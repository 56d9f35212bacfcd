"""The folder that answers to ``s3://`` names: what it keeps inside, and what it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.visq.objects.reading import LIMIT, fetched
from visq.errors import ImageFetchFailed, ImageForbidden, ImageNotFound, InvalidRequest, Unavailable
from visq.objects import ObjectRef, ObjectStore, open_store, parse_uri
from visq.objects.folder import FolderStore
from visq.settings import Settings


def test_a_file_put_into_the_folder_answers_to_its_name(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "pets").mkdir(parents=True)
    (tmp_path / "pictures" / "pets" / "Äpfel 100%.jpg").write_bytes(b"here")
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    assert fetched(store, parse_uri("s3://pictures/pets/Äpfel 100%.jpg")).data == b"here"


@given(st.text(min_size=1, max_size=300))
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    try:
        ref = ObjectRef("pictures", key)
    except InvalidRequest:
        return
    root = Path("/the/root")
    path = FolderStore(root)._path(ref)
    assert Path(os.path.normpath(path)).is_relative_to(root / "pictures")
    assert all(len(part.encode()) <= 255 for part in path.parts)


def test_a_symbolic_link_out_of_the_folder_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    bucket = tmp_path / "objects" / "pictures"
    bucket.mkdir(parents=True)
    (bucket / "link").symlink_to(tmp_path / "secret")
    (bucket / "up").symlink_to(tmp_path)
    store = open_store(Settings(object_store=(tmp_path / "objects").as_uri()))
    for uri in ("s3://pictures/link", "s3://pictures/up/secret"):
        with pytest.raises(ImageForbidden, match=uri):
            store.get(parse_uri(uri), max_bytes=LIMIT)
    with pytest.raises(ImageForbidden):
        store.put(parse_uri("s3://pictures/up/new"), b"x", "image/png")
    assert not (tmp_path / "new").exists()


def test_folders_and_pipes_are_not_objects(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "pictures" / "pipe")
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    for name in ("folder", "pipe", "folder/none", "pipe/none"):
        with pytest.raises(ImageNotFound):
            store.get(ObjectRef("pictures", name), max_bytes=LIMIT)


def test_a_folder_keeps_no_versions(folder_store: ObjectStore) -> None:
    folder_store.put(parse_uri("s3://pictures/a"), b"x", "image/png")
    with pytest.raises(ImageNotFound, match="no versions"):
        folder_store.get(parse_uri("s3://pictures/a?versionId=1"), max_bytes=LIMIT)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    store = open_store(Settings(object_store=tmp_path.as_uri()))
    store.put(parse_uri("s3://pictures/a"), b"x", "image/png")
    with pytest.raises(ImageForbidden, match="s3://pictures/a/b"):
        store.put(parse_uri("s3://pictures/a/b"), b"y", "image/png")
    assert list((tmp_path / ".incoming").iterdir()) == []
    assert fetched(store, parse_uri("s3://pictures/a")).data == b"x"


def test_a_folder_that_cannot_be_made_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(Settings(object_store=(tmp_path / "file" / "objects").as_uri()))
    with pytest.raises(Unavailable):
        store.ping()


def test_a_folder_that_is_gone_is_an_outage_and_not_a_missing_picture(tmp_path: Path) -> None:
    root = tmp_path / "objects"
    (root / "pictures").mkdir(parents=True)
    store = FolderStore(root)
    ref = parse_uri("s3://pictures/cat.jpg")
    store.put(ref, b"a cat", "image/jpeg")
    root.rename(tmp_path / "not mounted")
    with pytest.raises(ImageFetchFailed, match="not mounted") as failure:
        fetched(store, ref)
    assert failure.value.retryable
    for use in (store.ping, lambda: store.put(ref, b"another cat", "image/jpeg")):
        with pytest.raises(Unavailable, match="not mounted"):
            use()
    assert not root.exists()
    (tmp_path / "not mounted").rename(root)
    assert fetched(store, ref).data == b"a cat"


def test_looking_at_a_folder_that_was_never_there_does_not_make_it(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "objects")
    store.ping()
    with pytest.raises(ImageNotFound):
        fetched(store, parse_uri("s3://pictures/cat.jpg"))
    assert not (tmp_path / "objects").exists()
