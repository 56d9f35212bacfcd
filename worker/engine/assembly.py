"""The parts of a native engine, made for one model on one device. What each does, its file says."""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.adapters import Adapters
from worker.engine.attention import NAME, KVCache, choose
from worker.engine.blocks import BlockPool
from worker.engine.compiled import compile_model
from worker.engine.config import EngineConfig
from worker.engine.families.base import Family
from worker.engine.host_tier import HostTier
from worker.engine.loading import LoadedModel
from worker.engine.preparing import Preparers
from worker.engine.runner import Runner
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.sizes import Sizes
from worker.engine.vision import VisionCache
from worker.engine.warming import warm_up


@dataclass(frozen=True, slots=True)
class Parts:
    sizes: Sizes
    pool: BlockPool
    cache: KVCache
    vision: VisionCache
    tier: HostTier | None
    scheduler: Scheduler
    sampler: Sampler
    adapters: Adapters
    runner: Runner
    preparers: Preparers | None


def assemble(loaded: LoadedModel, family: Family, config: EngineConfig) -> Parts:
    """Make them; on CUDA, warmed up.

    :raises ConfigurationError: if there is no memory for a KV cache, no C compiler, or an adapter
        cannot be used.
    """
    cuda = loaded.device.type == "cuda"
    compiled = cuda and not config.eager_mode if config.compile is None else config.compile
    if compiled and not config.adapters:
        compile_model(loaded, family)
    sizes = Sizes(loaded, config)
    slots = sizes.limits.max_sequences
    pool, cache = BlockPool(sizes.blocks), sizes.cache()
    vision = VisionCache(sizes.vision_cache_bytes)
    tier = None
    if sizes.host_cache_bytes and config.prefix_caching:
        tier = HostTier(cache, pool, sizes.host_cache_bytes)
    scheduler = Scheduler(
        sizes.limits, pool, vision, prefix_caching=config.prefix_caching, tier=tier
    )
    sampler = Sampler(loaded.vocab_size, slots, loaded.device)
    family.decoder.config._attn_implementation = NAME
    adapters = Adapters(loaded, family, config.adapters, nbytes=sizes.adapter_bytes)
    if config.preload_adapters:
        adapters.preload()
    preparers = Preparers.beside(config, loaded, family)  # they load meanwhile
    try:
        runner = Runner(
            family,
            cache,
            choose(cache, sizes.shape.heads),
            sampler,
            vision,
            routing=adapters.routing,
            slots=slots,
            axes=family.positions([0], [])[0].shape[0],
            device=loaded.device,
            split=cuda if config.split_decodes is None else config.split_decodes,
            graphs=cuda and not config.eager_mode,
        )
        if cuda:
            warm_up(runner, family, sizes.limits, sizes.max_context)
    except BaseException:
        if preparers is not None:
            preparers.close()
        raise
    return Parts(sizes, pool, cache, vision, tier, scheduler, sampler, adapters, runner, preparers)
