"""The adapters that requests may name, and those of them that are loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from visq.errors import AdapterNotFound, ConfigurationError, EngineError
from worker.engine.adapters import peft_files
from worker.engine.adapters.lora import Adapter, LoraLinear, LowRank, Routing
from worker.engine.adapters.names import Places
from worker.engine.adapters.peft_files import Factors, PeftAdapter, UnusableAdapter
from worker.engine.families.base import Family
from worker.engine.loaders.internvl2_weights import split_wqkv
from worker.engine.loading import LoadedModel

logger = logging.getLogger(__name__)


class Adapters:
    """Loads adapters at their first use, and forgets those that have not been used for longest.

    A folder whose files have been written anew is read again for the next request; requests that
    hold the former version keep it. `install` is for the model's thread; the rest, for any.
    """

    def __init__(
        self, loaded: LoadedModel, family: Family, folders: Mapping[str, str], *, nbytes: int
    ) -> None:
        """
        :param folders: by the name that requests give.
        :param nbytes: memory of loaded adapters; those that requests hold may exceed it.
        """
        self._loaded = loaded
        self._family = family
        self._folders = {name: Path(folder) for name, folder in folders.items()}
        self._limit = nbytes
        self._places = Places(loaded.model, family.decoder)
        self._adapters: dict[str, Adapter] = {}
        """The newest version of each, the least recently used first."""
        self._lock = threading.Lock()
        """Never held for long: the model's thread takes it."""
        self._reading = threading.Lock()
        self.routing = Routing()

    @property
    def loaded(self) -> list[str]:
        """Names of those in memory, the least recently used first."""
        with self._lock:
            return list(self._adapters)

    def preload(self) -> None:
        """Load and install all adapters, as far as there is memory for them. At the start only.

        :raises ConfigurationError: if one cannot be used.
        """
        for name in self._folders:
            try:
                adapter = self.acquire(name)
            except EngineError as error:
                raise ConfigurationError(error.message) from error
            self.install(adapter)
            self.release(adapter)

    def acquire(self, name: str) -> Adapter:
        """The adapter `name`, loaded; whoever gets it must `release` it.

        :raises AdapterNotFound: if no adapter has this name.
        :raises EngineError: if its folder cannot be used.
        """
        folder = self._folders.get(name)
        if folder is None:
            known = ", ".join(sorted(self._folders))
            raise AdapterNotFound(
                f"this worker has no adapter {name!r}; "
                + (f"it has {known}" if known else "it has none"),
                param="adapter_name",
            )
        with self._reading:
            try:
                stamp = peft_files.stamp(folder)
                with self._lock:
                    adapter = self._adapters.pop(name, None)
                if adapter is None or adapter.stamp != stamp:
                    adapter = self._load(name, folder, stamp)
            except UnusableAdapter as error:
                logger.warning("the adapter %s in %s cannot be used: %s", name, folder, error)
                raise EngineError(
                    f"the adapter {name!r} cannot be used: {error}", param="adapter_name"
                ) from error
            with self._lock:
                adapter.users += 1
                self._adapters[name] = adapter
                self._evict()
        return adapter

    def release(self, adapter: Adapter) -> None:
        """A holder of `adapter` needs it no more."""
        with self._lock:
            adapter.users -= 1
            self._evict()

    def install(self, adapter: Adapter) -> None:
        """Let the layers that `adapter` changes look for adapters. Between two steps only."""
        if adapter.installed:
            return
        model = self._loaded.model
        for path in adapter.layers:
            linear = model.get_submodule(path)
            if not isinstance(linear, LoraLinear):
                parent, _, name = path.rpartition(".")
                replacement = LoraLinear(linear, path, self.routing)
                setattr(model.get_submodule(parent), name, replacement)
                if linear is self._family.lm_head:
                    self._family.lm_head = replacement
        adapter.installed = True

    def _evict(self) -> None:
        total = sum(adapter.nbytes for adapter in self._adapters.values())
        for name, adapter in list(self._adapters.items()):
            if total > self._limit and not adapter.users:
                del self._adapters[name]
                total -= adapter.nbytes

    def _load(self, name: str, folder: Path, stamp: object) -> Adapter:
        read = peft_files.read(folder)
        self._check_weights(read)
        layers: dict[str, LowRank] = {}
        for module, paths in self._places.find(read.modules).items():
            for path, factors in zip(paths, self._split(read.modules[module], paths), strict=True):
                if path in layers:
                    raise UnusableAdapter(f"two of its modules are {path}")
                layers[path] = self._low_rank(path, factors)
        adapter = Adapter(name, read.digest, layers, stamp)
        logger.info("loaded the adapter %s from %s (%d bytes)", name, folder, adapter.nbytes)
        return adapter

    def _check_weights(self, read: PeftAdapter) -> None:
        """Whole weights in an adapter's file must be the model's own."""
        for module, weight in read.weights.items():
            path = self._places.of_weight(module)
            own = (
                None
                if path is None
                else dict(
                    self._loaded.model.get_submodule(path).named_parameters(recurse=False)
                ).get("weight")
            )
            if (
                own is None
                or own.shape != weight.shape
                or not torch.equal(own, weight.to(own.device, own.dtype))
            ):
                raise UnusableAdapter(
                    f"it brings weights of its own for {module}; adapters may only add low ranks "
                    "to the model's weights"
                )

    def _split(self, factors: Factors, paths: tuple[str, ...]) -> list[Factors]:
        """A fused projection's factors, for each of its parts."""
        if len(paths) == 1:
            return [factors]
        rows = sum(self._places.shapes[path][0] for path in paths)
        if factors.b.shape[0] != rows:
            raise UnusableAdapter(f"lora_B has {factors.b.shape[0]} rows where {rows} are needed")
        text = self._loaded.model.config.get_text_config()
        ups = split_wqkv(factors.b, text)
        biases = [None] * 3 if factors.bias is None else split_wqkv(factors.bias, text)
        return [
            Factors(factors.a, up, bias, factors.scaling)
            for up, bias in zip(ups, biases, strict=True)
        ]

    def _low_rank(self, path: str, factors: Factors) -> LowRank:
        out_features, in_features = self._places.shapes[path]
        if (factors.b.shape[0], factors.a.shape[1]) != (out_features, in_features):
            raise UnusableAdapter(
                f"it is made for a layer of {factors.a.shape[1]} to {factors.b.shape[0]} features, "
                f"but {path} has {in_features} to {out_features}"
            )

        def placed(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._loaded.device, self._loaded.dtype).contiguous()

        # Scaled before it is rounded to the model's dtype.
        bias = factors.bias
        return LowRank(
            placed(factors.a),
            placed(factors.b.float() * factors.scaling),
            None if bias is None else placed(bias.float() * factors.scaling),
        )
