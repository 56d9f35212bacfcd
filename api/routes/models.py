"""``/v1/models``: what the live workers serve."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter, Depends

from api import openapi
from api.auth import authenticated
from api.errors import OPENAI, as_openai, documented
from api.services import Here, Services
from visq.errors import ModelNotFound
from visq.streams import WorkerInfo
from visq.types import ModelView, Page

router = APIRouter(
    prefix="/v1/models", tags=["models"], dependencies=[as_openai, Depends(authenticated)]
)

MODEL = {
    "id": "small",
    "object": "model",
    "created": 1764072000,
    "owned_by": "visq",
    "engine": "native",
    "device": "cpu",
    "workers": 1,
}
MODELS = {"object": "list", "data": [MODEL], "next_cursor": None}


@router.get(
    "",
    operation_id="list_models",
    summary="List the models that are served now",
    responses={200: openapi.example(MODELS), **documented(face=OPENAI)},
)
async def list_models(here: Here) -> Page[ModelView]:
    """One entry for each model, engine and kind of device of a live worker."""
    return Page(data=await _served(here))


@router.get(
    "/{model_id:path}",
    operation_id="get_model",
    summary="Look at a model",
    responses={200: openapi.example(MODEL), **documented(ModelNotFound, face=OPENAI)},
)
async def get_model(here: Here, model_id: str) -> ModelView:
    """The id may contain slashes. If different engines serve the model, one of them is told."""
    for model in await _served(here):
        if model.id == model_id:
            return model
    raise ModelNotFound(f"no worker serves the model {model_id!r}", param="model")


async def _served(here: Services) -> list[ModelView]:
    alike: dict[tuple[str, str, str], list[WorkerInfo]] = defaultdict(list)
    for worker in await here.workers.alive():
        alike[worker.model, worker.engine, worker.device].append(worker)
    return [
        ModelView(
            id=model,
            created=min(map(_up_since, workers)),
            engine=engine,
            device=device,
            workers=len(workers),
        )
        for (model, engine, device), workers in sorted(alike.items())
    ]


def _up_since(worker: WorkerInfo) -> int:
    return 0 if worker.started_at is None else int(worker.started_at.timestamp())
