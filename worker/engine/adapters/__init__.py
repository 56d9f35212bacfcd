"""LoRA adapters, as PEFT saves them: many in one batch, each row of a step with its own or none.

`peft_files` reads a folder, `names` finds the layers that it means, `lora` adds to their results,
`registry` holds those that are loaded. PEFT itself is not used: it chooses adapters by rows of the
batch dimension, and the engine's batches are ``(1, T, hidden)``.
"""

from worker.engine.adapters.lora import Adapter, LoraLinear, LowRank, Routing
from worker.engine.adapters.registry import Adapters

__all__ = ["Adapter", "Adapters", "LoraLinear", "LowRank", "Routing"]
