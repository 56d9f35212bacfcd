"""What `Pipeline` and `RemotePipeline` have in common: the forms of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar

from visq.pipeline.generation import GenConfig, GenerationConfig, config_for_each
from visq.pipeline.prompts import PromptError, as_list
from visq.pipeline.response import Response
from visq.pipeline.session import Session

P = TypeVar("P", bound="BasePipeline")


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a call, as it was given."""

    prompt: Any
    gen_config: GenerationConfig
    do_preprocess: bool
    adapter_name: str | None
    session: Session | None = None


class Progress(Protocol):
    def __call__(self) -> None:
        """One more is answered."""


class BasePipeline(ABC):
    """LMDeploy's call forms over whatever answers."""

    def infer(
        self,
        prompts: Any,
        gen_config: GenConfig | Sequence[GenConfig] | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool = False,
    ) -> Any:
        """Answer one prompt or many.

        :param prompts: a string, ``(text, image)`` or ``(text, [images])`` (or the image first),
            OpenAI message dicts, or a list of these. An image is a PIL image, a `pathlib.Path`, or
            a string that begins with ``http``, ``data:image``, ``file://`` or ``s3://``.
        :param gen_config: one for all, or a list with one for each prompt.
        :param do_preprocess: ``False``: the text is the raw prompt, without a chat template.
        :param adapter_name: the LoRA adapter that answers.
        :param use_tqdm: show a progress bar.
        :returns: a `Response`, or a list of them in the order of the prompts. What fails is the
            prompt's own: ``finish_reason == "error"``, with `error_code` and `error_message`.
        :raises ValueError: the arguments have none of these forms.
        """
        asked, single = self._asked(prompts, gen_config, do_preprocess, adapter_name)
        answers: dict[int, Response] = {}
        with (
            _progress(len(asked), use_tqdm) as advance,
            closing(self._answers(asked)) as responses,
        ):
            for response in responses:
                answers[response.index] = response
                advance()
        return answers[0] if single else [answers[index] for index in range(len(asked))]

    def __call__(
        self,
        prompts: Any,
        gen_config: GenConfig | Sequence[GenConfig] | None = None,
        **options: Any,
    ) -> Any:
        """As `infer`."""
        return self.infer(prompts, gen_config, **options)

    def stream_infer(
        self,
        prompts: Any,
        sessions: Session | Sequence[Session] | None = None,
        gen_config: GenConfig | Sequence[GenConfig] | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
    ) -> Generator[Response]:
        """Answer as `infer` does, in pieces, as they are generated; `Response.index` says of which
        prompt, and the last piece of each has a `finish_reason`.

        The work begins with the first step of the iterator; when it is dropped, it ends.

        :param sessions: one for each prompt: busy meanwhile, and `abort` ends the answer. Their
            history is neither sent nor continued; `chat` does that.
        :param stream_response: ``False``: whole answers, in the order in which they end.
        """
        asked, _ = self._asked(prompts, gen_config, do_preprocess, adapter_name, sessions)
        return self._pieces(asked) if stream_response else self._answers(asked)

    def chat(
        self,
        prompt: Any,
        session: Session | None = None,
        gen_config: GenConfig | None = None,
        stream_response: bool = False,
        adapter_name: str | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Any:
        """The next turn of a conversation.

        :param prompt: one prompt, in any form of `infer`.
        :param session: that of the last turn; by default a new one.
        :returns: the session, with the answer in `Session.response`; if it failed, that says so
            and the history stays as it was. With `stream_response`: an iterator over the pieces.
        :raises RequestConflict: the session has a turn that has not ended.
        :raises ValueError: the arguments have none of these forms.
        """
        asked, single = self._asked(prompt, gen_config, do_preprocess, adapter_name, None)
        if not single:
            raise PromptError("`chat` takes one prompt, not a list of prompts", param="prompt")
        session = session or self.session()
        if gen_config is None and session.gen_config is not None:
            asked, _ = self._asked(prompt, session.gen_config, do_preprocess, adapter_name)
        pieces = self._turn(session, asked[0], stream=stream_response)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    @abstractmethod
    def session(self) -> Session:
        """A new session."""

    @abstractmethod
    def get_ppl(self, input_ids: list[int] | list[list[int]]) -> list[float]:
        """Score prompts that are given as tokens.

        :param input_ids: one prompt or many, of at least two tokens each.
        :returns: for each, the mean negative log likelihood (natural) of its tokens, each given
            those before it; the first has none.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. Repeatable."""

    def __enter__(self: P) -> P:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _answers(self, asked: Sequence[Asked]) -> Generator[Response]:
        """Whole answers as they end."""

    @abstractmethod
    def _pieces(self, asked: Sequence[Asked]) -> Generator[Response]:
        """Pieces of answers as they come."""

    @abstractmethod
    def _turn(self, session: Session, asked: Asked, *, stream: bool) -> Generator[Response]:
        """One turn of `session`: pieces of its answer, or all of it."""

    @staticmethod
    def _asked(
        prompts: Any,
        gen_config: GenConfig | Sequence[GenConfig] | None,
        do_preprocess: bool,
        adapter_name: str | None,
        sessions: Session | Sequence[Session] | None = None,
    ) -> tuple[list[Asked], bool]:
        """The prompts of a call, and whether it was a single one."""
        listed, single = as_list(prompts)
        configs = config_for_each(gen_config, len(listed))
        owners: Iterable[Session | None] = [None] * len(listed)
        if sessions is not None:
            owners = given = [sessions] if isinstance(sessions, Session) else list(sessions)
            if len(given) != len(listed):
                raise PromptError(
                    f"`sessions` has {len(given)} entries for {len(listed)} prompts",
                    param="sessions",
                )
        asked = [
            Asked(prompt, config, do_preprocess, adapter_name, session)
            for prompt, config, session in zip(listed, configs, owners, strict=True)
        ]
        return asked, single


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Progress]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress as Bar

    with Bar() as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)
