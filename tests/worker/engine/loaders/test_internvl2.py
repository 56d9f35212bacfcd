"""Checkpoints in OpenGVLab's own format, loaded and compared with a reference in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.worker.engine.loaders import reference
from tests.worker.engine.loaders.published import Checkpoint, Weights
from visq.errors import ConfigurationError
from worker.engine.config import EngineConfig
from worker.engine.families import family_of
from worker.engine.loading import LoadedModel, load

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
INTERNVIT_6B = {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}

INTERNLM2 = Checkpoint("InternLM2ForCausalLM", llm=DYNAMIC)
CHECKPOINTS = {
    "InternLM2": INTERNLM2,
    "InternLM2, biases, linear rope, shards": Checkpoint(
        "InternLM2ForCausalLM",
        llm={"bias": True, "rope_scaling": {"type": "linear", "factor": 4.0}},
        shards=3,
    ),
    "Qwen2, InternViT-6B, shards": Checkpoint("Qwen2ForCausalLM", vision=INTERNVIT_6B, shards=4),
    "Llama, an earlier vision layer": Checkpoint(
        "LlamaForCausalLM", vision={"num_hidden_layers": 4}, top={"select_layer": -3}
    ),
    "Llama, larger tiles": Checkpoint("LlamaForCausalLM", top={"force_image_size": 42}),
    "Qwen3": Checkpoint("Qwen3ForCausalLM", llm={"head_dim": 16, "num_attention_heads": 4}),
}


def load_folder(folder: Path) -> LoadedModel:
    return load(EngineConfig(model=str(folder), device="cpu", dtype="float32"))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def ask(loaded: LoadedModel, pictures: list[Image.Image], question: str) -> dict[str, Any]:
    """The tensors of one question about some pictures."""
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    options = {"images": pictures} if pictures else {}
    return dict(loaded.processor(text=[text], return_tensors="pt", **options))


def native_logits(loaded: LoadedModel, tensors: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        output = loaded.model(
            input_ids=tensors["input_ids"], pixel_values=tensors.get("pixel_values")
        )
    return output.logits[0]


def reference_logits(
    checkpoint: Checkpoint, loaded: LoadedModel, tensors: dict[str, Any]
) -> torch.Tensor:
    return reference.logits(
        checkpoint.weights(),
        checkpoint.config,
        tensors["input_ids"][0],
        tensors.get("pixel_values"),
        loaded.processor.image_token_id,
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_loaded_model_computes_what_the_published_one_does(name: str, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS[name]
    loaded = load_folder(checkpoint.save(tmp_path))
    for pictures in ([], [picture(30, 30)], [picture(120, 50), picture(20, 90, seed=1)]):
        tensors = ask(loaded, pictures, "How many?")
        expected = reference_logits(checkpoint, loaded, tensors)
        actual = native_logits(loaded, tensors)
        assert torch.allclose(actual, expected, atol=1e-4, rtol=0), (actual - expected).abs().max()
        assert len(expected.argmax(-1).unique()) > 5  # outputs vary


def test_another_picture_gives_other_logits(tmp_path: Path) -> None:
    loaded = load_folder(INTERNLM2.save(tmp_path))
    one = native_logits(loaded, ask(loaded, [picture(60, 30, seed=1)], "How many?"))
    other = native_logits(loaded, ask(loaded, [picture(60, 30, seed=2)], "How many?"))
    assert (one[-1] - other[-1]).abs().max() > 0.1


def test_the_engine_knows_it_as_a_native_family(tmp_path: Path) -> None:
    loaded = load_folder(INTERNLM2.save(tmp_path))
    family = family_of(loaded.model, loaded.processor)
    assert family is not None
    assert family.normalisation is not None
    pictures = [family.prepare_image(np.asarray(picture(*size))) for size in ((90, 40), (20, 20))]
    for prepared, features in zip(pictures, family.image_features(pictures), strict=True):
        tiles = family.normalisation.unpack(prepared.tensors["pixel_values"], torch.float32)
        expected = reference.image_features(INTERNLM2.weights(), INTERNLM2.config, tiles)
        assert prepared.token_ids == [480, *[482] * 4 * len(tiles), 481]
        assert torch.allclose(features.embeddings, expected.flatten(0, 1), atol=1e-4, rtol=0)


def test_what_the_engine_needs_to_know_of_the_model(tmp_path: Path) -> None:
    loaded = load_folder(INTERNLM2.save(tmp_path))
    assert loaded.takes_images
    assert loaded.end_ids == {2, 3, 4}
    assert loaded.max_context == 2048
    assert loaded.vocab_size == 485
    assert loaded.model.config.image_token_id == loaded.processor.image_token_id == 482
    assert loaded.dtype == next(loaded.model.parameters()).dtype == torch.float32
    assert not loaded.model.training


def test_weights_are_cast_but_rotary_frequencies_stay_in_fp32(tmp_path: Path) -> None:
    folder = INTERNLM2.save(tmp_path)
    loaded = load(EngineConfig(model=str(folder), device="cpu", dtype="bfloat16"))
    assert {each.dtype for each in loaded.model.parameters()} == {torch.bfloat16}
    frequencies = loaded.model.model.language_model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    exact = 1e6 ** (-torch.arange(0, 8, 2).double() / 8)
    assert torch.allclose(frequencies.double(), exact, rtol=1e-6, atol=0)


def test_code_that_comes_with_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    folder = INTERNLM2.save(tmp_path)
    assert (folder / "modeling_internvl_chat.py").exists()
    load_folder(folder)
    assert not (folder / "EXECUTED").exists()


def test_tensors_of_unused_vision_layers_and_old_rotary_buffers_are_left_out(
    tmp_path: Path,
) -> None:
    checkpoint = CHECKPOINTS["Llama, an earlier vision layer"]
    weights = checkpoint.weights()
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    loaded = load_folder(checkpoint.save(tmp_path, weights))
    assert len(loaded.model.model.vision_tower.encoder.layer) == 2


def without(name: str) -> Callable[[Weights], Any]:
    return lambda weights: weights.pop(name)


def with_tensor(name: str, *shape: int) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mlp1.3.bias"), "lacks tensors: model.multi_modal_projector.linear_2.bias"),
        (without("language_model.output.weight"), "lacks tensors: lm_head.weight"),
        (
            without("language_model.model.layers.1.attention.wqkv.weight"),
            r"layers\.1\.self_attn\.k_proj\.weight, .*q_proj\.weight, .*v_proj\.weight",
        ),
        (with_tensor("vision_model.head.weight", 3), "without a place: vision_model.head.weight"),
        (
            with_tensor("language_model.model.layers.0.attention.wqkv.bias", 80),
            r"without a place: language_model\.model\.layers\.0\.attention\.wqkv\.bias",
        ),
        (with_tensor("vision_model.encoder.layers.0.ls1", 7), r"layers\.0\.ls1: \(7,\) in the"),
        (
            with_tensor("language_model.model.layers.0.attention.wqkv.weight", 81, 48),
            r"layers\.0\.attention\.wqkv\.weight: \(81, 48\) does not fit",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(
    change: Callable[[Weights], Any], message: str, tmp_path: Path
) -> None:
    weights = INTERNLM2.weights()
    change(weights)
    with pytest.raises(ConfigurationError, match=message):
        load_folder(INTERNLM2.save(tmp_path, weights))


def test_a_missing_shard_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = replace(INTERNLM2, shards=3).save(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="lacks its file model-00002-of-00003"):
        load_folder(folder)


def test_a_tensor_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    folder = replace(INTERNLM2, shards=2).save(tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))
    name = min(load_file(first))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(ConfigurationError, match=f"without a place: {name}"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (Checkpoint("Phi3ForCausalLM"), "llm_config.architectures is Phi3ForCausalLM"),
        (replace(INTERNLM2, top={"ps_version": "v1"}), "ps_version = v1"),
        (replace(INTERNLM2, top={"pad2square": True}), "pad2square = True"),
        (replace(INTERNLM2, top={"use_llm_lora": 16}), "use_llm_lora = 16"),
        (replace(INTERNLM2, top={"use_thumbnail": False}), "use_thumbnail = False"),
        (replace(INTERNLM2, top={"select_layer": -4}), "select_layer -4 is not a layer"),
        (replace(INTERNLM2, vision={"norm_type": "batch"}), "vision_config.norm_type = batch"),
        (
            replace(INTERNLM2, vision={"qk_normalization": True, "layer_norm_eps": 1e-5}),
            "vision_config.layer_norm_eps = 1e-05",
        ),
        (
            replace(INTERNLM2, llm={"rope_scaling": {"type": "longrope", "factor": 2.0}}),
            "rope_scaling of type longrope",
        ),
        (
            Checkpoint("Qwen2ForCausalLM", llm={"use_sliding_window": True}),
            "llm_config.use_sliding_window = True",
        ),
        (replace(INTERNLM2, llm={"vocab_size": 484}), "the tokenizer has 485 tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    checkpoint: Checkpoint, message: str, tmp_path: Path
) -> None:
    weights = {"unused": torch.zeros(1)}
    with pytest.raises(ConfigurationError, match=message):
        load_folder(checkpoint.save(tmp_path, weights))


def test_a_missing_field_of_the_configuration_is_named(tmp_path: Path) -> None:
    folder = INTERNLM2.save(tmp_path)
    config = (folder / "config.json").read_text().replace('"rms_norm_eps"', '"rms_eps"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigurationError, match=r"llm_config\.rms_norm_eps is missing"):
        load_folder(folder)
