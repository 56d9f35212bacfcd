"""``visq chat``: a session at the terminal, or fed by a pipe, one turn a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from visq.cli.client_common import (
    AsJson,
    Data,
    Exit,
    Url,
    connected,
    print_json,
    show_error,
)
from visq.cli.console import errors
from visq.errors import Unavailable, VisqError

if TYPE_CHECKING:
    from visq.client import Client, Job, Session

HELP: Final = """\
/image PATH   show an image (or s3://bucket/key) with the next question; may be repeated
/new          begin a new session
/quit         leave (or Ctrl-D); Ctrl-C stops an answer\
"""


def chat(
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Shown with the first question; may be repeated."),
    ] = None,
    session: Annotated[str | None, typer.Option(help="Continue this session (ses_...).")] = None,
    as_json: AsJson = False,
    url: Url = None,
    data: Data = None,
) -> None:
    """Chat about images, turn by turn; /help says how."""
    with connected(url, data) as client:
        conversation = _Conversation(client, session, image or [], as_json)
        if conversation.at_terminal:
            errors.print(f"[dim]{client.base_url} — /help, /quit[/]")
        for line in conversation.lines():
            if not conversation.take(line.strip()):
                break
    if conversation.failed and not conversation.at_terminal:
        raise typer.Exit(Exit.NO_ANSWER)


class _Conversation:
    def __init__(
        self, client: Client, session_id: str | None, images: list[str], as_json: bool
    ) -> None:
        self._client = client
        self._session: Session | None = client.sessions.get(session_id) if session_id else None
        self._images = images
        self._as_json = as_json
        self.at_terminal = sys.stdin.isatty()
        self.failed = False

    def lines(self) -> Iterator[str]:
        if not self.at_terminal:
            yield from sys.stdin
            return
        while True:
            mark = f"[{len(self._images)} image(s)] " if self._images else ""
            try:
                yield input(f"{mark}> ")
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                typer.echo()

    def take(self, line: str) -> bool:
        """Do what a line says; whether to go on."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                errors.print(HELP, markup=False)
            case "/new":
                self._session, self._images = None, []
            case "/image":
                self._add_image(rest.strip().strip("'\""))
            case _ if command.startswith("/"):
                errors.print(f"there is no command {command}; /help lists them", markup=False)
            case _:
                self._ask(line)
        return True

    def _add_image(self, name: str) -> None:
        if "://" in name or name.startswith(("data:", "img_")) or Path(name).is_file():
            self._images.append(name)
        else:
            errors.print(f"there is no file {name!r}", markup=False)
            self.failed = True

    def _ask(self, prompt: str) -> None:
        images, self._images = self._images, []
        try:
            if self._session is None:
                self._session = self._client.sessions.create()
            job = self._session.chat(prompt, images=images)
            self._show(job)
        except Unavailable:
            raise  # the next turn would meet the same
        except VisqError as error:
            show_error(error)
            self.failed = True

    def _show(self, job: Job) -> None:
        try:
            if self._as_json:
                job.wait()
                print_json(job.view)
                return
            for piece in job.stream():
                typer.echo(piece, nl=False)
            typer.echo()
        except KeyboardInterrupt:
            job.cancel()
            typer.echo()
            errors.print("[dim]stopped[/]")
