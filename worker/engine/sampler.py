"""From logits to tokens, for a whole batch on the device, each row by its own parameters.

A row's token never depends on its neighbours, on the order of work, or on a preemption:

- Its random number is one uniform of (seed, step), made on the host by BLAKE2b: the same on every
  version of every library, without a state, and cheaper than to set up a counter-based generator
  of numpy for each row.
- Tokens are ordered by logit, and equal logits (frequent in bf16) by id: a total order, which no
  algorithm of a larger batch can change. The token is found by inverse CDF in that order.

Order of edits, as LMDeploy's: grammar, custom processors, repetition penalty, bans (bad tokens, and
stop tokens that may not come yet), temperature, top-k, top-p, min-p.

Two rules for what has no good answer:

- A ban is the least finite number, a grammar's mask is -inf and stays so: where a grammar leaves
  nothing but banned tokens, the grammar wins.
- If the largest logit of a row is not finite (a NaN is the largest of all), the row is decided as
  if greedy: no draw from a broken distribution, no error on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import repeat
from typing import Final, TypeAlias

import torch
from torch import Tensor

from worker.engine.face import Logprobs
from worker.engine.params import SamplingParams

BANNED: Final = torch.finfo(torch.float32).min
TOP_K_LIMIT: Final = 1024
"""Rows with a `top_k` up to this are cut by a selection, the others are sorted whole."""
SORT_ELEMENTS: Final = 1 << 24
"""Most logits that are sorted at a time; bounds the memory for whole sorts."""

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(token ids (T,) int64, logits (vocabulary,) float32) -> logits``, as LMDeploy's
``logits_processors``. It may change the logits in place."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of a batch: who it is, and what holds for this step only."""

    slot: int
    step: int
    """Number of tokens generated so far."""
    banned: Sequence[int] = ()
    """Tokens that must not come in this step."""
    bitmask: Tensor | None = None
    """What a grammar allows: (ceil(vocabulary / 32),) int32, bit ``i % 32`` of word ``i // 32``."""
    processors: Sequence[Processor] = ()
    token_ids: Sequence[int] = ()
    """What `processors` are called with."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of a step, still on the device."""

    token_ids: Tensor
    """(rows,) int64."""
    logprobs: Tensor | None = None
    """(rows that asked, 1 + most alternatives, 2) int32: token ids, and the bits of float32 log
    probabilities. Copy it to the host, then `unpack_logprobs`."""
    logprob_rows: Sequence[tuple[int, int]] = ()
    """Of each row of `logprobs`: its row in the batch, and how many alternatives it asked for."""
    failed: Mapping[int, Exception] = field(default_factory=dict)
    """By row: what its processor raised. The token of such a row means nothing."""

    def unpack_logprobs(self, host: Tensor) -> dict[int, Logprobs]:
        """By row of the batch; `host` is `logprobs` copied to the CPU."""
        ids = host[..., 0].tolist()
        values = host[..., 1].contiguous().view(torch.float32).tolist()
        return {
            row: dict(zip(ids[i][: 1 + count], values[i][: 1 + count], strict=True))
            for i, (row, count) in enumerate(self.logprob_rows)
        }


class Sampler:
    """Samples batches; a running sequence owns one of its slots."""

    def __init__(self, vocab_size: int, slots: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._slots = slots
        self._device = device
        self._params: dict[int, SamplingParams] = {}
        self._seen: Tensor | None = None  # (slots, vocabulary) bool: generated tokens
        # Places of what the rows of the last plain batch ban, and whose rows they were.
        self._bans: tuple[Tensor, Tensor] | None = None
        self._bans_of: tuple[int, ...] | None = None
        self._least: Tensor | None = None
        # By bit of a grammar's word; int32, and -2**31 for the last.
        self._bits = torch.tensor([1 << bit for bit in range(32)], device=device).to(torch.int32)
        # Added to the key of a logit, so that of equal logits the lower id is the larger key.
        self._id_keys = torch.arange(vocab_size - 1, -1, -1, device=device)

    @torch.no_grad()
    def begin(self, slot: int, params: SamplingParams, generated: Sequence[int] = ()) -> None:
        """Give `slot` to a sequence; whoever had it has it no longer.

        :param generated: the tokens that it has already, if it goes on after a preemption.
        """
        self._params[slot] = params
        self._bans_of = None
        if params.repetition_penalty == 1.0:
            return
        if self._seen is None:
            with torch.inference_mode(False):  # it outlives any one step
                shape = (self._slots, self._vocab_size)
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._seen[slot] = False
        if generated:
            self._seen[slot].index_fill_(0, self._upload(sorted(set(generated))), True)

    @torch.no_grad()
    def sample_plain(self, logits: Tensor, slots: Sequence[int]) -> Tensor:
        """The same as `sample`, of rows whose parameters are `SamplingParams.plain`: (rows,).

        The batch of a step is mostly that of the step before, so the host has nothing to do.

        :param logits: (rows, vocabulary); banned ones are changed.
        """
        who = tuple(slots)
        if who != self._bans_of:
            at = [(row, i) for row, slot in enumerate(who) for i in self._params[slot].banned_ids]
            self._bans = None
            if at:
                rows, ids = zip(*at, strict=True)
                self._bans = self._upload(rows), self._upload(ids)
            self._bans_of = who
        if self._bans is not None:
            if self._least is None or self._least.dtype != logits.dtype:
                least = torch.finfo(logits.dtype).min
                self._least = torch.full((), least, dtype=logits.dtype, device=self._device)
            # (A number in place of the tensor would be copied to the device, and waited for.)
            logits.index_put_(self._bans, self._least)
        return logits.argmax(-1)

    @torch.no_grad()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
        """Choose the next token of each row; nothing waits for the device.

        :param logits: (rows, vocabulary), of any floating type; not changed.
        :raises nothing: for what a row's processor raises: that is in `Sampled.failed`.
        """
        params = [self._params[row.slot] for row in rows]
        plain = [i for i, row in enumerate(rows) if self._is_plain(row, params[i])]
        failed: dict[int, Exception] = {}
        if len(plain) == len(rows):
            tokens = logits.argmax(-1)
        else:
            left = set(plain)
            worked = [i for i in range(len(rows)) if i not in left]
            chosen = self._work(logits, rows, params, worked, failed)
            if plain:
                tokens = logits.argmax(-1).index_copy_(0, self._upload(worked), chosen)
            else:
                tokens = chosen
        asked = [(i, each.logprobs) for i, each in enumerate(params) if each.logprobs is not None]
        packed = self._pack_logprobs(logits, tokens, asked) if asked else None
        # Last, since a step that fails before is computed once more, after the same tokens.
        self._note(tokens, rows, params)
        return Sampled(tokens, packed, asked, failed)

    @staticmethod
    def _is_plain(row: SampleRow, params: SamplingParams) -> bool:
        """Whether its token is the argmax of the logits as they are."""
        return (
            params.greedy
            and params.repetition_penalty == 1.0
            and not params.banned_ids
            and not (params.stop_ids and row.step < params.min_new_tokens)
            and not row.banned
            and row.bitmask is None
            and not row.processors
        )

    def _work(
        self,
        logits: Tensor,
        all_rows: Sequence[SampleRow],
        all_params: Sequence[SamplingParams],
        worked: Sequence[int],
        failed: dict[int, Exception],
    ) -> Tensor:
        """The tokens of the rows `worked`: (len(worked),)."""
        rows = [all_rows[i] for i in worked]
        params = [all_params[i] for i in worked]
        if len(worked) == len(all_rows):
            scores = logits.to(torch.float32, copy=True)
        else:
            scores = logits.index_select(0, self._upload(worked)).float()
        self._apply_bitmasks(scores, rows)
        for i, row in enumerate(rows):
            if row.processors:
                error = self._run_processors(scores[i], row)
                if error is not None:
                    failed[worked[i]] = error
        penalised = [i for i, each in enumerate(params) if each.repetition_penalty != 1.0]
        slots = self._upload([rows[i].slot for i in penalised])
        if penalised:
            self._penalise(scores, penalised, slots, [params[i] for i in penalised])
        self._ban(scores, rows, params)
        return self._choose(scores, rows, params)

    def _note(
        self, tokens: Tensor, rows: Sequence[SampleRow], params: Sequence[SamplingParams]
    ) -> None:
        """Remember the tokens of those rows that are penalised for them: on the device, so that the
        next step can start before the host knows the tokens."""
        penalised = [i for i, each in enumerate(params) if each.repetition_penalty != 1.0]
        if penalised:
            assert self._seen is not None
            slots = self._upload([rows[i].slot for i in penalised])
            self._seen[slots, tokens.index_select(0, self._upload(penalised))] = True

    def _apply_bitmasks(self, scores: Tensor, rows: Sequence[SampleRow]) -> None:
        masks = [(i, row.bitmask) for i, row in enumerate(rows) if row.bitmask is not None]
        if not masks:
            return
        words = torch.stack([mask for _, mask in masks]).to(self._device, non_blocking=True)
        allowed = (words.unsqueeze(-1) & self._bits).ne(0).flatten(1)[:, : self._vocab_size]
        index = self._upload([i for i, _ in masks])
        kept = scores.index_select(0, index).masked_fill_(~allowed, -torch.inf)
        scores.index_copy_(0, index, kept)

    def _run_processors(self, scores: Tensor, row: SampleRow) -> Exception | None:
        """Change one row of scores, (vocabulary,), in place; return what went wrong."""
        token_ids = torch.tensor(list(row.token_ids), dtype=torch.int64, device=self._device)
        try:
            result = scores
            for processor in row.processors:
                result = processor(token_ids, result)
            if result.shape != scores.shape:
                raise ValueError(
                    f"a logits processor returned the shape {tuple(result.shape)} in place of "
                    f"{tuple(scores.shape)}"
                )
            scores.copy_(result)
        except Exception as error:  # noqa: BLE001  (a stranger's code: only its own row fails)
            return error
        return None

    def _penalise(
        self, scores: Tensor, at: Sequence[int], slots: Tensor, params: Sequence[SamplingParams]
    ) -> None:
        """Repetition penalty (Keskar et al. 2019, CTRL, 4.1) over the generated tokens."""
        assert self._seen is not None
        penalty = self._upload([each.repetition_penalty for each in params]).float()[:, None]
        index = self._upload(at)
        old = scores.index_select(0, index)
        new = torch.where(old < 0, old * penalty, old / penalty)
        seen = self._seen.index_select(0, slots)
        scores.index_copy_(0, index, torch.where(seen, new, old))

    def _ban(
        self, scores: Tensor, rows: Sequence[SampleRow], params: Sequence[SamplingParams]
    ) -> None:
        at: list[int] = []
        ids: list[int] = []
        for i, (row, each) in enumerate(zip(rows, params, strict=True)):
            early = row.step < each.min_new_tokens
            for banned in (each.banned_ids, each.stop_ids if early else (), row.banned):
                at.extend(repeat(i, len(banned)))
                ids.extend(banned)
        if ids:
            places = self._upload(at), self._upload(ids)
            old = scores[places]
            scores[places] = old.masked_fill(old != -torch.inf, BANNED)

    def _choose(
        self, scores: Tensor, rows: Sequence[SampleRow], params: Sequence[SamplingParams]
    ) -> Tensor:
        """(rows,): the likeliest tokens of greedy rows, drawn ones of the others."""
        tokens = scores.argmax(-1)
        drawn = [i for i, each in enumerate(params) if not each.greedy]
        few = [i for i in drawn if 0 < params[i].top_k <= TOP_K_LIMIT]
        many = [i for i in drawn if not 0 < params[i].top_k <= TOP_K_LIMIT]
        if few:
            index = self._upload(few)
            width = max(params[i].top_k for i in few)
            chosen = scores.index_select(0, index)
            values, ids = self._largest(chosen, width)
            self._draw(tokens, index, chosen, values, ids, self._knobs(few, rows, params))
        size = max(1, SORT_ELEMENTS // self._vocab_size)
        for part in (many[start : start + size] for start in range(0, len(many), size)):
            index = self._upload(part)
            chosen = scores.index_select(0, index)
            values, ids = chosen.sort(dim=-1, descending=True, stable=True)
            self._draw(tokens, index, chosen, values, ids, self._knobs(part, rows, params))
        return tokens

    def _knobs(
        self, part: Sequence[int], rows: Sequence[SampleRow], params: Sequence[SamplingParams]
    ) -> Tensor:
        """(part, 5) float64: what `draw` needs, in one copy to the device."""
        table: list[float] = []
        for i in part:
            each = params[i]
            top_k = each.top_k or self._vocab_size
            random = uniform(each.seed, rows[i].step)
            table += (each.temperature, top_k, each.top_p, each.min_p, random)
        return self._upload(table).view(-1, 5)

    @staticmethod
    def _draw(
        tokens: Tensor, index: Tensor, scores: Tensor, values: Tensor, ids: Tensor, knobs: Tensor
    ) -> None:
        """Put drawn tokens into `tokens` at `index`, but for rows that cannot be drawn from."""
        drawn = ids.gather(1, draw(values, knobs)).squeeze(1)
        likeliest = tokens.index_select(0, index)
        sane = scores.gather(1, likeliest.unsqueeze(1)).squeeze(1).isfinite()
        tokens.index_copy_(0, index, torch.where(sane, drawn, likeliest))

    def _largest(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of each row in order, of equal ones the lowest ids: values and ids.

        `topk` alone takes any of equal values. So it is given keys that are never equal: a float32
        as an integer of the same order, above the id.
        """
        # (+ 0.0: minus zero becomes zero.) Magnitudes of negative floats rise as they fall.
        bits = (scores + 0.0).view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        keys = ordered.long() * 2**32 + self._id_keys
        ids = self._vocab_size - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
        return scores.gather(1, ids), ids

    def _pack_logprobs(
        self, logits: Tensor, tokens: Tensor, asked: Sequence[tuple[int, int]]
    ) -> Tensor:
        index = self._upload([i for i, _ in asked])
        raw = logits.index_select(0, index).float().log_softmax(-1)
        ids = tokens.index_select(0, index).unsqueeze(1)
        most = max(count for _, count in asked)
        if most:
            ids = torch.cat((ids, self._largest(raw, most)[1]), dim=1)
        values = raw.gather(1, ids)
        return torch.stack((ids.int(), values.view(torch.int32)), dim=-1)

    def _upload(self, values: Sequence[int] | Sequence[float]) -> Tensor:
        """(n,) int64 or float64 on the device."""
        real = bool(values) and isinstance(values[0], float)
        host = torch.tensor(values, dtype=torch.float64 if real else torch.int64)
        return host.to(self._device, non_blocking=True)


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) of one step: 53 bits of BLAKE2b over both."""
    digest = blake2b(seed.to_bytes(8, "little") + step.to_bytes(8, "little"), digest_size=8)
    return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53


def draw(values: Tensor, knobs: Tensor) -> Tensor:
    """Draw by inverse CDF from the tokens that top-k, top-p and min-p keep.

    Every one of these keeps the first tokens of the order, so the sum of those kept stands in the
    cumulative sum. Top-p keeps a token if the probability of those before it is at most ``top_p``,
    so always the first one.

    :param values: (rows, width) float32, largest first.
    :param knobs: (rows, 5) float64: temperature, top-k, top-p, min-p, uniform random number.
    :returns: (rows, 1) int64: places in `values`. A row of `values` that starts with NaN or an
        infinite number gives some place.
    """
    temperature, top_k, top_p, min_p, random = torch.unbind(knobs.unsqueeze(-1), dim=1)
    wide = values.double()
    weights = ((wide - wide[:, :1]) / temperature).exp()  # of the largest: 1
    places = torch.arange(values.shape[1], device=values.device)
    weights = weights.masked_fill(places >= top_k, 0.0)
    sums = weights.cumsum(1)
    before = sums - weights
    kept = (before <= top_p * sums[:, -1:]) & (weights >= min_p) & (weights > 0)
    last = kept.sum(1, keepdim=True).clamp(min=1) - 1
    target = random * sums.gather(1, last)
    return torch.searchsorted(sums, target, right=True).minimum(last)
