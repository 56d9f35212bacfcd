"""The forward pass of one step: from a plan to sampled tokens, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np
import torch

from worker.engine.adapters import Adapter, Routing
from worker.engine.attention import KVCache, Prefill, StepContext
from worker.engine.families.base import Family, ImageFeatures
from worker.engine.sampler import Sampled, Sampler, SampleRow
from worker.engine.scheduler import Chunk, Step
from worker.engine.sequence import Sequence
from worker.engine.vision import VisionCache


@dataclass(slots=True)
class Launched:
    """A step that runs, or has run."""

    step: Step
    sampling: list[Sequence]
    """The sequences that get a token, in the order of the rows of `sampled`."""
    sampled: Sampled | None
    logits: torch.Tensor | None
    """``(len(sampling), vocabulary)`` float32, raw; kept if somebody asked for logits."""
    prompt_logits: list[tuple[Sequence, int, torch.Tensor]] = field(default_factory=list)
    """Sequence, index of the first token, ``(tokens, vocabulary)`` float32: the logits after each
    token of a chunk of a prompt, for those who asked."""


class Runner:
    def __init__(
        self,
        family: Family,
        cache: KVCache,
        sampler: Sampler,
        vision: VisionCache,
        *,
        routing: Routing,
        slots: int,
        device: torch.device,
    ) -> None:
        self._family = family
        self._cache = cache
        self._sampler = sampler
        self._vision = vision
        self._routing = routing
        self._device = device
        self._last_tokens = torch.zeros(slots, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def encode(self, step: Step) -> None:
        """Encode the step's pictures, for everybody in the step who shows one of them."""
        if not step.encode:
            return
        prepared = [image.prepared for image in step.encode if image.prepared is not None]
        assert len(prepared) == len(step.encode)
        features = self._family.image_features(prepared)
        new: dict[bytes, ImageFeatures] = {}
        for image, each in zip(step.encode, features, strict=True):
            self._vision.put(image.key, each)
            new[image.key] = each
        for chunk in step.chunks:
            for image in chunk.sequence.images:
                # (Pictures that the chunk does not reach are left alone, or nothing would bound
                # the features that wait for their turn.)
                if image.key in new and image.overlaps(chunk.start, chunk.end):
                    image.features = new[image.key]
                    image.prepared = None

    @torch.inference_mode()
    def launch(
        self, step: Step, rows: ListLike[SampleRow], *, keep_logits: bool = False
    ) -> Launched:
        """Compute `step`, whose pictures are encoded.

        :param rows: how to sample, for each chunk that samples, in the order of `Step.chunks`.
        """
        chunks = step.chunks
        ids, pending = _token_ids(chunks)
        token_ids = self._to_device(ids)
        if pending:
            # Sampled by a step that may still run: only the device knows them.
            at = self._to_device(np.array([row for row, _ in pending]))
            token_ids[at] = self._last_tokens[self._to_device(np.array([s for _, s in pending]))]
        embeddings = self._family.embed_tokens(token_ids)
        visual = _visual(chunks)
        for tokens, features, feature_rows in visual:
            embeddings[tokens] = features.embeddings[feature_rows]
        positions = self._to_device(_positions(step))
        self._clear_begun(step)
        context = self._context(step)
        rows_of = [(chunk.sequence.adapter, chunk.end - chunk.start) for chunk in chunks]
        with self._routing.of(rows_of):
            hidden = self._family.decoder(
                inputs_embeds=embeddings.unsqueeze(0),
                use_cache=False,
                attention_mask=None,
                visq=context,
                **self._family.decoder_kwargs(positions, visual),
            ).last_hidden_state[0]
        sampling, last_rows, prompt_logits = [], [], []
        row = 0
        for chunk in chunks:
            sequence, length = chunk.sequence, chunk.end - chunk.start
            if sequence.wants_prompt_logits and chunk.start < sequence.prompt_tokens:
                of_prompt = hidden[row : row + min(chunk.end, sequence.prompt_tokens) - chunk.start]
                rows_of = [(sequence.adapter, len(of_prompt))]
                prompt_logits.append((sequence, chunk.start, self._logits(of_prompt, rows_of)))
            row += length
            if chunk.samples:
                sampling.append(sequence)
                last_rows.append(row - 1)
        logits, sampled = None, None
        if sampling:
            rows_of = [(sequence.adapter, 1) for sequence in sampling]
            logits = self._logits(hidden[self._to_device(np.array(last_rows))], rows_of)
            raw = logits.clone() if keep_logits else None
            sampled = self._sampler.sample(logits, rows)
            slots = self._to_device(np.array([sequence.slot for sequence in sampling]))
            self._last_tokens[slots] = sampled.token_ids
            logits = raw
        return Launched(step, sampling, sampled, logits, prompt_logits)

    def _logits(
        self, hidden: torch.Tensor, rows: ListLike[tuple[Adapter | None, int]]
    ) -> torch.Tensor:
        with self._routing.of(rows):
            logits: torch.Tensor = self._family.lm_head(hidden)
        return logits.float()

    def _clear_begun(self, step: Step) -> None:
        """Empty the blocks that the step begins and does not fill."""
        size = self._cache.block_size
        begun = [
            chunk.sequence.blocks[last // size]
            for chunk in step.chunks
            if chunk.start <= (last := chunk.end // size * size) < chunk.end
        ]
        if begun:
            self._cache.clear(self._to_device(np.array(begun)))

    def _context(self, step: Step) -> StepContext:
        size = self._cache.block_size
        decodes = step.decodes
        blocks = [np.array([c.sequence.blocks[c.start // size] for c in decodes], dtype=np.int64)]
        offsets = [np.array([c.start % size for c in decodes], dtype=np.int64)]
        prefills: list[Prefill] = []
        for chunk in step.prefills:
            at = np.arange(chunk.start, chunk.end)
            blocks.append(np.array(chunk.sequence.blocks)[at // size])
            offsets.append(at % size)
        row = len(step.decodes)
        for chunk in step.prefills:
            end = row + chunk.end - chunk.start
            table = np.array(chunk.sequence.blocks[: -(-chunk.end // size)])
            prefills.append(Prefill(row, end, chunk.end, self._to_device(table)))
            row = end
        width = max((-(-chunk.end // size) for chunk in step.decodes), default=0)
        tables = np.zeros((len(step.decodes), width), dtype=np.int64)
        for index, chunk in enumerate(step.decodes):
            used = -(-chunk.end // size)
            tables[index, :used] = chunk.sequence.blocks[:used]
        ends = np.array([chunk.end for chunk in step.decodes], dtype=np.int64)
        mask = np.arange(width * size)[None, :] < ends[:, None]
        return StepContext(
            cache=self._cache,
            blocks=self._to_device(np.concatenate(blocks)),
            offsets=self._to_device(np.concatenate(offsets)),
            decodes=len(step.decodes),
            tables=self._to_device(tables),
            mask=self._to_device(mask[:, None, None, :]),
            prefills=prefills,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _token_ids(chunks: ListLike[Chunk]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """``(T,)`` token ids; and ``(row, slot)`` where only the device knows the token."""
    ids: list[int] = []
    pending: list[tuple[int, int]] = []
    for chunk in chunks:
        known = chunk.sequence.token_ids[chunk.start : chunk.end]
        if not known:
            pending.append((len(ids), chunk.sequence.slot))
            known = [0]
        ids += known
    return np.array(ids, dtype=np.int64), pending


def _positions(step: Step) -> np.ndarray:
    """``(axes, T)``."""
    axes = step.chunks[0].sequence.positions.shape[0]
    decodes = np.array([c.start + c.sequence.delta for c in step.decodes], dtype=np.int64)
    parts = [np.broadcast_to(decodes, (axes, len(decodes)))]
    for chunk in step.prefills:
        sequence = chunk.sequence
        if chunk.start < sequence.prompt_tokens:
            parts.append(sequence.positions[:, chunk.start : chunk.end].numpy())
        first = max(chunk.start, sequence.prompt_tokens)
        if first < chunk.end:
            generated = np.arange(first, chunk.end) + sequence.delta
            parts.append(np.broadcast_to(generated, (axes, len(generated))))
    return np.concatenate(parts, axis=1)


def _visual(chunks: ListLike[Chunk]) -> list[tuple[slice, ImageFeatures, slice]]:
    """Which tokens of the step are which rows of which picture's features."""
    found: list[tuple[slice, ImageFeatures, slice]] = []
    row = 0
    for chunk in chunks:
        for image in chunk.sequence.images_in(chunk.start, chunk.end):
            for start, end, feature_row in image.runs:
                first, last = max(start, chunk.start), min(end, chunk.end)
                if first >= last:
                    continue
                assert image.features is not None
                to = row - chunk.start
                of = feature_row - start
                found.append(
                    (slice(to + first, to + last), image.features, slice(of + first, of + last))
                )
        row += chunk.end - chunk.start
    return found
