"""The end of the device's memory: which errors mean it, and what is given back then."""

from __future__ import annotations

from typing import Final

import torch

from visq.errors import EngineCrashed

# cuBLAS and cuDNN; Triton, and CUDA itself where torch's allocator has no part in it; the CPU. (The
# error of CUDA is not one of those after which only a new process helps.)
_TEXTS: Final = ("ALLOC_FAILED", "out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one while which it was raised, says that there is no memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__context__
    return False


def give_back() -> None:
    """Let the device have what torch keeps for later. To be called where nothing holds the
    traceback of the error any more: it holds what was in its functions."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def out_of_memory() -> EngineCrashed:
    """What a request fails with that no memory is enough for."""
    return EngineCrashed("the engine ran out of memory in this request")
