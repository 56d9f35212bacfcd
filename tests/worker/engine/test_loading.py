"""What is known of a model once it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from visq.errors import ConfigurationError
from worker.engine.config import EngineConfig
from worker.engine.loading import load, vocabulary_key

WORDS = {"a": 0, "b": 1, "<|im_end|>": 2}


def test_the_same_vocabulary_has_the_same_key_in_any_order() -> None:
    assert vocabulary_key(WORDS) == vocabulary_key(dict(reversed(WORDS.items())))


@pytest.mark.parametrize(
    "other",
    [
        WORDS | {"a": 1, "b": 0},
        WORDS | {"c": 3},
        {"a": 0, "b": 1, "<|im_start|>": 2},
        {"a": 0, "b": 12, "<|im_end|>": 2},
    ],
)
def test_another_vocabulary_has_another_key(other: dict[str, int]) -> None:
    assert vocabulary_key(other) != vocabulary_key(WORDS)


def test_a_model_is_loaded_with_the_key_of_its_vocabulary_with_added_tokens(
    vision_model: Path,
) -> None:
    loaded = load(EngineConfig(model=str(vision_model), device="cpu"))
    tokenizer = AutoProcessor.from_pretrained(vision_model).tokenizer
    assert loaded.tokenizer_key == vocabulary_key(tokenizer.get_vocab())
    tokenizer.add_tokens(["<|something-new|>"])
    assert loaded.tokenizer_key != vocabulary_key(tokenizer.get_vocab())


def test_a_checkpoint_that_lacks_tensors_is_refused_and_not_filled_at_random(
    vision_model: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(vision_model, torn)
    [file] = torn.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.0" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 1 tensors: .*layers\.0"):
        load(EngineConfig(model=str(torn), device="cpu"))
