"""``/v1/models``: what the live workers serve."""

from __future__ import annotations

from collections import Counter

from fastapi import APIRouter, Depends

from api import openapi
from api.auth import authenticated
from api.errors import documented
from api.services import Here
from visq.types import ModelView, Page

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(authenticated)])

EXAMPLE = {
    "object": "list",
    "data": [
        {"id": "small", "object": "model", "engine": "generate", "device": "cpu", "workers": 1}
    ],
    "next_cursor": None,
}


@router.get(
    "",
    operation_id="list_models",
    summary="List the models that are served now",
    responses={200: openapi.example(EXAMPLE), **documented()},
)
async def list_models(here: Here) -> Page[ModelView]:
    """One entry for each model, engine and kind of device of a live worker."""
    counted = Counter(
        (worker.model, worker.engine, worker.device) for worker in await here.workers.alive()
    )
    return Page(
        data=[
            ModelView(id=model, engine=engine, device=device, workers=workers)
            for (model, engine, device), workers in sorted(counted.items())
        ]
    )
