"""`RemotePipeline` over a whole embedded stack: Valkey, the API, a worker with the small model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.visq.pipeline.conftest import SAMPLES, TRUTH
from tests.waiting import until
from visq.embedded.stack import Stack
from visq.errors import NotFound, UnsupportedParameter
from visq.objects import ObjectRef, open_store
from visq.pipeline import GenerationConfig, RemotePipeline, RequestConflict, Response
from visq.pipeline import remote as module
from visq.types import JobStatus
from visq.vl import load_image

pytestmark = pytest.mark.timeout(120)

TALK = TRUTH["01-shapes.png"]
LONG = GenerationConfig(max_new_tokens=1500, ignore_eos=True)


@pytest.fixture(scope="module")
def remote(stack: Stack) -> Iterator[RemotePipeline]:
    with RemotePipeline(stack.url, stack.api_key) as remote:
        yield remote


def no_job_is_open(remote: RemotePipeline) -> bool:
    return all(job.status.is_terminal for job in remote.client.jobs.list())


def test_the_single_image_program_runs(remote: RemotePipeline, sample: Path) -> None:
    response = remote((TALK["question"], load_image(sample)))
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason) == (TALK["answer"], "stop")
    assert response.input_token_len > 16
    assert response.generate_token_len >= 1


def test_the_two_turn_program_runs_on_a_session_of_the_server(
    remote: RemotePipeline, sample: Path
) -> None:
    session = remote.chat((TALK["question"], load_image(sample)))
    assert session.response.text == TALK["answer"]
    session = remote.chat(TALK["follow_up"]["question"], session=session)
    assert session.response.text == TALK["follow_up"]["answer"]
    assert [said for _, said in session.history] == [TALK["answer"], TALK["follow_up"]["answer"]]
    stored = list(remote.client.sessions.messages(session.session_id))
    assert [message.role for message in stored] == ["user", "assistant"] * 2
    known = session.session_id
    session.close()
    session.close()
    with pytest.raises(NotFound):
        remote.client.sessions.get(known)


def test_images_of_every_kind_reach_the_worker(
    remote: RemotePipeline, stack: Stack, sample: Path
) -> None:
    store = open_store(stack.settings)
    store.put(ObjectRef("pictures", "two.png"), sample.read_bytes(), "image/png")
    uploaded = remote.client.images.upload(sample).id
    image = Image.open(sample)
    kinds: list[Any] = [image, sample, sample.as_uri(), "s3://pictures/two.png"]
    parts = [{"type": "image_url", "image_url": uploaded}, {"type": "image", "image": str(sample)}]
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": TALK["question"]}, part]}]
        for part in parts
    ]
    prompts = [*((TALK["question"], kind) for kind in kinds), *messages]
    assert [response.text for response in remote(prompts)] == [TALK["answer"]] * len(prompts)


def test_a_list_longer_than_a_batch_is_answered_in_order(
    remote: RemotePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ITEMS", 3)
    files = ["01-shapes.png", "15-word.png", "19-icons.png", "22-bars.png"]
    prompts = [(TRUTH[file]["question"], SAMPLES / file) for file in files]
    responses = remote(prompts, use_tqdm=True)
    assert [each.text for each in responses] == [TRUTH[file]["answer"] for file in files]
    assert [each.index for each in responses] == [0, 1, 2, 3]


def test_a_bad_prompt_fails_alone_also_if_the_server_refuses_it(
    remote: RemotePipeline, sample: Path
) -> None:
    good = (TALK["question"], sample)
    prompts = [
        good,
        ("what?", Path("/nowhere.png")),
        ("what?", "s3://pictures/none.png"),
        ("what?", "s3://visq-uploads/of-somebody-else"),
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "nothing"}],
        good,
    ]
    responses = remote(prompts)
    assert [response.error_code for response in responses] == [
        None,
        "image_not_found",
        "image_not_found",
        "image_forbidden",
        "invalid_request",
        None,
    ]
    assert responses[0].text == responses[5].text == TALK["answer"]


def test_an_answer_comes_in_pieces(remote: RemotePipeline, sample: Path) -> None:
    prompts = ["Hello!", (TALK["question"], sample)]
    pieces = list(remote.stream_infer(prompts))
    answers = remote(prompts)
    for index, answer in enumerate(answers):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == answer.text
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1].input_token_len == answer.input_token_len


def test_a_dropped_iterator_cancels_its_jobs(remote: RemotePipeline) -> None:
    stream = remote.stream_infer("Hello!", gen_config=LONG)
    assert len(list(islice(stream, 2))) == 2
    del stream
    until(lambda: no_job_is_open(remote), 20, "the job to be cancelled")
    assert next(remote.client.jobs.list()).status is JobStatus.CANCELLED


def test_an_aborted_turn_is_not_appended(remote: RemotePipeline) -> None:
    session = remote.session()
    ends = []
    for piece in remote.chat("Hello!", session, LONG, stream_response=True):
        with pytest.raises(RequestConflict):
            remote.chat("Hello!", session=session)
        ends.append(piece.finish_reason)
        session.abort()
    assert ends[-1] == "abort"
    assert session.history == []
    remote.chat("Hello!", session=session)
    assert len(session.history) == 1


def test_a_turn_that_fails_says_so(remote: RemotePipeline) -> None:
    session = remote.chat(("what?", Path("/nowhere.png")))
    assert session.response.error_code == "image_not_found"
    assert session.history == []


def test_a_raw_prompt_goes_through(remote: RemotePipeline) -> None:
    raw = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    response = remote(raw, do_preprocess=False)
    assert response.text == remote("Hello!").text
    assert response.input_token_len == remote("Hello!").input_token_len


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(output_logits="all"),
        GenerationConfig(logits_processors=[lambda ids, logits: logits]),
    ],
)
def test_what_a_result_cannot_carry_is_refused_by_name(
    remote: RemotePipeline, config: GenerationConfig
) -> None:
    [name] = config.model_fields_set
    response = remote("Hello!", gen_config=config)
    assert response.error_code == "unsupported_parameter"
    assert f"`{name}`" in response.error_message


def test_logprobs_and_perplexity_are_those_of_the_model_in_this_program(
    remote: RemotePipeline, pipe: Any
) -> None:
    config = GenerationConfig(max_new_tokens=8, logprobs=2, return_ppl=True)
    far, here = remote("Hello!", gen_config=config), pipe("Hello!", gen_config=config)
    assert (far.text, far.token_ids) == (here.text, here.token_ids)
    assert far.generate_token_len == len(far.token_ids) == len(far.logprobs) > 0
    for there, local in zip(far.logprobs, here.logprobs, strict=True):
        assert there == pytest.approx(local, abs=1e-3)
    assert far.ppl == pytest.approx(here.ppl, abs=1e-3)
    assert far.choices == []


@pytest.mark.parametrize("logprobs", [None, 1])
def test_several_choices_come_back_and_the_answer_is_the_first(
    remote: RemotePipeline, logprobs: int | None
) -> None:
    config = GenerationConfig(
        n=3, do_sample=True, temperature=2.0, random_seed=3, max_new_tokens=8, logprobs=logprobs
    )
    whole = remote("Red or green?", gen_config=config)
    [single] = remote(["Red or green?"], gen_config=config)
    *pieces, last = remote.stream_infer("Red or green?", gen_config=config)
    assert [choice.choice for choice in whole.choices] == [0, 1, 2]
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) > 1
    assert whole.text == single.text == "".join(piece.text for piece in pieces) == texts[0]
    assert [choice.text for choice in last.choices] == texts
    lengths = [choice.generate_token_len for choice in whole.choices]
    if logprobs is None:
        assert lengths[1:] == [0, 0], "nobody says how the tokens are shared out"
        assert lengths[0] > 8
    else:
        assert lengths == [len(choice.token_ids) for choice in whole.choices]
        assert last.token_ids == whole.token_ids


def test_tokens_from_the_cache_are_counted(remote: RemotePipeline) -> None:
    prompt = "How many red circles are there beside the blue square? " * 8
    remote(prompt)
    assert remote(prompt).cached_tokens > 0


def test_scores_need_the_model_here(remote: RemotePipeline) -> None:
    with pytest.raises(UnsupportedParameter, match=r"visq\.pipeline"):
        remote.get_ppl([1, 2, 3])


def test_the_answers_are_those_of_the_model_in_this_program(
    remote: RemotePipeline, pipe: Any
) -> None:
    turned = Image.fromarray(np.rot90(np.asarray(Image.open(SAMPLES / "02-shapes.png"))))
    prompts: list[Any] = ["Hello!", (TALK["question"], turned), ("describe this image", turned)]
    assert [r.text for r in remote(prompts)] == [r.text for r in pipe(prompts)]
