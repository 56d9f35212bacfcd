"""The Python client of the REST API: `Client` blocks, `AsyncClient` awaits.

===================== ==========================================================================
`sync_client`         what a program sees, and `async_client`, the same with ``await``
`options`, `images`   what a program may give: options, and images in every local form
`calls`, `results`    each call of the API, and each sequence of calls, written once as a flow
`flows`               what a flow is; retries
`runners`             flows over httpx2, blocking and async
`streaming`           a job's event stream as text
`answers`, `servers`  errors and results as types; which server
===================== ==========================================================================
"""

from visq.client.async_client import AsyncBatch, AsyncClient, AsyncJob, AsyncSession
from visq.client.sync_client import Batch, Client, Job, Session

__all__ = [
    "AsyncBatch",
    "AsyncClient",
    "AsyncJob",
    "AsyncSession",
    "Batch",
    "Client",
    "Job",
    "Session",
]
