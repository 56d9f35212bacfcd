"""Reads an adapter's folder as PEFT writes it: a configuration and a file of tensors.

Whatever the engine does not compute is refused by its name. The weights of an adapter that is
taken are its tensors, all of them; ``target_modules`` and the like say only how they came about.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

PREFIX: Final = "base_model.model."

MAX_RANK: Final = 512
"""Beyond it a merged model is the better choice."""

_UNDERSTOOD: Final = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
_OF_TRAINING: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Fields that do not matter once the tensors are there. Any further field must be empty."""

_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the model as they are."""

_KEY: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)")


class UnusableAdapter(Exception):  # noqa: N818  # named after what is the case
    """An adapter cannot be used; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The tensors for one module, on the CPU, as they were saved."""

    a: torch.Tensor
    """``(rank, in)``."""
    b: torch.Tensor
    """``(out, rank)``."""
    bias: torch.Tensor | None
    """``(out,)``."""
    scaling: float


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    digest: str
    """Of the bytes of both files."""
    modules: Mapping[str, Factors]
    """By the module's name in the model it was trained on."""
    weights: Mapping[str, torch.Tensor]
    """Whole weights, by the module's name: PEFT writes those of a changed ``lm_head`` beside it."""


def stamp(folder: Path) -> object:
    """Something that differs once the files have been written anew.

    :raises UnusableAdapter: naming the file that is not there.
    """
    try:
        stats = [(folder / name).stat() for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        if (folder / PICKLE).exists():
            raise UnusableAdapter(
                f"its weights are in {PICKLE}, a format that can run code when it is read; save "
                "it with `save_pretrained(folder, safe_serialization=True)`"
            ) from error
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
        raise UnusableAdapter(f"its folder has no {' and no '.join(missing)}") from error
    return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in stats)


def read(folder: Path) -> PeftAdapter:
    """Read and check an adapter's files.

    :raises UnusableAdapter: saying what cannot be read, or is not supported.
    """
    try:
        raw = (folder / CONFIG).read_bytes()
        config = json.loads(raw)
        check(config)
        data = (folder / WEIGHTS).read_bytes()
        tensors = load(data)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnusableAdapter(f"its files cannot be read: {error}") from error
    digest = hashlib.blake2b(len(raw).to_bytes(8, "little") + raw, digest_size=16)
    digest.update(data)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif key.startswith(PREFIX) and name.endswith(".weight") and "lora_" not in name:
            weights[name.removesuffix(".weight").removesuffix(".base_layer")] = tensor
        else:
            raise UnusableAdapter(f"it has a tensor that is not understood: {key}")
    if not parts:
        raise UnusableAdapter("it has no LoRA weights")
    modules = {name: _factors(name, each, config) for name, each in parts.items()}
    return PeftAdapter(digest.hexdigest(), modules, weights)


def check(config: Any) -> None:
    """Refuse what would be computed wrongly.

    :raises UnusableAdapter: naming the field of ``adapter_config.json``.
    """
    if not isinstance(config, dict):
        raise UnusableAdapter(f"{CONFIG} is not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnusableAdapter(f"peft_type={kind!r} is not supported, only LORA is")
    if (bias := config.get("bias") or "none") != "none":
        raise UnusableAdapter(f"bias={bias!r} is not supported; train with bias='none'")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise UnusableAdapter(
            f"init_lora_weights={start!r} may rest on other weights of the model; convert it with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        )
    for name, value in sorted(config.items()):
        if value and name not in _UNDERSTOOD and name not in _OF_TRAINING:
            raise UnusableAdapter(f"{name}={value!r} is not supported")


def _factors(name: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Factors:
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in parts:
            raise UnusableAdapter(f"it lacks the tensor {PREFIX}{name}.{part}")
    a, b, bias = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_B.bias")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UnusableAdapter(
            f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit each other"
        )
    if bias is not None and bias.shape != b.shape[:1]:
        raise UnusableAdapter(f"{name}: the bias {tuple(bias.shape)} does not fit lora_B")
    rank = a.shape[0]
    if rank > MAX_RANK:
        raise UnusableAdapter(f"{name}: its rank {rank} is above {MAX_RANK}; merge it instead")
    if rank != (expected := _by_pattern(config.get("rank_pattern"), name, config.get("r"))):
        raise UnusableAdapter(f"{name}: its rank is {rank}, but {CONFIG} says {expected}")
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UnusableAdapter(f"lora_alpha={alpha!r} is not a number")
    # Rank-stabilised LoRA: arXiv 2312.03732.
    return Factors(a, b, bias, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """As PEFT chooses: the first pattern that matches the end of the module's name, from a dot on.

    :raises UnusableAdapter: if a pattern is not a regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise UnusableAdapter(f"{pattern!r} is not a regular expression: {error}") from error
    return default
