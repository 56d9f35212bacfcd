"""How much memory the KV cache gets on a GPU."""

from __future__ import annotations

import pytest

from visq.errors import ConfigurationError
from worker.engine.sizes import kv_cache_room

GIB = 1024**3


def room(**changed: float) -> int:
    arguments = {
        "free": 60 * GIB,
        "total": 80 * GIB,
        "vision_cache": 2 * GIB,
        "adapters": GIB,
        "least": GIB,
        **{name: int(value) for name, value in changed.items() if name != "utilization"},
    }
    return kv_cache_room(utilization=changed.get("utilization", 0.75), **arguments)


def test_the_cache_gets_what_weights_and_the_other_caches_leave_of_the_part_in_use() -> None:
    assert room() == (60 - 20 - 2 - 1) * GIB
    assert room(utilization=1.0, adapters=0) == (60 - 2) * GIB


def test_as_much_as_is_needed_at_least_is_enough() -> None:
    assert room(least=37 * GIB) == 37 * GIB


@pytest.mark.parametrize(
    "changed",
    [{"least": 37 * GIB + 1}, {"free": 23 * GIB}, {"free": 10 * GIB}, {"utilization": 0.25}],
    ids=["a byte short", "nothing left", "less than nothing", "too small a part"],
)
def test_too_little_is_refused_with_the_setting_and_the_numbers(changed: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        room(**changed)
    message = str(refused.value)
    assert "VISQ_GPU_MEMORY_UTILIZATION" in message
    assert "the GPU's 80.0 GiB" in message
    assert f"{changed.get('free', 60 * GIB) / GIB:.1f} GiB are free" in message
