"""The Python client of the REST API: `Client` blocks, `AsyncClient` awaits.

======================== =======================================================================
`sync_client`            what a program sees, and `async_client`, the same with ``await``
`sync_batches`           batches, and `async_batches`, the same with ``await``
`options`, `images`      what a program may give: options, and images in every local form
`calls`, `batch_calls`   each call of the API, written once as a flow
`batch_input`            items of any number: in the body, or in a file before it
`results`, `runs`        a batch's results while it runs, in both orders
`flows`                  what a flow is; retries
`runners`                flows over httpx2, blocking and async
`streaming`              a job's event stream as text, and `batch_feed`, a batch's
`answers`, `servers`     errors and results as types; which server
======================== =======================================================================
"""

from visq.client.async_batches import AsyncBatch, AsyncBatchRun
from visq.client.async_client import AsyncClient, AsyncJob, AsyncSession
from visq.client.batch_feed import BatchEvent
from visq.client.sync_batches import Batch, BatchRun
from visq.client.sync_client import Client, Job, Session

__all__ = [
    "AsyncBatch",
    "AsyncBatchRun",
    "AsyncClient",
    "AsyncJob",
    "AsyncSession",
    "Batch",
    "BatchEvent",
    "BatchRun",
    "Client",
    "Job",
    "Session",
]
