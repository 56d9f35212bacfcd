"""Files: one row for each, whose bytes are in the object store. A file that has expired is there
for nobody, though its row and its bytes stay until they are cleared away."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy import delete, insert, or_, select
from sqlalchemy.orm import Session

from models.database import db_now
from models.tables import StoredFile
from visq.errors import NotFound

_ID: Final = re.compile(r"fil_[0-9a-f]{32}")
_HAS_NOT_EXPIRED: Final = or_(StoredFile.expires_at.is_(None), StoredFile.expires_at > db_now())


def add(
    session: Session,
    tenant_id: str,
    *,
    file_id: str,
    filename: str,
    purpose: str,
    uri: str,
    size: int,
    expires_in: float | None = None,
) -> StoredFile:
    """The row of a file whose object is whole. `size` is in bytes, `expires_in` in seconds."""
    values = {
        "id": file_id,
        "tenant_id": tenant_id,
        "filename": filename,
        "purpose": purpose,
        "uri": uri,
        "size": size,
        "expires_at": None if expires_in is None else db_now(expires_in),
    }
    return session.scalars(insert(StoredFile).values(values).returning(StoredFile)).one()


def get(session: Session, file_id: str) -> StoredFile:
    """:raises NotFound: no such file, or it has expired."""
    file = None
    if _ID.fullmatch(file_id):  # OpenAI's own ids have another form
        query = select(StoredFile).where(StoredFile.id == file_id, _HAS_NOT_EXPIRED)
        file = session.scalars(query).one_or_none()
    if file is None:
        raise NotFound("there is no such file", param="file_id")
    return file


def list_files(
    session: Session,
    *,
    after: str | None = None,
    oldest_first: bool = False,
    purpose: str | None = None,
    limit: int,
) -> list[StoredFile]:
    """Files in the order in which they came, or the reverse, behind the id `after`."""
    query = select(StoredFile).where(_HAS_NOT_EXPIRED)
    if purpose is not None:
        query = query.where(StoredFile.purpose == purpose)
    if after is not None:
        query = query.where(StoredFile.id > after if oldest_first else StoredFile.id < after)
    order = StoredFile.id if oldest_first else StoredFile.id.desc()
    return list(session.scalars(query.order_by(order).limit(limit)))


def remove(session: Session, file_id: str) -> None:
    """Remove the row of a file whose object is gone. Idempotent."""
    session.execute(delete(StoredFile).where(StoredFile.id == file_id))


def expired(session: Session, limit: int) -> list[StoredFile]:
    """Files of all tenants that have expired: their objects may be deleted, then their rows."""
    query = select(StoredFile).where(StoredFile.expires_at <= db_now())
    return list(session.scalars(query.order_by(StoredFile.expires_at).limit(limit)))
