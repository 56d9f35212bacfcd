"""What the engine process is told of the settings."""

from __future__ import annotations

from dataclasses import fields

from visq.settings import Settings
from worker.engine.config import EngineConfig

GIVEN = {
    "model": "/models/large",
    "device": "cuda",
    "dtype": "bfloat16",
    "log_level": "DEBUG",
    "engine": "native",
    "session_len": 4096,
    "max_batch_size": 100,
    "max_step_tokens": 2048,
    "kv_cache_bytes": 10**9,
    "gpu_memory_utilization": 0.5,
    "vision_cache_bytes": 10**8,
    "host_cache_bytes": 10**7,
    "preparers": 4,
    "prefix_caching": False,
    "eager_mode": True,
    "preload_adapters": True,
}


def test_each_setting_of_the_engine_arrives() -> None:
    settings = Settings.model_validate(
        {
            **{name: value for name, value in GIVEN.items() if name in Settings.model_fields},
            "engine_threads": 3,
            "engine_hang_seconds": 7.0,
            "adapters": "legal=/models/legal",
        }
    )
    config = EngineConfig.from_settings(settings)
    expected = {**GIVEN, "threads": 3, "hang_seconds": 7.0, "adapters": {"legal": "/models/legal"}}
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_setting_that_the_engine_knows_by_the_same_name_is_one_of_these() -> None:
    shared = {field.name for field in fields(EngineConfig)} & set(Settings.model_fields)
    assert shared == (set(GIVEN) - {"preload_adapters"}) | {"adapters"}


def test_without_settings_it_has_its_own_defaults() -> None:
    told = EngineConfig.from_settings(Settings())
    assert told == EngineConfig(preload_adapters=True)
