"""Who calls: a Bearer key is a tenant, and a route sees the database through its tenant only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.services import Here
from models.database import TenantDatabase
from visq.errors import Unauthorized

_scheme = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="The secret of a key in `VISQ_API_KEYS` (`visq up` prints where it keeps its own).",
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)]


@dataclass(frozen=True)
class Caller:
    """The tenant that a key belongs to."""

    tenant_id: str
    tenant: str
    """Its name: the part of the upload bucket and of the queues that is its own."""
    database: TenantDatabase
    """All rows that exist for it."""


async def authenticated(here: Here, credentials: Credentials) -> Caller:
    """:raises Unauthorized: no key, or none of ours."""
    if credentials is None:
        raise Unauthorized("send a key: `Authorization: Bearer <key>`")
    # The bytes of the header, as Starlette read them.
    tenant = here.keys.tenant_of(credentials.credentials.encode("latin-1"))
    if tenant is None:
        raise Unauthorized("this key is not known")
    tenant_id = here.tenants[tenant]
    return Caller(tenant_id, tenant, here.database.for_tenant(tenant_id))


Me = Annotated[Caller, Depends(authenticated)]
