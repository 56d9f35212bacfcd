"""What the tables (`models.tables`) are made of: types of columns, bases of their classes."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models.database import UTCDateTime
from visq.ids import ID_LENGTH
from visq.types import BatchStatus, JobKind, JobStatus, Lane

JsonColumn: Final = JSON().with_variant(JSONB(), "postgresql")
NullableJson: Final = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Id: Final = String(ID_LENGTH)
# SQLite numbers rows by itself only in a column of the type INTEGER.
RowNumber: Final = BigInteger().with_variant(Integer(), "sqlite")


def _enum(kind: type[StrEnum]) -> Enum:
    """The values as text: a new state needs no change of a database type."""
    return Enum(kind, native_enum=False, length=16, values_callable=lambda e: [m.value for m in e])


class Base(DeclarativeBase):
    """Base of all tables; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own form)
        datetime: UTCDateTime(),
        dict[str, Any]: JsonColumn,
        list[dict[str, Any]]: JsonColumn,
        dict[str, str]: JsonColumn,
        JobStatus: _enum(JobStatus),
        JobKind: _enum(JobKind),
        Lane: _enum(Lane),
        BatchStatus: _enum(BatchStatus),
    }


def table(mapped: type[Base]) -> Table:
    """For an INSERT past the ORM, which takes several times longer. Other statements of what is
    tenant-owned need the class, for the scope of a tenant."""
    return cast(Table, mapped.__table__)


class TenantOwned:
    """A row that belongs to a tenant; `models.database` adds the tenant to every query of it."""

    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))


def partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    condition = text(where)
    return Index(name, *columns, unique=unique, sqlite_where=condition, postgresql_where=condition)
