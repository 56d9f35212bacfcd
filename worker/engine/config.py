"""What an engine is told at its start; a small part of `visq.settings`, without secrets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from visq.errors import ConfigurationError
from visq.settings import Settings

SMALL_MODEL: Final = Path(__file__).resolve().parent.parent / "small_model"
"""Folder of the model that ships with visq."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which model to load, and where."""

    model: str = "small"
    """``small``, a folder, or a name that transformers loads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = 0
    """CPU threads; 0: torch's own choice."""
    log_level: str = "INFO"
    engine: Literal["auto", "native", "generate"] = "auto"
    """``auto``: the native engine if it knows the model, else transformers' ``generate``."""
    session_len: int | None = None
    """Most tokens of prompt and answer together; ``None``: what the model and the cache allow."""
    max_batch_size: int = 0
    """Most sequences that run at a time; 0: 32 on the CPU, 256 on CUDA."""
    max_step_tokens: int = 0
    """Most tokens that one step computes; 0: 512 on the CPU, 8192 on CUDA."""
    max_encode_tokens: int = 0
    """Most image tokens that one step encodes; 0: as `max_step_tokens`."""
    block_size: int = 64
    """Tokens of a block of the KV cache."""
    kv_cache_bytes: int = 0
    """Memory of the KV cache; 0: 256 MiB on the CPU, on CUDA what `gpu_memory_utilization` says."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU's memory that the engine may use: weights, KV cache and work space."""
    vision_cache_bytes: int = 0
    """Memory of the vision cache; 0: 128 MiB on the CPU, 2 GiB on CUDA."""
    host_cache_bytes: int | None = None
    """Host memory for the KV cache of sessions whose next turn may come (`EngineRequest.goes_on`);
    ``None``: 4 GiB on CUDA, none on the CPU, where the KV cache itself is host memory."""
    prepared_bytes: int = 1024 * 1024 * 1024
    """Pixels of prepared pictures that may wait for their encoding."""
    preparers: int | None = None
    """Processes that prepare pictures; 0: a thread of the engine does. ``None``: none on the CPU,
    on CUDA one for every three cores, up to 6."""
    prefix_caching: bool = True
    overlap: bool | None = None
    """Launch a step before the tokens of the one before it are known; ``None``: on CUDA only,
    since on the CPU nothing runs beside it."""
    split_decodes: bool | None = None
    """Compute the sequences that decode apart from the prompts of the same step; ``None``: on CUDA
    only, where that part is a CUDA graph."""
    eager_mode: bool = False
    """On CUDA: neither CUDA graphs nor compiled layers. Starts in half the time, and is several
    times as slow."""
    compile: bool | None = None
    """Compile the model's layers; ``None``: on CUDA, unless `eager_mode`. Not where there are
    `adapters`, which change the layers."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters that requests may name: name -> folder, as PEFT saves it. Each is read at its
    first use, and again once its files have changed."""
    preload_adapters: bool = False
    """Read all adapters at the start, which fails if one cannot be used."""
    adapter_bytes: int = 0
    """Memory of loaded adapters; 0: 256 MiB on the CPU, 1 GiB on CUDA. Those of running requests
    may exceed it."""
    hang_seconds: float = 120.0
    """An engine process that makes no step for this long while it has requests is killed."""

    @classmethod
    def from_settings(cls, settings: Settings) -> EngineConfig:
        return cls(
            model=settings.model,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.engine_threads,
            log_level=settings.log_level,
            engine=settings.engine,
            session_len=settings.session_len,
            max_batch_size=settings.max_batch_size,
            max_step_tokens=settings.max_step_tokens,
            kv_cache_bytes=settings.kv_cache_bytes,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            vision_cache_bytes=settings.vision_cache_bytes,
            host_cache_bytes=settings.host_cache_bytes,
            preparers=settings.preparers,
            prefix_caching=settings.prefix_caching,
            eager_mode=settings.eager_mode,
            adapters=settings.adapter_folders,
            preload_adapters=True,  # a wrong folder is better known now than by the first job
            hang_seconds=settings.engine_hang_seconds,
        )

    @property
    def source(self) -> str:
        """Folder or name of the model, for transformers."""
        return str(SMALL_MODEL) if self.model == "small" else self.model

    def check(self) -> None:
        """Say plainly that a folder holds no model, before transformers asks the hub for its name.

        :raises ConfigurationError: naming the folder.
        """
        folder = Path(self.source)
        is_folder = folder.exists() or self.source.startswith((".", "/"))
        if is_folder and not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"VISQ_MODEL={self.model}: the folder {folder} holds no model (no config.json)"
            )
