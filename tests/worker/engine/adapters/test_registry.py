"""Which adapters are in memory, from which names their layers are known, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.engine.adapters.trained import CONFIGS, save, save_all
from tests.worker.engine.families.models import FAMILIES
from visq.errors import EngineError
from worker.engine.adapters import Adapter, Adapters
from worker.engine.adapters.peft_files import CONFIG, MAX_RANK, PICKLE, PREFIX, WEIGHTS
from worker.engine.config import EngineConfig
from worker.engine.families import family_of
from worker.engine.loaders.internvl2_weights import split_wqkv
from worker.engine.loading import LoadedModel, load

LAYER = "model.language_model.layers.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["internvl"](tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load(EngineConfig(model=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_all(folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def copy(folders: dict[str, str], tmp_path: Path) -> Path:
    """Of the adapter `everything`, to be changed."""
    return Path(shutil.copytree(folders["everything"], tmp_path / "copy"))


def registry(model: LoadedModel, folders: dict[str, str], nbytes: int = 10**9) -> Adapters:
    family = family_of(model.model, model.processor)
    assert family is not None
    return Adapters(model, family, folders, nbytes=nbytes)


def load_one(model: LoadedModel, folder: Path) -> Adapter:
    return registry(model, {"it": str(folder)}).acquire("it")


def refusal(model: LoadedModel, folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        load_one(model, folder)
    assert caught.value.param == "adapter_name"
    return caught.value.message


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {PREFIX + new_name(k.removeprefix(PREFIX)): t for k, t in tensors.items()}, folder / WEIGHTS
    )


def assert_same(one: Adapter, other: Adapter) -> None:
    assert set(one.layers) == set(other.layers)
    for path, low in one.layers.items():
        assert torch.equal(low.up @ low.down, other.layers[path].up @ other.layers[path].down)


# --- memory ----------------------------------------------------------------------------------


def test_the_one_that_was_not_used_for_longest_is_forgotten_first(
    model: LoadedModel, folders: dict[str, str]
) -> None:
    probe = registry(model, folders)
    nbytes = sum(probe.acquire(name).nbytes for name in folders) - 1
    adapters = registry(model, folders, nbytes)
    for name in ("attention", "stable", "attention", "everything"):
        adapters.release(adapters.acquire(name))
    assert adapters.loaded == ["attention", "everything"]


def test_one_that_is_held_is_not_forgotten_before_its_last_release(
    model: LoadedModel, folders: dict[str, str]
) -> None:
    adapters = registry(model, folders, nbytes=1)
    first, again = adapters.acquire("stable"), adapters.acquire("stable")
    assert first is again
    adapters.release(adapters.acquire("attention"))
    assert adapters.loaded == ["stable"]
    adapters.release(first)
    assert adapters.loaded == ["stable"]
    adapters.release(again)
    assert adapters.loaded == []
    assert adapters.acquire("stable").digest == first.digest


def test_another_scaling_is_another_content(model: LoadedModel, copy: Path) -> None:
    adapters = registry(model, {"it": str(copy)})
    first = adapters.acquire("it")
    change_config(copy, lora_alpha=77)
    second = adapters.acquire("it")
    assert first.digest != second.digest


# --- names -----------------------------------------------------------------------------------


def _before_4_52(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head", "language_model.lm_head")


def _of_the_language_model(name: str) -> str:
    return name.replace("model.language_model.", "model.")


@pytest.mark.parametrize("scheme", [_before_4_52, _of_the_language_model])
def test_names_of_other_versions_mean_the_same_layers(
    model: LoadedModel, folders: dict[str, str], copy: Path, scheme: Callable[[str], str]
) -> None:
    rename(copy, scheme)
    assert_same(load_one(model, copy), registry(model, folders).acquire("everything"))


def test_published_internvl2_names_and_its_fused_projection_are_understood(
    model: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    adapter = save(folder, tmp_path / "it", **CONFIGS["attention"])
    stem = "language_model.model.layers.0"
    parts = {
        "attention.wqkv": (torch.randn(4, 32), torch.randn(64, 4)),
        "attention.wo": (torch.randn(4, 32), torch.randn(32, 4)),
        "feed_forward.w2": (torch.randn(4, 64), torch.randn(32, 4)),
    }
    save_file(
        {
            f"{PREFIX}{stem}.{name}.lora_{letter}.weight": tensor
            for name, pair in parts.items()
            for letter, tensor in zip("AB", pair, strict=True)
        },
        adapter / WEIGHTS,
    )
    layers = load_one(model, adapter).layers
    a, b = parts["attention.wqkv"]
    whole = split_wqkv(2.0 * b @ a, model.model.config.get_text_config())
    for name, expected in zip(("q_proj", "k_proj", "v_proj"), whole, strict=True):
        low = layers[f"{LAYER}.self_attn.{name}"]
        torch.testing.assert_close(low.up @ low.down, expected)
    for published, native in (
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
    ):
        a, b = parts[published]
        low = layers[f"{LAYER}.{native}"]
        torch.testing.assert_close(low.up @ low.down, 2.0 * b @ a)
    assert len(layers) == 5


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("bias", "all"),
        ("target_parameters", ["experts.up"]),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("peft_type", "LOHA"),
        ("lora_alpha", "much"),
        ("r", 3),
        ("alpha_pattern", {"(": 1}),
        ("a_field_of_next_year", {"on": True}),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_its_name(
    model: LoadedModel, copy: Path, name: str, value: object
) -> None:
    change_config(copy, **{name: value})
    message = refusal(model, copy)
    names = {"r": "its rank is 2", "alpha_pattern": "not a regular expression"}
    assert names.get(name, f"{name}={value!r}") in message


def _set(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({PREFIX + key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}lm_head.lora_B.weight"), "lacks .*lm_head.lora_B.weight"),
        (lambda t: t.pop(f"{PREFIX}lm_head.lora_A.weight"), "lacks .*lm_head.lora_A.weight"),
        (lambda t: t.clear(), "no LoRA weights"),
        (_set("lm_head.lora_magnitude_vector", 3), "not understood: .*lora_magnitude_vector"),
        (_set("model.embed_tokens.lora_embedding_A", 2, 3), "not understood: .*lora_embedding_A"),
        (_set("lm_head.lora_A.weight", 5), r"lora_A \(5,\) and lora_B \(263, 2\) do not fit"),
        (_set("lm_head.lora_A.weight", 2, 31), "31 to 263 features, but lm_head has 32 to 263"),
        (_set("lm_head.lora_B.bias", 7), r"the bias \(7,\) does not fit"),
        (_set("lm_head.base_layer.weight", 263, 32), "weights of its own for lm_head"),
        (_set("model.language_model.norm.weight", 32, 1), "weights of its own for .*norm"),
        (_set("nowhere.weight", 1), "weights of its own for nowhere"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_their_names(
    model: LoadedModel,
    copy: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    change_tensors(copy, change)
    assert re.search(message, refusal(model, copy))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.vision_tower.encoder.layer.0.attention.q_proj", "not part of the language model"),
        ("model.multi_modal_projector.linear_1", "not part of the language model"),
        ("model.language_model.layers.9.self_attn.q_proj", "this model does not have"),
        ("model.language_model.embed_tokens", "not a linear layer of the language model"),
    ],
)
def test_modules_that_may_not_be_changed_are_refused_by_their_names(
    model: LoadedModel, copy: Path, module: str, message: str
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(2, 32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(32, 2)

    change_tensors(copy, add)
    text = refusal(model, copy)
    assert module in text
    assert message in text


def test_a_rank_beyond_the_limit_is_refused(model: LoadedModel, copy: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}lm_head.lora_A.weight"] = torch.ones(MAX_RANK + 1, 32)
        tensors[f"{PREFIX}lm_head.lora_B.weight"] = torch.ones(263, MAX_RANK + 1)

    change_tensors(copy, grow)
    assert f"its rank {MAX_RANK + 1} is above {MAX_RANK}" in refusal(model, copy)


def test_a_pickle_is_never_read(model: LoadedModel, copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / PICKLE)
    assert "safe_serialization=True" in refusal(model, copy)


def test_half_a_file_is_refused(model: LoadedModel, copy: Path) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert "its files cannot be read" in refusal(model, copy)
