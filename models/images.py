"""Uploads: one row for each distinct content of a tenant."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.tables import Image
from visq.ids import new_id


def add(session: Session, tenant_id: str, *, uri: str, sha256: str, size: int) -> Image:
    """The row of an upload; the same content again is the same image. `size` is in bytes."""
    mine = select(Image).where(Image.tenant_id == tenant_id, Image.sha256 == sha256)
    image = session.scalars(mine).one_or_none()
    if image is not None:
        return image
    try:
        with session.begin_nested():
            image = Image(id=new_id("img"), tenant_id=tenant_id, uri=uri, sha256=sha256, size=size)
            session.add(image)
            session.flush()
            return image
    except IntegrityError:  # another upload of the same content was faster
        return session.scalars(mine).one()
