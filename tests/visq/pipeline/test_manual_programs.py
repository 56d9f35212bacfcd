"""Both programs of LMDeploy's manual run here, with another import and another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.visq.pipeline.conftest import SAMPLES, TRUTH
from visq.pipeline import EngineConfig


def test_a_single_image_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    from visq import pipeline
    from visq.vl import load_image

    pipe = pipeline("small")
    image = load_image(str(SAMPLES / "02-shapes.png"))
    response = pipe(("describe this image", image))
    print(response.text)
    pipe.close()

    assert capsys.readouterr().out.strip() == TRUTH["02-shapes.png"]["answer"]
    assert response.finish_reason == "stop"
    assert response.input_token_len > 16  # the picture's own tokens


def test_two_turns_are_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    from visq import GenerationConfig, TurbomindEngineConfig, pipeline
    from visq.vl import load_image

    truth = TRUTH["01-shapes.png"]
    pipe = pipeline("small", backend_config=TurbomindEngineConfig(session_len=1024))
    image = load_image(SAMPLES / "01-shapes.png")
    gen_config = GenerationConfig(top_k=40, top_p=0.8, temperature=0.8)
    sess = pipe.chat((truth["question"], image), gen_config=gen_config)
    print(sess.response.text)
    sess = pipe.chat(truth["follow_up"]["question"], session=sess, gen_config=gen_config)
    print(sess.response.text)
    pipe.close()

    assert capsys.readouterr().out.split() == [truth["answer"], truth["follow_up"]["answer"]]
    assert [said for _, said in sess.history] == [truth["answer"], truth["follow_up"]["answer"]]


def test_the_program_for_the_image_token_runs(sample: Path) -> None:
    from visq import pipeline
    from visq.vl import load_image
    from visq.vl.constants import IMAGE_TOKEN

    with pipeline("small", backend_config=EngineConfig()) as pipe:
        image = load_image(sample)
        placed = pipe((f"{IMAGE_TOKEN}How many things are there?", image))
        assert placed == pipe((image, "How many things are there?"))
        assert placed.text == "9"
