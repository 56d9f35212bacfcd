"""How large the engine's parts are: from the model, the device and the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from visq.errors import ConfigurationError
from worker.engine.attention import KVCache
from worker.engine.attention.cache import bytes_per_block
from worker.engine.config import EngineConfig
from worker.engine.loading import LoadedModel
from worker.engine.scheduler import Limits

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model keeps of a token."""

    layers: int
    heads: int
    """Of queries."""
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, loaded: LoadedModel) -> Shape:
        text: Any = loaded.model.config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            layers=int(text.num_hidden_layers),
            heads=int(heads),
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            dtype=loaded.dtype,
            device=loaded.device,
        )

    def block_bytes(self, block_size: int) -> int:
        return bytes_per_block(
            layers=self.layers,
            block_size=block_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

    def cache(self, blocks: int, block_size: int) -> KVCache:
        """A KV cache of `blocks` blocks, the one for padding among them."""
        return KVCache(
            blocks,
            layers=self.layers,
            block_size=block_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
        )


class Sizes:
    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        """
        :raises ConfigurationError: if nothing of the GPU's memory is left for the KV cache.
        """
        cuda = loaded.device.type == "cuda"
        step_tokens = config.max_step_tokens or (8192 if cuda else 512)
        self.limits = Limits(
            block_size=config.block_size,
            max_step_tokens=step_tokens,
            max_encode_tokens=config.max_encode_tokens or step_tokens,
            max_sequences=config.max_batch_size or (256 if cuda else 32),
        )
        self.shape = Shape.of(loaded)
        block_bytes = self.shape.block_bytes(config.block_size)
        self.vision_cache_bytes = config.vision_cache_bytes or (2048 if cuda else 128) * MIB
        self.host_cache_bytes = config.host_cache_bytes
        if self.host_cache_bytes is None:
            self.host_cache_bytes = 4096 * MIB if cuda else 0
        self.adapter_bytes = config.adapter_bytes or (1024 if cuda else 256) * MIB
        nbytes = config.kv_cache_bytes
        if not nbytes and cuda:
            free, total = torch.cuda.mem_get_info(loaded.device)
            nbytes = kv_cache_room(
                free=free,
                total=total,
                utilization=config.gpu_memory_utilization,
                vision_cache=self.vision_cache_bytes,
                adapters=self.adapter_bytes if config.adapters else 0,
                least=2 * block_bytes,
            )
        self.blocks = max((nbytes or 256 * MIB) // block_bytes, 2)
        """With the one for padding."""
        room = (self.blocks - 1) * config.block_size
        self.max_context = min(loaded.max_context, room, config.session_len or room)
        # More than all sequences at full length can never be used.
        most = self.limits.max_sequences * -(-self.max_context // config.block_size)
        if not cuda:
            self.blocks = min(self.blocks, 2 * most + 1)

    def cache(self) -> KVCache:
        return self.shape.cache(self.blocks, self.limits.block_size)


def kv_cache_room(
    *, free: int, total: int, utilization: float, vision_cache: int, adapters: int, least: int
) -> int:
    """Bytes of a GPU's memory for the KV cache, all arguments but `utilization` being bytes.

    :param free: now, with the weights loaded.
    :param utilization: part of `total` that may be used, by whomever.
    :raises ConfigurationError: if it is less than `least`.
    """
    room = int(free - (1 - utilization) * total) - vision_cache - adapters
    if room < least:
        raise ConfigurationError(
            f"VISQ_GPU_MEMORY_UTILIZATION={utilization:g} leaves {_gib(room)} for the KV cache: of "
            f"the GPU's {_gib(total)}, {_gib(free)} are free once the model is loaded, of which "
            f"{_gib((1 - utilization) * total)} stay unused, {_gib(vision_cache)} are for the "
            f"vision cache and {_gib(adapters)} for adapters; raise it, lower "
            "VISQ_VISION_CACHE_BYTES, or use a larger GPU or a smaller model"
        )
    return room


def _gib(nbytes: float) -> str:
    return f"{nbytes / 1024 / MIB:.1f} GiB"
