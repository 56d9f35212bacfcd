"""Loads a model and its processor onto one device.

By transformers' Auto classes, or by the loader of a format that is not transformers' own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from visq.errors import ConfigurationError
from worker.engine.config import EngineConfig
from worker.engine.face import EngineInfo
from worker.engine.families.processors import load_processor
from worker.engine.loaders import internvl2

logger = logging.getLogger(__name__)

SMALL: Final = 100_000_000
"""Weights below which one CPU thread is best: the steps are too short to share, and threads that
wait for each other on a busy machine made them 8 times as long (32 for 4 ms, two cores)."""

NAMES_TOLD: Final = 5
"""Of the tensors that a checkpoint lacks."""

UNKNOWN_CONTEXT: Final = 4096
"""Context of a model that does not say its own."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to answer."""

    name: str
    model: Any
    processor: Any
    """Of a vision-language model; of a text model its tokenizer."""
    tokenizer: Any
    tokenizer_key: str
    """Names its vocabulary; see `vocabulary_key`."""
    takes_images: bool
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    """Width of the logits (may be larger than the tokenizer's vocabulary)."""
    end_ids: frozenset[int]
    """Tokens at which the model itself ends an answer."""
    max_context: int
    load_seconds: float

    def info(self, *, engine: str, max_context: int, capacity: int) -> EngineInfo:
        """What an engine says of itself that serves this model."""
        return EngineInfo(
            model=self.name,
            engine=engine,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            load_seconds=self.load_seconds,
            max_context=max_context,
            capacity=capacity,
            tokenizer=self.tokenizer_key,
        )


def load(config: EngineConfig) -> LoadedModel:
    """Load what `config` names.

    :raises ConfigurationError: if the device or the model is not there or cannot be loaded.
    """
    start = time.monotonic()
    config.check()
    device = _device(config)
    dtype = _dtype(config, device)
    if device.type == "cuda":
        # cuDNN builds a plan for each new length: 37-56 ms a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if dtype == torch.float32:
            # Convolutions would be computed in TF32, with 10 bits after the point.
            torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return _load(config, device, dtype, start)
    except Exception as error:
        raise ConfigurationError(
            f"VISQ_MODEL={config.model}: the model cannot be loaded: {error}"
        ) from error


def vocabulary_key(vocabulary: Mapping[str, int]) -> str:
    """Return a name for what the numbers of tokens mean: 32 hexadecimal digits.

    :param vocabulary: token -> its number, added tokens included.
    """
    content = json.dumps(sorted(vocabulary.items())).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _load(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, start: float
) -> LoadedModel:
    raw, _ = PreTrainedConfig.get_config_dict(config.source)
    if internvl2.recognise(raw):
        takes_images = True
        model, processor = internvl2.load(config.source, raw, device=device, dtype=dtype)
    else:
        takes_images, model, processor = _load_native(config.source, device, dtype)
    tokenizer = processor.tokenizer if takes_images else processor
    if config.threads:
        torch.set_num_threads(config.threads)
    elif model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    text_config = model.config.get_text_config()
    end_ids = _end_ids(tokenizer, model.generation_config, text_config.vocab_size)
    # Sampling defaults of the checkpoint would fill every field that a request leaves open.
    model.generation_config = transformers.GenerationConfig()
    return LoadedModel(
        name=config.model,
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        tokenizer_key=vocabulary_key(tokenizer.get_vocab()),
        takes_images=takes_images,
        device=device,
        dtype=dtype,
        vocab_size=text_config.vocab_size,
        end_ids=end_ids,
        max_context=getattr(text_config, "max_position_embeddings", None) or UNKNOWN_CONTEXT,
        load_seconds=time.monotonic() - start,
    )


def _load_native(source: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, Any, Any]:
    """Return whether the model takes images, the model, and its processor."""
    hf_config = AutoConfig.from_pretrained(source)
    takes_images = hf_config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if not takes_images and hf_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"visq does not know how to talk to models of type {hf_config.model_type}")
    auto_model = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    processor = load_processor(source) if takes_images else AutoTokenizer.from_pretrained(source)
    model, found = auto_model.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        # transformers would leave them at random values, and say so in a warning.
        names = ", ".join(missing[:NAMES_TOLD]) + (" ..." if len(missing) > NAMES_TOLD else "")
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {names}")
    return takes_images, model.to(device).eval(), processor


def _end_ids(tokenizer: Any, generation_config: Any, vocab_size: int) -> frozenset[int]:
    ids = generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else ids or []
    return frozenset(
        token
        for token in [*ids, tokenizer.eos_token_id]
        if token is not None and token < vocab_size
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "VISQ_DEVICE=cuda, but torch finds no CUDA device; use `cpu` or `auto`, or install a "
            "torch that fits the driver"
        )
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if use_cuda else torch.device("cpu")


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
