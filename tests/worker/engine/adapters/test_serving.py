"""Requests with different adapters, and with none, run in one batch, and each is answered as
`PeftModel.generate` answers it alone, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.worker.engine.adapters.trained import CONFIGS, adapted, save, save_all
from tests.worker.engine.asking import ask, failed, finished
from tests.worker.engine.families.models import FAMILIES, load, reference, takes_images
from tests.worker.engine.native_engines import (
    BATCH,
    SIZES,
    assert_nothing_is_held,
    engine_for,
    longest,
    pixels,
)
from tests.worker.engine.test_native import SCHEDULES
from visq.errors import AdapterNotFound, ConfigurationError, EngineError
from visq.pixels import PixelBuffer
from worker.engine.adapters import LoraLinear
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, TokenEvent
from worker.engine.opening import open_engine

NAMES = (None, *CONFIGS)


@dataclass
class Served:
    """A model, its adapters, and what PEFT answers with them."""

    folder: Path
    adapters: dict[str, str]
    pictures: list[PixelBuffer]
    _answers: dict[tuple[int, str | None], list[int]] = field(default_factory=dict)

    def request(self, index: int, adapter: str | None) -> EngineRequest:
        text, shown, length = BATCH[index]
        images = [self.pictures[i] for i in shown if takes_images(self.folder)]
        return ask(text, *images, max_new_tokens=length, adapter=adapter)

    def expected(self, index: int, adapter: str | None) -> list[int]:
        key = index, adapter
        if key not in self._answers:
            with adapted(self.folder, adapter and self.adapters[adapter]):
                self._answers[key] = self.reference(self.request(index, adapter))
        return self._answers[key]

    def reference(self, request: EngineRequest) -> list[int]:
        length = request.gen_config.max_new_tokens or 0
        return reference(self.folder, request.messages, self.pictures_of(request), length)

    def pictures_of(self, request: EngineRequest) -> list[PixelBuffer]:
        return [image for image in request.images if isinstance(image, PixelBuffer)]


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[PixelBuffer]]:
    buffers = [PixelBuffer.create(pixels(seed), f"{seed:064x}") for seed in range(len(SIZES))]
    yield buffers
    for buffer in buffers:
        buffer.release()


def served(name: str, at: Path, pictures: list[PixelBuffer]) -> Served:
    folder = FAMILIES[name](at / name)
    return Served(folder, save_all(folder, at / f"{name}-adapters"), pictures)


@pytest.fixture(scope="module", params=["internvl", "qwen2_5_vl"])
def model(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    pictures: list[PixelBuffer],
) -> Served:
    return served(request.param, tmp_path_factory.mktemp("served"), pictures)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, pictures: list[PixelBuffer]) -> Served:
    return served("llama", tmp_path_factory.mktemp("served"), pictures)


@pytest.mark.parametrize(
    "schedule", ["small chunks", "preemption", "launched ahead", "preemption, launched ahead"]
)
def test_a_ragged_batch_is_answered_as_peft_answers_each_alone(
    model: Served, schedule: str
) -> None:
    fields: dict[str, Any] = dict(SCHEDULES[schedule])
    if fields.pop("tight", False):
        fields["blocks"] = 2 + longest(model.folder, model.pictures) // fields["block_size"]
    engine = engine_for(model.folder, adapters=model.adapters, **fields)
    asked = [(index, NAMES[index % len(NAMES)]) for index in range(len(BATCH))]
    try:
        for _ in range(2):
            handles = [engine.submit(model.request(*each)) for each in asked]
            answers = [finished(handle.result()).token_ids for handle in handles]
            assert answers == [model.expected(*each) for each in asked]
        if "preemption" in schedule:
            assert engine.stats().preemptions > 0
        assert_nothing_is_held(engine)
    finally:
        engine.close()


def test_the_same_question_has_another_answer_with_each_adapter(model: Served) -> None:
    answers = {tuple(model.expected(3, name)) for name in NAMES}
    assert len(answers) == len(NAMES)


def test_adapters_that_come_and_go_change_nothing_for_those_that_run(llama: Served) -> None:
    engine = engine_for(
        llama.folder, adapters=llama.adapters, adapter_bytes=1, max_batch_size=3, overlap=True
    )
    asked = [(index, name) for index in (0, 3, 4, 7) for name in NAMES]
    try:
        for _ in range(2):
            handles = [engine.submit(llama.request(*each)) for each in asked]
            answers = [finished(handle.result()).token_ids for handle in handles]
            assert answers == [llama.expected(*each) for each in asked]
        assert engine._adapters.loaded == [], "one byte is room for none that is not used"
    finally:
        engine.close()


def test_all_choices_of_a_request_are_made_with_its_adapter(llama: Served) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters)
    try:
        request = llama.request(3, "everything")
        config = request.gen_config.model_copy(update={"n": 3})
        answer = finished(engine.submit(replace(request, gen_config=config)).result())
        expected = llama.expected(3, "everything")
        assert [choice.token_ids for choice in answer.choices] == [expected] * 3
    finally:
        engine.close()


def test_logits_of_the_prompt_are_those_with_the_adapter(llama: Served) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters, max_step_tokens=7)
    try:
        request = ask("Hello", adapter="everything", max_new_tokens=1, output_logits="all")
        others = [engine.submit(llama.request(3, name)) for name in NAMES]
        answer = finished(engine.submit(request).result())
        for other in others:
            finished(other.result())
    finally:
        engine.close()
    network, tokenizer = load(llama.folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with adapted(llama.folder, llama.adapters["everything"]), torch.inference_mode():
        expected = network(ids).logits[0].numpy()
    logits = answer.choices[0].logits
    assert logits is not None
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=1e-3)


def test_adapters_share_no_blocks_unless_they_are_the_same(llama: Served) -> None:
    folders = {**llama.adapters, "twin": llama.adapters["attention"]}
    engine = engine_for(llama.folder, adapters=folders, block_size=4)
    try:
        hits = [
            finished(engine.submit(ask("x " * 25, adapter=name)).result()).cached_tokens > 0
            for name in (None, "attention", "stable", None, "attention", "twin")
        ]
        assert hits == [False, False, False, True, True, True]
    finally:
        engine.close()


def test_a_folder_that_was_written_anew_is_read_for_the_next_request_only(
    llama: Served, tmp_path: Path
) -> None:
    folder = save(llama.folder, tmp_path / "cats", seed=5, **CONFIGS["attention"])
    engine = engine_for(llama.folder, adapters={"cats": str(folder)}, block_size=4)
    request = ask("x " * 25, adapter="cats", max_new_tokens=24, ignore_eos=True)
    short = ask("x " * 25, adapter="cats", max_new_tokens=12)
    with adapted(llama.folder, folder):
        before = llama.reference(short)
    try:
        running = engine.submit(request)
        events = iter(running)
        assert isinstance(next(events), TokenEvent)
        save(llama.folder, folder, seed=6, **CONFIGS["attention"])
        with adapted(llama.folder, folder):
            after = llama.reference(short)
        assert before != after
        answer = finished(engine.submit(short).result())
        assert (answer.token_ids, answer.cached_tokens) == (after, 0)
        *_, last = events
        assert not isinstance(last, TokenEvent)
        assert finished(last).token_ids[: len(before)] == before
        assert finished(engine.submit(short).result()).cached_tokens > 0
    finally:
        engine.close()


def test_an_unknown_adapter_is_not_found_and_the_known_ones_are_named(llama: Served) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters)
    try:
        error = failed(engine.submit(ask(adapter="cats")).result()).error
        assert isinstance(error, AdapterNotFound)
        assert error.param == "adapter_name"
        assert "attention, everything, stable" in error.message
    finally:
        engine.close()


def test_an_adapter_that_cannot_be_used_fails_its_own_requests_only(
    llama: Served, tmp_path: Path
) -> None:
    engine = engine_for(llama.folder, adapters={**llama.adapters, "gone": str(tmp_path / "gone")})
    try:
        bad = engine.submit(ask(adapter="gone"))
        good = engine.submit(llama.request(0, "stable"))
        error = failed(bad.result()).error
        assert isinstance(error, EngineError)
        assert "'gone' cannot be used: its folder has no adapter_config.json" in error.message
        assert str(tmp_path) not in error.message, "paths are the operator's alone"
        assert finished(good.result()).token_ids == llama.expected(0, "stable")
    finally:
        engine.close()


def test_a_request_that_is_refused_or_cancelled_gives_its_adapter_back(llama: Served) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters, adapter_bytes=1)
    try:
        failed(engine.submit(ask("x" * 5000, adapter="stable")).result())
        handle = engine.submit(ask(adapter="attention", ignore_eos=True))
        handle.cancel()
        handle.result()
        finished(engine.submit(ask()).result())
        assert engine._adapters.loaded == []
    finally:
        engine.close()


def test_at_the_start_all_are_loaded_if_so_configured(llama: Served, tmp_path: Path) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters, preload_adapters=True)
    try:
        assert engine._adapters.loaded == list(llama.adapters)
    finally:
        engine.close()
    with pytest.raises(ConfigurationError, match="the adapter 'gone' cannot be used"):
        engine_for(llama.folder, adapters={"gone": str(tmp_path)}, preload_adapters=True)


def test_only_the_layers_that_an_adapter_changes_are_replaced(llama: Served) -> None:
    engine = engine_for(llama.folder, adapters=llama.adapters)
    model = engine._loaded.model
    before = {name: (module, module.weight) for name, module in linears(model).items()}
    try:
        finished(engine.submit(ask()).result())
        assert all(type(module) is nn.Linear for module in linears(model).values())
        finished(engine.submit(ask(adapter="attention")).result())
        for name, module in linears(model).items():
            if name.endswith(("q_proj", "v_proj")):
                assert type(module) is LoraLinear
                assert module.weight is before[name][1]
            else:
                assert module is before[name][0]
        assert set(model.state_dict()) == set(load(llama.folder)[0].state_dict())
    finally:
        engine.close()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}


def test_the_engine_generate_refuses_to_start_with_adapters(llama: Served) -> None:
    config = EngineConfig(
        model=str(llama.folder), device="cpu", engine="generate", adapters=llama.adapters
    )
    with pytest.raises(ConfigurationError, match="adapters need the native engine"):
        open_engine(config)
