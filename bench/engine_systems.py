"""The systems that `bench.engine` measures, behind one face."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from bench.engine_load import Prompt
from visq.pixels import PixelBuffer
from visq.types import GenerationConfig, ImagePart, ImageUrl, Message, TextPart
from worker.engine.config import EngineConfig
from worker.engine.face import EngineRequest, Event, Finished, TokenEvent
from worker.engine.loading import load
from worker.engine.opening import open_engine


@dataclass
class Answer:
    """What came back for a prompt, and when."""

    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    times: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the submit, and how many tokens had come by then."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0][0]

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        (begin, few), (end, many) = self.times[0], self.times[-1]
        return (many - few) / (end - begin)


class System(Protocol):
    """Answers greedily, with exactly as many new tokens as it is asked for."""

    def answer(self, prompts: Sequence[Prompt], new: int) -> list[Answer]:
        """All at once; as the system likes to batch them."""

    def chat(self, turns: Sequence[Prompt], new: int) -> list[Answer]:
        """One session, each turn with the answers of those before it. May be unable
        (`NotImplementedError`)."""

    def close(self) -> None: ...


class FaceSystem:
    """An engine of visq, in this process: ``native`` or ``generate``."""

    def __init__(self, folder: Path, *, prefix_caching: bool = True, **config: Any) -> None:
        self._engine = open_engine(
            EngineConfig(model=str(folder), prefix_caching=prefix_caching, **config)
        )
        self._pixels: dict[int, PixelBuffer] = {}

    def answer(self, prompts: Sequence[Prompt], new: int) -> list[Answer]:
        requests = [self._request([prompt], [], new) for prompt in prompts]
        return self._ask(requests)

    def chat(self, turns: Sequence[Prompt], new: int) -> list[Answer]:
        answers: list[Answer] = []
        for turn in range(len(turns)):
            answers += self._ask([self._request(turns[: turn + 1], answers, new)])
        return answers

    def close(self) -> None:
        self._engine.close()
        for buffer in self._pixels.values():
            buffer.release()

    def _ask(self, requests: Sequence[EngineRequest]) -> list[Answer]:
        start = time.perf_counter()
        happened: list[SimpleQueue[tuple[float, Event]]] = []
        for request in requests:
            events: SimpleQueue[tuple[float, Event]] = SimpleQueue()
            self._engine.submit(request, partial(_note, events))
            happened.append(events)
        return [_read(events, start) for events in happened]

    def _request(
        self, turns: Sequence[Prompt], answers: Sequence[Answer], new: int
    ) -> EngineRequest:
        messages: list[Message] = []
        for index, turn in enumerate(turns):
            pictures = [ImagePart(image_url=ImageUrl(url="-")) for _ in turn.seeds]
            messages.append(Message(role="user", content=[TextPart(text=turn.text), *pictures]))
            if index < len(turns) - 1:
                messages.append(Message(role="assistant", content="-"))
        return EngineRequest(
            id="bench",
            messages=messages,
            images=[buffer for turn in turns for buffer in self._buffers(turn)],
            gen_config=_greedy(new),
            answer_ids={2 * i + 1: answer.token_ids for i, answer in enumerate(answers)},
        )

    def _buffers(self, prompt: Prompt) -> list[PixelBuffer]:
        for seed, image in zip(prompt.seeds, prompt.images, strict=True):
            if seed not in self._pixels:
                self._pixels[seed] = PixelBuffer.create(np.asarray(image), f"{seed:064x}")
        return [self._pixels[seed] for seed in prompt.seeds]


class StaticSystem:
    """transformers' ``generate`` over padded batches of a fixed size: a worker that batches by
    itself, without an engine."""

    def __init__(self, folder: Path, batch: int, **config: Any) -> None:
        self._loaded = load(EngineConfig(model=str(folder), **config))
        self._loaded.tokenizer.padding_side = "left"
        self._batch = batch

    def answer(self, prompts: Sequence[Prompt], new: int) -> list[Answer]:
        parts = range(0, len(prompts), self._batch)
        return [
            answer for at in parts for answer in self._batched(prompts[at : at + self._batch], new)
        ]

    def chat(self, turns: Sequence[Prompt], new: int) -> list[Answer]:
        raise NotImplementedError

    def close(self) -> None:
        del self._loaded

    @torch.inference_mode()
    def _batched(self, prompts: Sequence[Prompt], new: int) -> list[Answer]:
        loaded = self._loaded
        texts = [_rendered(loaded.processor, prompt) for prompt in prompts]
        images = [image for prompt in prompts for image in prompt.images]
        inputs = loaded.processor(
            text=texts, images=images or None, return_tensors="pt", padding=True
        ).to(loaded.device, loaded.dtype)
        output = loaded.model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )
        length = inputs["input_ids"].shape[1]
        return [Answer(row[length:].tolist(), length) for row in output]


class LMDeploySystem:
    """LMDeploy's Pipeline with its PyTorch engine."""

    def __init__(self, folder: Path, *, prefix_caching: bool = True, batch: int = 256) -> None:
        os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")
        self._lmdeploy = importlib.import_module("lmdeploy")
        backend = self._lmdeploy.PytorchEngineConfig(
            max_batch_size=batch, session_len=16_384, enable_prefix_caching=prefix_caching
        )
        self._pipe = self._lmdeploy.pipeline(str(folder), backend_config=backend)

    def answer(self, prompts: Sequence[Prompt], new: int) -> list[Answer]:
        asked = [self._asked(prompt) for prompt in prompts]
        if len(asked) == 1:
            return [self._streamed(self._pipe.stream_infer(asked, gen_config=self._greedy(new)))]
        responses = self._pipe(asked, gen_config=self._greedy(new))
        return [Answer(list(each.token_ids), each.input_token_len) for each in responses]

    def chat(self, turns: Sequence[Prompt], new: int) -> list[Answer]:
        session = self._pipe.session()
        answers: list[Answer] = []
        for turn in turns:
            config = self._greedy(new)
            stream = self._pipe.chat(
                self._asked(turn), session=session, gen_config=config, stream_response=True
            )
            answers.append(self._streamed(stream))
        return answers

    def close(self) -> None:
        self._pipe.close()

    def _greedy(self, new: int) -> Any:
        return self._lmdeploy.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)

    @staticmethod
    def _asked(prompt: Prompt) -> Any:
        if not prompt.seeds:
            return prompt.text
        images = prompt.images
        return prompt.text, images[0] if len(images) == 1 else images

    @staticmethod
    def _streamed(stream: Iterator[Any]) -> Answer:
        answer, start = Answer(), time.perf_counter()
        for response in stream:
            answer.times.append((time.perf_counter() - start, response.generate_token_len))
            answer.prompt_tokens = response.input_token_len
            answer.token_ids += response.token_ids
        return answer


def _note(events: SimpleQueue[tuple[float, Event]], event: Event) -> None:
    events.put((time.perf_counter(), event))


def _read(events: SimpleQueue[tuple[float, Event]], start: float) -> Answer:
    """Wait for the outcome of one request."""
    answer, tokens = Answer(), 0
    while True:
        at, event = events.get()
        match event:
            case TokenEvent():
                tokens += len(event.token_ids)
                answer.times.append((at - start, tokens))
            case Finished():
                answer.token_ids = event.token_ids
                answer.prompt_tokens = event.prompt_tokens
                return answer
            case _:
                raise SystemExit(f"a request was not answered: {event}")


def _rendered(processor: Any, prompt: Prompt) -> str:
    parts = [{"type": "text", "text": prompt.text}, *({"type": "image"} for _ in prompt.seeds)]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    return text


def _greedy(new: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new, ignore_eos=True)
