"""What runs in a preparing process: the model's image processor, without the model.

It ends with the engine's process, however that ends: the kernel kills it when the thread that
started it is gone, and it leaves by itself when the pipe closes. Ctrl-C is the engine's to handle.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedConfig

from visq import logs
from visq.errors import EngineError, Unavailable, VisqError
from visq.pixels import PixelBuffer
from worker.engine.child import die_with
from worker.engine.families.pictures import Normalisation, PictureProcessor
from worker.engine.families.processors import load_processor
from worker.engine.loaders import internvl2_processor
from worker.engine.loaders.internvl2_config import checkpoint_folder, recognise
from worker.engine.sharing import Place, share

logger = logging.getLogger(__name__)

READY: Final = "ready"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A `PreparedImage` whose tensors are in the memory whose descriptor follows."""

    token_ids: list[int]
    places: list[Place]


def serve(
    pipe: Connection[Any, Any],
    source: str,
    normalisation: Normalisation | None,
    log_level: str,
    owner: int,
) -> None:
    """Say that it is ready; then, for each picture that comes, prepare it and answer.

    :param source: folder or name of the model.
    :param owner: process id of the engine.
    """
    die_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(log_level)
    torch.set_num_threads(1)  # there is a process for each core that is to be used
    transformers.utils.logging.set_verbosity_error()
    pictures = PictureProcessor(_processor(source), normalisation)
    try:
        pipe.send(READY)
        while True:
            _answer(pipe, pictures, pipe.recv(), owner)
    except (EOFError, OSError):
        return  # the engine has gone


def _answer(
    pipe: Connection[Any, Any], pictures: PictureProcessor, picture: PixelBuffer, owner: int
) -> None:
    """Send what became of `picture`: `Prepared` and a descriptor, or an error."""
    fd = None
    answer: Prepared | VisqError
    try:
        prepared = pictures.prepare(picture.array())
        fd, places = share(prepared.tensors)
        answer = Prepared(prepared.token_ids, places)
    except VisqError as error:
        answer = error
    except (MemoryError, OSError):
        answer = Unavailable("there is no memory to prepare a picture in; try again later")
    except Exception:
        logger.exception("a picture cannot be prepared")
        answer = EngineError("a picture cannot be prepared; the engine's log says more")
    pipe.send(answer)
    if fd is not None:
        send_handle(pipe, fd, owner)
        os.close(fd)


def _processor(source: str) -> Any:
    """The processor that the engine loaded from there; its files are on this machine by now."""
    raw, _ = PreTrainedConfig.get_config_dict(source)
    if recognise(raw):
        folder: Path = checkpoint_folder(source)
        return internvl2_processor.load_processor(folder, raw)
    return load_processor(source)
