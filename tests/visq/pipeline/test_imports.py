"""``import visq`` costs nothing, and `pipeline` can be called whatever was imported before."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import visq

HEAVY = ("torch", "transformers", "numpy", "PIL", "httpx2", "pydantic")


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_visq_loads_nothing_heavy() -> None:
    assert run(f"import sys, visq; print({set(HEAVY)} & set(sys.modules))") == "set()"


def test_the_names_of_a_program_load_neither_a_model_nor_a_picture_library() -> None:
    program = (
        "import sys\n"
        "from visq import (GenerationConfig, PytorchEngineConfig, RemotePipeline,\n"
        "    TurbomindEngineConfig, load_image, pipeline)\n"
        "from visq.vl import IMAGE_TOKEN\n"
        "print({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules))"
    )
    assert run(program) == "set()"


@pytest.mark.parametrize(
    "before",
    ["", "import visq.pipeline", "from visq.pipeline import Response", "from visq import pipeline"],
)
def test_pipeline_is_something_to_call_whatever_was_imported_before(before: str) -> None:
    program = f"{before}\nfrom visq import pipeline\nprint(callable(pipeline), pipeline.__name__)"
    assert run(program).startswith("True ")


def test_the_module_is_called_as_the_function_is() -> None:
    import visq.pipeline as module
    from visq.pipeline import pipeline

    assert module.__call__ is pipeline  # type: ignore[attr-defined]
    assert list(inspect.signature(pipeline).parameters)[:7] == [
        "model_path",
        "backend_config",
        "chat_template_config",
        "log_level",
        "max_log_len",
        "trust_remote_code",
        "speculative_config",
    ]


def test_every_name_that_visq_lists_is_there() -> None:
    for name in visq.__all__:
        assert getattr(visq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pipelines'"):
        _ = visq.pipelines
