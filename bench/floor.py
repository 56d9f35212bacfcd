"""How fast a model could be at best: bytes over bandwidth, operations over peak.

Each phase takes at least the time to read what it must read and the time to compute what it must
compute, whichever is longer. Weights are read once a step; activations are counted as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HALF_BYTES = 2
"""Of a number in bf16, the type of all weights and of the KV cache."""


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at best."""

    bytes_per_second: float
    flops: float


@dataclass(frozen=True)
class Costs:
    """Of one model of the Qwen2.5-VL family."""

    decoder_weights: int
    """In matrices of the text model, without embedding and head."""
    head_weights: int
    layers: int
    heads_width: int
    """Width of all query heads together."""
    kv_bytes: int
    """Bytes of the KV cache of one token."""
    patch_weights: int
    """Weights of the vision part that see each patch."""
    merger_weights: int
    """Weights of the vision part that see each merged token."""
    merge: int
    """Patches of one token."""
    vision_width: int
    vision_full_layers: int
    vision_window_layers: int
    window: int
    """Patches in a window."""

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Count the weights of a `Qwen2_5_VLForConditionalGeneration` (``meta`` will do)."""
        text, vision = model.config.get_text_config(), model.config.vision_config
        decoder = model.model.language_model
        visual = model.model.visual
        head_dim = text.hidden_size // text.num_attention_heads
        full = len(vision.fullatt_block_indexes)
        return cls(
            decoder_weights=_matrices(decoder.layers),
            head_weights=text.vocab_size * text.hidden_size,
            layers=text.num_hidden_layers,
            heads_width=text.num_attention_heads * head_dim,
            kv_bytes=text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * HALF_BYTES,
            patch_weights=_matrices(visual.blocks) + _matrices(visual.patch_embed),
            merger_weights=_matrices(visual.merger),
            merge=vision.spatial_merge_size**2,
            vision_width=vision.hidden_size,
            vision_full_layers=full,
            vision_window_layers=vision.depth - full,
            window=(vision.window_size // vision.patch_size) ** 2,
        )

    def vision_flops(self, patches: int) -> float:
        """Of one picture."""
        attended = self.vision_full_layers * patches + self.vision_window_layers * min(
            self.window, patches
        )
        return (
            2 * self.patch_weights * patches
            + 2 * self.merger_weights * (patches // self.merge)
            + 4 * patches * attended * self.vision_width
        )

    def prefill_flops(self, tokens: int, cached: int = 0) -> float:
        """Of `tokens` of one prompt after `cached` ones; with the logits of the last token."""
        pairs = tokens * cached + tokens * tokens / 2
        attention = 4 * pairs * self.heads_width * self.layers
        return 2 * self.decoder_weights * tokens + attention + 2 * self.head_weights

    @property
    def weight_bytes(self) -> int:
        """Read in each step of the text model."""
        return HALF_BYTES * (self.decoder_weights + self.head_weights)

    def decode_flops(self, batch: int, context: float) -> float:
        attention = 4 * context * self.heads_width * self.layers
        return batch * (2 * (self.decoder_weights + self.head_weights) + attention)


@dataclass(frozen=True)
class Floor:
    """Seconds that a model takes at least on a device."""

    costs: Costs
    ceilings: Ceilings

    def step(self, batch: int, context: float) -> float:
        """One decode step."""
        costs = self.costs
        nbytes = costs.weight_bytes + batch * context * costs.kv_bytes
        return self._longer(nbytes, costs.decode_flops(batch, context))

    def vision(self, images: int, patches: int) -> float:
        return images * self.costs.vision_flops(patches) / self.ceilings.flops

    def prefill(self, prompts: int, tokens: int, cached: int = 0) -> float:
        costs = self.costs
        nbytes = costs.weight_bytes + prompts * cached * costs.kv_bytes
        return self._longer(nbytes, prompts * costs.prefill_flops(tokens, cached))

    def job(self, requests: int, prompt: int, new: int, images: int = 0, patches: int = 0) -> float:
        """`requests` at once, all the same length.

        :param images: of each request.
        """
        decode = (new - 1) * self.step(requests, prompt + new / 2)
        vision = self.vision(requests * images, patches)
        return vision + self.prefill(requests, prompt) + decode

    def _longer(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.ceilings.bytes_per_second, flops / self.ceilings.flops)


def _matrices(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)
