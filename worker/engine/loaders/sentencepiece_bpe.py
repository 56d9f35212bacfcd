"""Reads the BPE tokenizers of SentencePiece (``tokenizer.model``) into the `tokenizers` library.

The file is a protobuf message of which a dozen fields matter, so it is read here, without the
libraries of SentencePiece and protobuf. Field numbers: ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from visq.errors import ConfigurationError

SPACE: Final = "\u2581"
"""How SentencePiece writes a space."""

BPE: Final = 2
"""``TrainerSpec.model_type``; 1 is Unigram."""

CONTROL, USER_DEFINED = 3, 4
"""``SentencePiece.type``: never made from text; made from text before anything else."""

Fields: TypeAlias = dict[int, list[int | bytes]]


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    type: int


def read_sentencepiece(model: bytes, added: Mapping[int, AddedToken]) -> Tokenizer:
    """Build the tokenizer of a ``tokenizer.model``; it adds no BOS of its own.

    :param added: the checkpoint's added tokens by id. One whose id is a piece's takes its place
        (InternLM2 keeps unused pieces for that); the others follow the pieces without a gap.
    :raises ConfigurationError: not a BPE model, damaged, or `added` leaves a gap.
    """
    try:
        message = _fields(model)
        pieces = [_piece(_fields(_bytes(each))) for each in message[1]]
        trainer = _fields(_bytes(message[2][0]))
        rules = _fields(_bytes(message.get(3, [b""])[0]))
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise ConfigurationError("tokenizer.model is damaged: download it again") from error
    if _int(trainer, 3, default=1) != BPE or _int(trainer, 24, default=0):
        raise ConfigurationError("tokenizer.model: only SentencePiece BPE models can be loaded")
    vocab = _vocabulary(pieces, added)
    unknown = list(vocab)[_int(trainer, 40, default=0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(_int(trainer, 35, default=0)),
        )
    )
    tokenizer.normalizer = _normalizer(rules)
    tokenizer.decoder = _decoder(rules)
    _add_tokens(tokenizer, pieces, added)
    return tokenizer


def _vocabulary(pieces: list[_Piece], added: Mapping[int, AddedToken]) -> dict[str, int]:
    names = [piece.text for piece in pieces]
    for index, token in added.items():
        if index < len(names):
            names[index] = token.content
    vocab = {name: index for index, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ConfigurationError("the added tokens of the checkpoint repeat pieces of its model")
    return vocab


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the best score first.

    SentencePiece merges the neighbours whose joint piece scores best; `tokenizers` merges those
    that come first in a list.
    """
    index = {piece.text: place for place, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in index and right in index:
                found.append((-piece.score, index[left], index[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _normalizer(rules: Fields) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap := _bytes(rules.get(2, [b""])[0]):
        steps.append(normalizers.Precompiled(charsmap))
    if _int(rules, 4, default=1):  # remove_extra_whitespaces
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if _int(rules, 3, default=1):  # add_dummy_prefix
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(rules: Fields) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if _int(rules, 3, default=1) or _int(rules, 4, default=1):
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _add_tokens(
    tokenizer: Tokenizer, pieces: list[_Piece], added: Mapping[int, AddedToken]
) -> None:
    # If the model has a dummy prefix, text after a user-defined piece gets one too; SentencePiece
    # itself does so after control pieces only.
    tokens = {
        index: AddedToken(piece.text, special=piece.type == CONTROL, normalized=False)
        for index, piece in enumerate(pieces)
        if piece.type in (CONTROL, USER_DEFINED)
    }
    tokens |= added
    for index, token in sorted(tokens.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ConfigurationError(
                f"the added token {token.content} should have the id {index}, but the ids before "
                "it are not all taken: the checkpoint's tokenizer files do not fit each other"
            )


def _piece(fields: Fields) -> _Piece:
    score = struct.unpack("<f", _bytes(fields[2][0]))[0] if 2 in fields else 0.0
    return _Piece(_bytes(fields[1][0]).decode(), score, _int(fields, 3, default=1))


def _int(fields: Fields, number: int, *, default: int) -> int:
    value = fields.get(number, [default])[-1]
    return value if isinstance(value, int) else default


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise IndexError("a number stands where a message should")
    return value


def _fields(message: bytes) -> Fields:
    """Values of a protobuf message by field number; nested messages and floats as bytes."""
    fields: Fields = {}
    for number, value in _walk(message):
        fields.setdefault(number, []).append(value)
    return fields


def _walk(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """https://protobuf.dev/programming-guides/encoding/"""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire_type = tag & 7
        value: int | bytes
        if wire_type == 0:
            value, at = _varint(message, at)
        else:
            if wire_type == 2:
                length, at = _varint(message, at)
            else:
                length = {1: 8, 5: 4}[wire_type]
            value, at = message[at : at + length], at + length
            if at > len(message):
                raise IndexError("the message ends inside a field")
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first; and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
