"""The forward pass of one step: from a plan to sampled tokens, without waiting for the device.

Sequences that decode go through `worker.engine.decoder` (a CUDA graph, on CUDA), chunks of prompts
through `Runner._forward`; where there are no graphs, both together through the latter. The rows of
all who get a token then meet in one ``lm_head`` and in the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from worker.engine.adapters import Adapter, Routing
from worker.engine.attention import (
    Decodes,
    Kernels,
    KVCache,
    Prefills,
    StepContext,
    flash,
)
from worker.engine.blocks import PADDING
from worker.engine.decoder import Decoder
from worker.engine.families.base import Family, ImageFeatures
from worker.engine.forward import hidden_states
from worker.engine.prefiller import Places, Prefiller
from worker.engine.sampler import Sampled, Sampler, SampleRow
from worker.engine.scheduler import Chunk, Step
from worker.engine.sequence import Sequence
from worker.engine.vision import VisionCache


class OnHost:
    """A tensor on its way from the device to the host. On the CPU, the tensor itself.

    The copy is queued behind the work that makes the tensor and before that of the next step, so
    that who waits for it does not wait for the next step as well.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._copied = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor


@dataclass(slots=True)
class Launched:
    """A step that runs, or has run."""

    step: Step
    sampling: list[Sequence]
    """The sequences that get a token, in the order of the rows of what follows."""
    ran: Any = None
    """A CUDA event behind all of its work."""
    tokens: OnHost | None = None
    """``(len(sampling),)`` int64, if there are any."""
    sampled: Sampled | None = None
    """How they were sampled, if not all of them were plain."""
    logprobs: OnHost | None = None
    """`Sampled.logprobs`."""
    logits: OnHost | None = None
    """``(len(sampling), vocabulary)`` float32, raw; kept if somebody asked for logits."""
    prompt_logits: list[tuple[Sequence, int, torch.Tensor]] = field(default_factory=list)
    """Sequence, index of the first token, ``(tokens, vocabulary)`` float32: the logits after each
    token of a chunk of a prompt, for those who asked."""


class Runner:
    def __init__(
        self,
        family: Family,
        cache: KVCache,
        kernels: Kernels,
        sampler: Sampler,
        vision: VisionCache,
        *,
        routing: Routing,
        slots: int,
        axes: int,
        device: torch.device,
        split: bool,
        graphs: bool,
    ) -> None:
        """
        :param axes: of positions (`Family.positions`).
        :param split: whether the sequences that decode are computed apart from the prompts.
        :param graphs: whether they are then computed by CUDA graphs.
        """
        self._family = family
        self._cache = cache
        self._kernels = kernels
        self._sampler = sampler
        self._vision = vision
        self._routing = routing
        self._device = device
        self._axes = axes
        # (The last one is for padding.)
        self._last_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.decoder: Decoder | None = None
        if split:
            self.decoder = Decoder(
                family, cache, kernels, self._last_tokens, axes=axes, graphs=graphs
            )
        self.prefiller: Prefiller | None = None
        if graphs and kernels.prefill is flash.prefill:
            self.prefiller = Prefiller(family, cache, kernels, axes=axes, graphs=True)

    @torch.inference_mode()
    def warm_up(self, prompt_tokens: int) -> None:
        """Compute a prompt of so many tokens, of which nothing is kept: code is compiled, and
        memory is claimed that the allocator then has."""
        slot = len(self._last_tokens) - 1
        positions = torch.arange(prompt_tokens).expand(self._axes, -1)
        sequence = Sequence(
            (0, 0, 0), [0] * prompt_tokens, prompt_tokens, prompt_tokens, positions, 0, [], b"",
            slot=slot, blocks=[PADDING] * -(-prompt_tokens // self._cache.block_size),
        )  # fmt: skip
        chunk = Chunk(sequence, 0, prompt_tokens, samples=True)
        step = Step(prefills=[chunk])
        hidden = self._forward([], [chunk], Launched(step, [sequence]))
        self._logits(hidden, []).argmax(-1)

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
        self, step: Step, rows: ListLike[SampleRow] | None, *, keep_logits: bool = False
    ) -> Launched:
        """Compute `step`, whose pictures are encoded.

        :param rows: how to sample, for each chunk that samples, in the order of `Step.chunks`;
            ``None``: all of them are plain (`SamplingParams.plain`).
        """
        self._clear_begun(step)
        decodes, prefills = step.decodes, step.prefills
        hidden: list[torch.Tensor] = []
        if (
            decodes
            and self.decoder is not None
            and self.decoder.takes(decodes)
            and not any(map(_has_adapter, decodes))
        ):
            hidden.append(self.decoder.run(decodes))
            decodes = []
        launched = Launched(step, [chunk.sequence for chunk in step.chunks if chunk.samples])
        if decodes or prefills:
            hidden.append(self._forward(decodes, prefills, launched))
        if launched.sampling:
            self._sample(launched, hidden, rows, keep_logits=keep_logits)
        if self._device.type == "cuda":
            launched.ran = torch.cuda.Event()  # type: ignore[no-untyped-call]
            launched.ran.record()
        return launched

    @torch.inference_mode()
    def resume(self, slot: int, token: int) -> None:
        """`slot` belongs to a sequence now whose newest token, `token`, was sampled elsewhere."""
        self._last_tokens[slot].fill_(token)

    def _forward(
        self, decodes: list[Chunk], prefills: list[Chunk], launched: Launched
    ) -> torch.Tensor:
        """Compute chunks side by side; returns the hidden states of those that sample."""
        chunks = [*decodes, *prefills]
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
        positions = _positions(decodes, prefills)
        places = self._places(prefills, first=len(decodes))
        rows_of = [(chunk.sequence.adapter, chunk.end - chunk.start) for chunk in chunks]
        if self._takes(decodes, prefills, places, visual):
            assert self.prefiller is not None
            hidden = self.prefiller.run(embeddings, positions, places)
        else:
            context = self._context(decodes, places)
            on_device = self._to_device(positions)
            with self._routing.of(rows_of):
                hidden = hidden_states(self._family, embeddings, on_device, context, visual)
        last_rows = []
        row = 0
        for chunk in chunks:
            sequence, length = chunk.sequence, chunk.end - chunk.start
            if sequence.wants_prompt_logits and chunk.start < sequence.prompt_tokens:
                of_prompt = hidden[row : row + min(chunk.end, sequence.prompt_tokens) - chunk.start]
                logits = self._logits(of_prompt, [(sequence.adapter, len(of_prompt))]).float()
                launched.prompt_logits.append((sequence, chunk.start, logits))
            row += length
            if chunk.samples:
                last_rows.append(row - 1)
        return hidden[self._to_device(np.array(last_rows, dtype=np.int64))]

    def _sample(
        self,
        launched: Launched,
        hidden: list[torch.Tensor],
        rows: ListLike[SampleRow] | None,
        *,
        keep_logits: bool,
    ) -> None:
        """Sample the rows of `hidden`, one for each of `Launched.sampling`."""
        states = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        logits = self._logits(states, [(each.adapter, 1) for each in launched.sampling])
        if keep_logits:
            launched.logits = OnHost(logits.float().clone())
        slots = [each.slot for each in launched.sampling]
        if rows is None:
            tokens = self._sampler.sample_plain(logits, slots)
        else:
            launched.sampled = self._sampler.sample(logits, rows)
            tokens = launched.sampled.token_ids
            if launched.sampled.logprobs is not None:
                launched.logprobs = OnHost(launched.sampled.logprobs)
        at = self._to_device(np.array(slots))
        launched.tokens = OnHost(tokens)
        # Last, since a step that fails before is computed once more, after the same tokens.
        self._last_tokens[at] = tokens

    def _logits(
        self, hidden: torch.Tensor, rows: ListLike[tuple[Adapter | None, int]]
    ) -> torch.Tensor:
        with self._routing.of(rows):
            logits: torch.Tensor = self._family.lm_head(hidden)
        return logits

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

    def _takes(
        self,
        decodes: list[Chunk],
        prefills: list[Chunk],
        places: Places,
        visual: list[tuple[slice, ImageFeatures, slice]],
    ) -> bool:
        """Whether the prefiller can compute these chunks: pictures are but embeddings to it."""
        return (
            self.prefiller is not None
            and not decodes
            and self.prefiller.takes(places)
            and not any(map(_has_adapter, prefills))
            and not any(features.deepstack for _, features, _ in visual)
        )

    def _rows(self, chunk: Chunk, start: int) -> np.ndarray:
        """`StepContext.rows` of the tokens of a chunk's sequence from `start` to its end."""
        size = self._cache.block_size
        at = np.arange(start, chunk.end)
        first = start // size
        blocks = np.array(chunk.sequence.blocks[first : -(-chunk.end // size)], dtype=np.int64)
        rows: np.ndarray = blocks[at // size - first] * self._cache.rows_per_block + at % size
        return rows

    def _places(self, prefills: list[Chunk], first: int) -> Places:
        """:param first: of their tokens in the step."""
        spans, row = [], first
        for chunk in prefills:
            spans.append((row, row + chunk.end - chunk.start, chunk.end))
            row = spans[-1][1]
        rows = [self._rows(chunk, chunk.start) for chunk in prefills]
        context = None
        if any(chunk.start for chunk in prefills):
            context = np.concatenate([self._rows(chunk, 0) for chunk in prefills])
        empty = np.empty(0, dtype=np.int64)
        return Places(spans, np.concatenate(rows) if rows else empty, context)

    def _context(self, decodes: list[Chunk], places: Places) -> StepContext:
        size = self._cache.block_size
        rows = [self._rows(chunk, chunk.start) for chunk in decodes]
        context = StepContext(
            self._cache, self._kernels, self._to_device(np.concatenate([*rows, places.rows]))
        )
        if decodes:
            width = max(-(-chunk.end // size) for chunk in decodes)
            tables = np.zeros((len(decodes), width), dtype=np.int32)
            for index, chunk in enumerate(decodes):
                used = -(-chunk.end // size)
                tables[index, :used] = chunk.sequence.blocks[:used]
            lengths = np.array([chunk.end for chunk in decodes], dtype=np.int32)
            tables *= self._cache.pages_per_block
            context.decodes = Decodes(self._to_device(tables), self._to_device(lengths))
        if places.spans:
            context.prefills = Prefills(
                places.spans,
                None if places.context is None else self._to_device(places.context),
                self._to_device(places.cu_new),
                self._to_device(places.cu_context),
            )
        return context

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        # (From pageable memory, a large copy would wait for the device.)
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _has_adapter(chunk: Chunk) -> bool:
    return chunk.sequence.adapter is not None


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


def _positions(decodes: list[Chunk], prefills: list[Chunk]) -> np.ndarray:
    """``(axes, T)``."""
    axes = (decodes or prefills)[0].sequence.positions.shape[0]
    decoded = np.array([c.start + c.sequence.delta for c in decodes], dtype=np.int64)
    parts = [np.broadcast_to(decoded, (axes, len(decoded)))]
    for chunk in prefills:
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
