"""The C compiler that Triton needs at run time, to build the launcher of each kernel."""

from __future__ import annotations

import os
import shutil
from functools import cache


@cache
def c_compiler() -> str | None:
    """What Triton will find, in its order: ``$CC``, clang, gcc; ``None``: nothing, so that neither
    a Triton kernel nor `torch.compile` can run on CUDA."""
    candidates = (os.environ.get("CC"), "clang", "gcc")
    return next((found for each in candidates if each and (found := shutil.which(each))), None)
