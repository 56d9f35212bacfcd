"""Which linear layers of the model an adapter means.

Adapters carry the names that layers had in the library that trained them. Each known scheme is
tried in turn; one that names a layer of the language model for every name is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeAlias

from torch import nn

from worker.engine.adapters.lora import LoraLinear
from worker.engine.adapters.peft_files import UnusableAdapter
from worker.engine.loaders.internvl2_weights import native_name as internvl2_name

Scheme: TypeAlias = Callable[[str], str]

FUSED: Final = "wqkv"
"""InternLM2's projection of queries, keys and values in one."""

_VISION: Final = ("vision", "visual", "projector", "connector", "mlp1", "merger")


class Places:
    """The layers that adapters may change: all linear ones of the decoder, and ``lm_head``."""

    def __init__(self, model: Any, decoder: Any) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        self._decoder: str = paths[id(decoder)]
        self._head: str = paths[id(model.get_output_embeddings())]
        self._modules = frozenset(paths.values())
        self.shapes: dict[str, tuple[int, int]] = {
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            # (Of other classes, quantised ones for instance, the weights mean something else.)
            if type(module) in (nn.Linear, LoraLinear) and self._of_text(path)
        }
        """``(out_features, in_features)`` by path."""
        self._schemes: tuple[Scheme, ...] = (
            str,
            self._language_model_first,
            self._without_language_model,
            _internvl2,
        )

    def find(self, names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
        """The paths that each name stands for: one, or those of the queries, keys and values.

        :param names: of modules, without PEFT's prefix.
        :raises UnusableAdapter: naming a module that is not there, or may not be changed.
        """
        best: dict[str, tuple[str, ...]] = {}
        for scheme in self._schemes:
            found = {name: paths for name in names if (paths := self._paths(scheme(name)))}
            if len(found) == len(names):
                return found
            best = max(best, found, key=len)
        raise UnusableAdapter(self._why_not(sorted(set(names) - set(best))[0]))

    def of_weight(self, name: str) -> str | None:
        """The path of a module by any scheme, whatever module it is."""
        for scheme in self._schemes:
            if (path := scheme(name)) in self._modules:
                return path
        return None

    def _paths(self, path: str) -> tuple[str, ...]:
        stem, _, last = path.rpartition(".")
        each = ("q_proj", "k_proj", "v_proj") if last == FUSED else (last,)
        paths = tuple(f"{stem}.{name}" if stem else name for name in each)
        return paths if all(path in self.shapes for path in paths) else ()

    def _of_text(self, path: str) -> bool:
        return path == self._head or path.startswith(f"{self._decoder}.")

    def _why_not(self, name: str) -> str:
        if any(part in name for part in _VISION):
            return (
                f"it changes {name}, which is not part of the language model; train it on the "
                "language model's layers alone"
            )
        if name in self._modules:
            return f"it changes {name}, which is not a linear layer of the language model"
        return f"it changes {name}, which this model does not have"

    # --- schemes -----------------------------------------------------------------------------

    def _language_model_first(self, name: str) -> str:
        """transformers before 4.52: the language model was a whole causal model."""
        if name.startswith("language_model.model."):
            return f"{self._decoder}.{name.removeprefix('language_model.model.')}"
        if name == "language_model.lm_head":
            return self._head
        return name

    def _without_language_model(self, name: str) -> str:
        """Qwen2-VL before 4.52, and adapters of the language model alone."""
        if name.startswith("model.layers."):
            return f"{self._decoder}.{name.removeprefix('model.')}"
        return name


def _internvl2(name: str) -> str:
    """``InternVLChatModel``, whose code comes with its checkpoints."""
    return internvl2_name(f"{name}.").removesuffix(".")
