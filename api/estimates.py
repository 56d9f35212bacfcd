"""What a batch would be (``dry_run``): its items are counted, and nothing is stored.

A file is read as a stream, in a thread. What is kept of it has a bound: of images and names that
are to be told apart, a hash each, up to `TOLD_APART`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.concurrency import run_in_threadpool

from api.auth import Caller
from api.services import Services
from models import latest
from models.batch_items import NewItem
from models.latest import Asked, Run
from models.tables import Batch
from visq.errors import DuplicateCustomId, Unavailable, VisqError
from visq.objects import parse_uri
from visq.references import check_answerable, check_names, decode_data_url, is_data, references
from visq.settings import Settings
from visq.types import (
    BatchError,
    BatchEstimate,
    BatchItem,
    BatchRequest,
    GenerationConfig,
    Prompt,
    TextPart,
)
from worker.queue.batch_reading import BatchReader

SHOWN_ERRORS: Final = 20
TOLD_APART: Final = 200_000
FEWEST_JOBS: Final = 5
"""Fewer are too few to estimate from."""

TOKENS_PER_CHARACTER: Final = 0.25
"""Of English text, about: used where the latest jobs cannot tell text from images."""


async def estimate(
    here: Services, caller: Caller, request: BatchRequest, input_uri: str | None
) -> BatchEstimate:
    """Count a batch; `input_uri`: of its file, which the caller may read.

    :raises BatchInputError: the input is no file of items.
    :raises UnsupportedParameter: it asks for what cannot come back through a queue.
    :raises Unavailable: a server that this needs does not answer.
    """
    check_answerable(request.gen_config)
    workers = await _workers(here)
    asked = await caller.database.read(latest.latest_prompts)
    runs = await here.database.read(latest.latest_runs)

    def count() -> Tally:
        tally = Tally(request, caller.tenant, here.settings)
        for new in _items(here, caller, request, input_uri, workers):
            tally.add(new)
        return tally

    tally = await run_in_threadpool(count)
    per_item = seconds_per_item(runs, sum(workers.values()))
    return BatchEstimate(
        items=tally.items,
        invalid_items=tally.invalid,
        errors=tally.errors,
        images=tally.images,
        distinct_images=tally.distinct.count,
        prompt_tokens=prompt_tokens(asked, tally.size),
        max_completion_tokens=tally.completion_tokens,
        seconds=None if per_item is None else per_item * (tally.items - tally.invalid),
    )


async def _workers(here: Services) -> dict[str, int]:
    """How many live workers each model has."""
    try:
        alive = await here.workers.alive()
    except Unavailable:
        return {}
    models = [worker.model for worker in alive]
    return {model: models.count(model) for model in models}


def _items(
    here: Services,
    caller: Caller,
    request: BatchRequest,
    input_uri: str | None,
    workers: dict[str, int],
) -> Iterator[NewItem]:
    if input_uri is None:
        for position, item in enumerate(request.items or ()):
            yield NewItem(position, item)
        return
    etag = None if input_uri.endswith("/") else here.store.stat(parse_uri(input_uri)).etag
    unstored = Batch(
        tenant_id=caller.tenant_id,
        input_uri=input_uri,
        input_etag=etag,
        options={"prompt": request.prompt},
    )
    reader = BatchReader(here.settings, here.blocking, here.store, lambda: workers.keys() or None)
    yield from reader.items(unstored)


# --- counting --------------------------------------------------------------------------------


@dataclass
class Size:
    """What of prompts becomes tokens."""

    characters: int = 0
    images: int = 0

    def add(self, prompt: Prompt) -> None:
        for message in prompt.as_messages():
            for part in message.parts():
                if isinstance(part, TextPart):
                    self.characters += len(part.text)
                else:
                    self.images += 1


class Distinct:
    """Counts different texts."""

    def __init__(self) -> None:
        self._seen: set[int] | None = set()

    def has(self, text: str) -> bool:
        """Whether it came before; no, if there are too many to know."""
        if self._seen is None:
            return False
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        if key in self._seen:
            return True
        self._seen.add(key)
        if len(self._seen) > TOLD_APART:
            self._seen = None
        return False

    @property
    def count(self) -> int | None:
        """``None``: too many."""
        return None if self._seen is None else len(self._seen)


@dataclass
class Tally:
    """The items so far."""

    request: BatchRequest
    tenant: str
    settings: Settings
    items: int = 0
    invalid: int = 0
    errors: list[BatchError] = field(default_factory=list)
    size: Size = field(default_factory=Size)
    distinct: Distinct = field(default_factory=Distinct)
    completion_tokens: int | None = 0

    def __post_init__(self) -> None:
        self._names = Distinct()
        self._default = self.request.gen_config or GenerationConfig()

    @property
    def images(self) -> int:
        return self.size.images

    def add(self, new: NewItem) -> None:
        self.items += 1
        try:
            if new.item is None:
                assert new.error is not None
                raise new.error
            self._check(new.item)
        except VisqError as error:
            self.invalid += 1
            if len(self.errors) < SHOWN_ERRORS:
                said = BatchError(code=error.code, message=error.message, param=error.param)
                self.errors.append(said.model_copy(update={"line": new.position + 1}))
            return
        self.size.add(new.item)
        for _, url in references(new.item):
            self.distinct.has(url)
        self._add_completion(new.item)

    def _check(self, item: BatchItem) -> None:
        """What can be said of it without a look at an image or a session."""
        check_answerable(item.gen_config)
        places = {url: place for place, url in references(item)}
        check_names(places, self.tenant, self.settings)
        for url in filter(is_data, places):
            decode_data_url(url, self.settings.max_upload_bytes)
        if self._names.has(item.custom_id):
            raise DuplicateCustomId.of(item.custom_id)

    def _add_completion(self, item: BatchItem) -> None:
        config = item.gen_config if "gen_config" in item.model_fields_set else self._default
        if config.max_new_tokens is None:
            self.completion_tokens = None
        elif self.completion_tokens is not None:
            self.completion_tokens += config.n * config.max_new_tokens


# --- estimating ------------------------------------------------------------------------------


def prompt_tokens(asked: Iterable[Asked], size: Size) -> int | None:
    """Tokens of prompts of this size: a share for each character and each image, by least squares
    over the latest jobs; ``None`` if these are too few, or have no images and `size` has."""
    known = []
    for each in asked:
        of_job = Size()
        of_job.add(each.prompt)
        known.append((of_job.characters, of_job.images, each.prompt_tokens))
    cc = sum(c * c for c, _, _ in known)
    ii = sum(i * i for _, i, _ in known)
    if len(known) < FEWEST_JOBS or (size.images and not ii):
        return None
    ci = sum(c * i for c, i, _ in known)
    ct = sum(c * t for c, _, t in known)
    it = sum(i * t for _, i, t in known)
    determinant = cc * ii - ci * ci
    if determinant > 1e-3 * cc * ii:  # they differ enough to tell characters from images
        per_character = (ct * ii - it * ci) / determinant
        per_image = (it * cc - ct * ci) / determinant
        if per_character >= 0 and per_image >= 0:
            return round(per_character * size.characters + per_image * size.images)
    per_character = TOKENS_PER_CHARACTER if ii or not cc else ct / cc
    per_image = max(0.0, (it - per_character * ci) / ii) if ii else 0.0
    return round(per_character * size.characters + per_image * size.images)


def seconds_per_item(runs: Sequence[Run], workers: int) -> float | None:
    """At the pace of these runs while any of them ran, for so many workers; ``None`` if nobody
    knows."""
    spans = sorted((run.started_at, run.finished_at) for run in runs)
    if len(spans) < FEWEST_JOBS or not workers:
        return None
    busy = 0.0
    until = spans[0][0]
    for start, end in spans:
        busy += max(0.0, (end - max(start, until)).total_seconds())
        until = max(until, end)
    had = len({run.worker for run in runs})
    return busy / len(spans) * had / workers
