"""Sampling, against a slow reference that does one row at a time by the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from worker.engine import sampler as module
from worker.engine.params import SamplingParams
from worker.engine.sampler import Sampled, Sampler, SampleRow, uniform

CPU = torch.device("cpu")
VOCAB = 40
GREEDY = SamplingParams(
    greedy=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=0,
    banned_ids=(),
    min_new_tokens=0,
    stop_ids=(),
    logprobs=None,
)
DRAWN = replace(GREEDY, greedy=False)


@dataclass(frozen=True)
class Case:
    """One row: all that its token may depend on."""

    logits: tuple[float, ...]
    params: SamplingParams
    generated: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None


def bitmask(allowed: Sequence[int], vocab_size: int = VOCAB) -> Tensor:
    words = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return torch.from_numpy(words.view(np.int32))


def sample(cases: Sequence[Case], dtype: torch.dtype = torch.float32) -> Sampled:
    """All cases in one batch, in slots that are not those of their rows."""
    sampler = Sampler(VOCAB, len(cases), CPU)
    rows = []
    for i, case in enumerate(cases):
        slot = len(cases) - 1 - i
        sampler.begin(slot, case.params, case.generated)
        mask = None if case.allowed is None else bitmask(case.allowed)
        rows.append(SampleRow(slot, len(case.generated), case.banned, mask))
    return sampler.sample(torch.tensor([case.logits for case in cases], dtype=dtype), rows)


def tokens_of(cases: Sequence[Case], dtype: torch.dtype = torch.float32) -> list[int]:
    return [int(token) for token in sample(cases, dtype).token_ids]


def edited(case: Case) -> list[float]:
    """The logits before the temperature; float32 rounding as the sampler's."""
    params = case.params
    scores = [np.float32(each) for each in case.logits]
    if case.allowed is not None:
        scores = [s if i in case.allowed else np.float32(-np.inf) for i, s in enumerate(scores)]
    penalty = np.float32(params.repetition_penalty)
    for token in set(case.generated):
        score = scores[token]
        scores[token] = score * penalty if score < 0 else score / penalty
    early = len(case.generated) < params.min_new_tokens
    for token in {*params.banned_ids, *(params.stop_ids if early else ()), *case.banned}:
        if scores[token] != -np.inf:
            scores[token] = np.finfo(np.float32).min
    return [float(score) for score in scores]


def reference(case: Case, nudge: tuple[float, float, float] = (0, 0, 0)) -> int:
    """The token by the definitions; `nudge` moves top-p, min-p and the random number."""
    params = case.params
    scores = edited(case)
    order = sorted(range(VOCAB), key=lambda token: (-scores[token], token))
    best = scores[order[0]]
    if params.greedy or not math.isfinite(best):
        return order[0]
    weights = [math.exp((scores[token] - best) / params.temperature) for token in order]
    top_k = weights[: params.top_k or VOCAB]
    total = sum(top_k)
    kept: list[float] = []
    for weight in top_k:
        inside = not kept or sum(kept) <= (params.top_p + nudge[0]) * total
        if not inside or weight < params.min_p + nudge[1]:
            break
        kept.append(weight)
    kept = kept or weights[:1]
    target = (uniform(params.seed, len(case.generated)) + nudge[2]) * sum(kept)
    reached = 0.0
    for token, weight in zip(order, kept, strict=False):
        reached += weight
        if reached > target:
            return token
    return order[len([weight for weight in kept if weight]) - 1]


def right_tokens(case: Case) -> set[int]:
    """One token, or two if rounding decides between them."""
    eps = 1e-9
    nudges = [(p, m, u) for p in (-eps, 0, eps) for m in (-eps, 0, eps) for u in (-eps, 0, eps)]
    return {reference(case, nudge) for nudge in nudges}


SOME_TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple)
LOGITS = st.one_of(
    st.lists(  # many equal ones
        st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 3.0, -math.inf]),
        min_size=VOCAB,
        max_size=VOCAB,
    ),
    st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB),
).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    greedy=st.booleans(),
    temperature=st.one_of(st.floats(0.05, 2), st.just(1e-5)),
    top_k=st.one_of(st.just(0), st.integers(2, VOCAB)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 10)),
    seed=st.integers(0, 2**63 - 1),
    banned_ids=SOME_TOKENS,
    min_new_tokens=st.integers(0, 8),
    stop_ids=SOME_TOKENS,
    logprobs=st.none(),
)
CASES = st.builds(
    Case,
    logits=LOGITS,
    params=PARAMS,
    generated=SOME_TOKENS,
    banned=SOME_TOKENS,
    allowed=st.one_of(st.none(), SOME_TOKENS.filter(len)),
)


@settings(max_examples=120, deadline=None)
@given(cases=st.lists(CASES, min_size=1, max_size=6))
def test_every_row_of_a_batch_gets_the_token_of_the_definitions(cases: list[Case]) -> None:
    for case, token in zip(cases, tokens_of(cases), strict=True):
        assert token in right_tokens(case)


@settings(max_examples=60, deadline=None)
@given(
    case=CASES,
    before=st.lists(CASES, max_size=3),
    after=st.lists(CASES, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_gets_the_same_token_alone_and_in_any_company(
    case: Case, before: list[Case], after: list[Case], dtype: torch.dtype
) -> None:
    assert tokens_of([*before, case, *after], dtype)[len(before)] == tokens_of([case], dtype)[0]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 4),
        ({"top_k": 2}, 2),
        ({"top_k": 3, "top_p": 0.75}, 2),  # of three, the first two have 0.78
        ({"top_p": 0.35}, 1),
        ({"top_p": 0.45}, 2),
        ({"top_p": 0.75}, 3),
        ({"min_p": 0.7}, 2),  # relative to the likeliest: 1, 0.75, 0.5, 0.25
        ({"min_p": 0.45}, 3),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.45, "temperature": 0.5}, 2),  # 1, 0.56, 0.25, 0.06
    ],
)
def test_top_k_top_p_and_min_p_keep_the_likeliest_tokens(
    changes: dict[str, Any], kept: int
) -> None:
    sampler = Sampler(4, 1, CPU)
    sampler.begin(0, replace(DRAWN, **changes))
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(400, 4)
    tokens = sampler.sample(logits, [SampleRow(0, step) for step in range(400)]).token_ids
    assert set(tokens.tolist()) == set(range(kept))


def test_each_row_of_a_batch_has_its_own_top_k() -> None:
    sampler = Sampler(4, 2, CPU)
    sampler.begin(0, replace(DRAWN, top_k=2))
    sampler.begin(1, replace(DRAWN, top_k=3))
    rows = [SampleRow(slot, step) for slot in range(2) for step in range(100)]
    tokens = sampler.sample(torch.zeros(200, 4), rows).token_ids
    assert set(tokens[:100].tolist()) == {0, 1}
    assert set(tokens[100:].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_stop_tokens_may_come_after_min_new_tokens_others(params: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 1.0, 90.0, 0.0]])
    sampler = Sampler(4, 1, CPU)
    sampler.begin(0, replace(params, stop_ids=(2,), min_new_tokens=3))
    stopped = [
        int(sampler.sample(logits, [SampleRow(0, step)]).token_ids[0]) == 2 for step in range(5)
    ]
    assert stopped == [False, False, False, True, True]


def test_selection_and_whole_sort_order_equal_logits_alike() -> None:
    torch.manual_seed(0)
    size = 5000
    logits = torch.randn(64, size).mul(2).bfloat16()  # a few hundred different values
    rows = [SampleRow(0, step) for step in range(64)]
    drawn = []
    for top_k in (0, size - 1, module.TOP_K_LIMIT):
        sampler = Sampler(size, 1, CPU)
        sampler.begin(0, replace(DRAWN, top_k=top_k, top_p=0.5))
        drawn.append(sampler.sample(logits, rows).token_ids.tolist())
    assert drawn[0] == drawn[1]
    values = logits[0].float().sort(descending=True, stable=True)
    kept = set(values.indices[: module.TOP_K_LIMIT].tolist())
    assert drawn[2][0] in kept
    assert len(set(drawn[0])) > 50


def test_rows_sorted_in_several_parts_get_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    cases = [
        Case(tuple(torch.randn(VOCAB).tolist()), replace(DRAWN, seed=seed)) for seed in range(9)
    ]
    whole = tokens_of(cases)
    monkeypatch.setattr(module, "SORT_ELEMENTS", 2 * VOCAB)
    assert tokens_of(cases) == whole


def test_a_greedy_batch_is_one_argmax() -> None:
    names: list[str] = []

    class Operations(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    sampler = Sampler(VOCAB, 2, CPU)
    sampler.begin(0, GREEDY)
    sampler.begin(1, replace(GREEDY, stop_ids=(3,), min_new_tokens=2))
    logits = torch.randn(2, VOCAB)
    rows = [SampleRow(0, 0), SampleRow(1, 2)]
    with Operations():
        sampled = sampler.sample(logits, rows)
    assert names == ["aten.argmax.default"]
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    sampler = Sampler(VOCAB, 1, CPU)
    sampler.begin(0, replace(DRAWN, repetition_penalty=2.0, banned_ids=(1,)), [5, 6])
    sampler.sample(
        logits, [SampleRow(0, 2, (4,), bitmask(range(20)), [lambda _, row: row.zero_()])]
    )
    assert torch.equal(logits, before)


def chi_square(counts: np.ndarray[Any, Any], probabilities: np.ndarray[Any, Any]) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["step", "seed"])
def test_tokens_come_as_often_as_their_probability_says(vary: str) -> None:
    draws = 4000
    logits = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.0, 1.5, -0.5, 0.8])
    sampler = Sampler(8, draws, CPU)
    for slot in range(draws):
        sampler.begin(slot, replace(DRAWN, temperature=0.7, seed=slot if vary == "seed" else 7))
    rows = [SampleRow(slot, slot if vary == "step" else 0) for slot in range(draws)]
    tokens = sampler.sample(logits.expand(draws, 8), rows).token_ids.numpy()
    probabilities = (logits.double() / 0.7).softmax(-1).numpy()
    # The 99.9 % point of the chi-square distribution with seven degrees of freedom.
    assert chi_square(np.bincount(tokens, minlength=8), probabilities) < 24.3


def test_the_random_number_of_a_step_never_changes() -> None:
    # Written down: answers to a seed must stay the same over versions of visq.
    assert [uniform(0, 0), uniform(0, 1), uniform(2**63 - 1, 9)] == [
        0.0564663990004608,
        0.44008326622012284,
        0.35739643261927356,
    ]
    assert all(0 <= uniform(seed, 3) < 1 for seed in range(1000))


@given(
    logits=st.lists(LOGITS, min_size=6, max_size=6),
    penalty=st.floats(0.5, 3),
    greedy=st.booleans(),
    cut=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None)
def test_a_sequence_goes_on_after_a_preemption_as_without(
    logits: list[tuple[float, ...]], penalty: float, greedy: bool, cut: int
) -> None:
    params = replace(DRAWN, greedy=greedy, repetition_penalty=penalty, seed=11)

    def run(preempted_at: int | None) -> list[int]:
        sampler = Sampler(VOCAB, 2, CPU)
        slot = 0
        sampler.begin(slot, params)
        tokens: list[int] = []
        for step, row in enumerate(logits):
            if step == preempted_at:
                slot = 1
                sampler.begin(slot, params, tokens)
            sampled = sampler.sample(torch.tensor([row]), [SampleRow(slot, step)])
            tokens.append(int(sampled.token_ids[0]))
        return tokens

    assert run(cut) == run(None)


def test_the_next_owner_of_a_slot_inherits_no_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 1.0
    sampler = Sampler(VOCAB, 1, CPU)
    penalised = replace(GREEDY, repetition_penalty=10.0, banned_ids=(0,))
    sampler.begin(0, penalised, [1, 2, 4])
    assert sampler.sample(logits - 0.5, [SampleRow(0, 3)]).token_ids.tolist() == [4]
    assert sampler.sample(logits - 2, [SampleRow(0, 4)]).token_ids.tolist() == [3]
    sampler.begin(0, penalised)
    assert sampler.sample(logits - 2, [SampleRow(0, 0)]).token_ids.tolist() == [4]


@pytest.mark.parametrize("params", [GREEDY, DRAWN, replace(DRAWN, top_k=5)])
def test_broken_logits_are_decided_as_if_greedy(params: SamplingParams) -> None:
    fine = Case((0.0,) * VOCAB, replace(DRAWN, seed=3))
    nan = Case((0.0,) * 7 + (math.nan,) + (9.0,) * (VOCAB - 8), params)
    negative_nan = Case((*nan.logits[:7], -math.nan, *nan.logits[8:]), params)
    infinite = Case((0.0,) * 9 + (math.inf,) * (VOCAB - 9), params)
    nothing = Case((-math.inf,) * VOCAB, params)
    forbidden_nan = replace(nan, allowed=(2,))
    banned_nan = replace(nan, banned=tuple(set(range(VOCAB)) - {30}))
    all_nan = Case((math.nan,) * VOCAB, params, allowed=(5, 6))
    cases = [nan, negative_nan, infinite, nothing, forbidden_nan, banned_nan, all_nan, fine]
    assert tokens_of(cases) == [7, 7, 9, 0, 2, 30, 5, tokens_of([fine])[0]]


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_where_a_grammar_leaves_only_banned_tokens_the_grammar_wins(params: SamplingParams) -> None:
    case = Case((1.0,) * VOCAB, params, banned=tuple(range(VOCAB)), allowed=(33,))
    assert tokens_of([case]) == [33]


def test_processors_are_called_with_the_tokens_and_change_the_logits() -> None:
    seen = []

    def only_nine(token_ids: Tensor, logits: Tensor) -> Tensor:
        seen.append((token_ids.tolist(), token_ids.dtype, logits.dtype))
        return torch.where(torch.arange(VOCAB) == 9, logits, -torch.inf)

    sampler = Sampler(VOCAB, 1, CPU)
    sampler.begin(0, DRAWN)
    row = SampleRow(0, 2, processors=[only_nine], token_ids=[4, 5])
    assert sampler.sample(torch.zeros(1, VOCAB).bfloat16(), [row]).token_ids.tolist() == [9]
    assert seen == [([4, 5], torch.int64, torch.float32)]


def test_a_failing_processor_fails_its_own_row_only() -> None:
    def fails(token_ids: Tensor, logits: Tensor) -> Tensor:
        raise KeyError("mine")

    sampler = Sampler(VOCAB, 3, CPU)
    logits = torch.randn(3, VOCAB)
    for slot in range(3):
        sampler.begin(slot, GREEDY)
    rows = [
        SampleRow(0, 0),
        SampleRow(1, 0, processors=[fails]),
        SampleRow(2, 0, processors=[lambda _, row: row[:3]]),
    ]
    sampled = sampler.sample(logits, rows)
    assert sampled.token_ids[0] == logits[0].argmax()
    assert {row: type(error) for row, error in sampled.failed.items()} == {
        1: KeyError,
        2: ValueError,
    }


def test_logprobs_are_of_the_raw_logits_with_the_generated_token_first() -> None:
    torch.manual_seed(4)
    logits = torch.randn(4, VOCAB)
    logits[2, 3:9] = 6.0  # equal ones
    params = replace(DRAWN, temperature=2.0, repetition_penalty=3.0, banned_ids=(0, 1, 2))
    sampler = Sampler(VOCAB, 4, CPU)
    for slot, count in enumerate([3, None, 4, 0]):
        sampler.begin(slot, replace(params, logprobs=count, seed=slot), [5, 6, 7])
    sampled = sampler.sample(logits, [SampleRow(slot, 3) for slot in range(4)])
    assert sampled.logprobs is not None
    found = sampled.unpack_logprobs(sampled.logprobs.cpu())
    assert list(found) == [0, 2, 3]
    raw = logits.double().log_softmax(-1)
    for row, count in ((0, 3), (2, 4), (3, 0)):
        token = int(sampled.token_ids[row])
        likeliest = sorted(range(VOCAB), key=lambda each: (-float(raw[row, each]), each))[:count]
        assert list(found[row]) == list(dict.fromkeys([token, *likeliest]))
        for each, value in found[row].items():
            assert value == pytest.approx(float(raw[row, each]), abs=1e-5)
