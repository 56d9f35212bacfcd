"""How large the engine's parts are: from the model, the device and the configuration."""

from __future__ import annotations

from typing import Any, Final

import torch

from worker.engine.attention import KVCache
from worker.engine.attention.cache import bytes_per_block
from worker.engine.config import EngineConfig
from worker.engine.loading import LoadedModel
from worker.engine.scheduler import Limits

MIB: Final = 1024 * 1024


class Sizes:
    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        cuda = loaded.device.type == "cuda"
        text: Any = loaded.model.config.get_text_config()
        heads = text.num_attention_heads
        step_tokens = config.max_step_tokens or (8192 if cuda else 512)
        self.limits = Limits(
            block_size=config.block_size,
            max_step_tokens=step_tokens,
            max_encode_tokens=config.max_encode_tokens or step_tokens,
            max_sequences=config.max_batch_size or (256 if cuda else 32),
        )
        self._loaded = loaded
        self._layers = int(text.num_hidden_layers)
        self._kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        self._head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        self.vision_cache_bytes = config.vision_cache_bytes or (2048 if cuda else 128) * MIB
        self.adapter_bytes = config.adapter_bytes or (1024 if cuda else 256) * MIB
        nbytes = config.kv_cache_bytes
        if not nbytes and cuda:
            free, total = torch.cuda.mem_get_info(loaded.device)
            nbytes = int(free - (1 - config.gpu_memory_utilization) * total)
            nbytes -= self.vision_cache_bytes
            nbytes -= self.adapter_bytes if config.adapters else 0
        self.blocks = max((nbytes or 256 * MIB) // self._block_bytes, 2)
        """With the one for padding."""
        room = (self.blocks - 1) * config.block_size
        self.max_context = min(loaded.max_context, room, config.session_len or room)
        # More than all sequences at full length can never be used.
        most = self.limits.max_sequences * -(-self.max_context // config.block_size)
        if not cuda:
            self.blocks = min(self.blocks, 2 * most + 1)

    @property
    def _block_bytes(self) -> int:
        return bytes_per_block(
            layers=self._layers,
            block_size=self.limits.block_size,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            dtype=self._loaded.dtype,
        )

    def cache(self) -> KVCache:
        return KVCache(
            self.blocks,
            layers=self._layers,
            block_size=self.limits.block_size,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            dtype=self._loaded.dtype,
            device=self._loaded.device,
        )
