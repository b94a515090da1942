"""Reads a SentencePiece `tokenizer.model` (BPE) into a `tokenizers.Tokenizer`.

InternLM2's tokenizer is stored this way and comes with code of its own to load it. transformers' converters want the
sentencepiece library and know no InternLM2; the file itself is a small protocol-buffer message, read here field by
field (sentencepiece_model.proto of github.com/google/sentencepiece).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6  # SentencePiece.Type
_BPE_MODEL = 2  # TrainerSpec.ModelType
_SPACE = "\u2581"  # how pieces write a space


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `kind` is SentencePiece's type (1 normal, 2 unknown, 3 control, 6 byte, ...)."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says; the place of a piece is its id."""

    pieces: tuple[Piece, ...]
    model_type: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes


def read_sentencepiece_model(path: str | Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        ValueError: if it is no SentencePiece model, or one of another kind than BPE.
    """
    try:
        model = _parse(Path(path).read_bytes())
    except (IndexError, struct.error, UnicodeDecodeError, _NotProtobuf):
        model = None
    if model is None or not model.pieces:
        raise ValueError(f"{path} is not a SentencePiece model; copy the tokenizer.model of the checkpoint again.")
    if model.model_type != _BPE_MODEL:
        raise ValueError(f"{path} is a SentencePiece model of type {model.model_type}; only BPE (type 2) is read.")
    return model


def bpe_tokenizer(model: SentencePieceModel, added_tokens: Mapping[int, AddedToken]) -> Tokenizer:
    """The fast tokenizer that splits text as the SentencePiece model does.

    Args:
        model: the vocabulary and its scores.
        added_tokens: by id; one inside the vocabulary takes the place of the piece there (InternLM2 names its spare
            pieces so), the others follow it without a gap.

    Raises:
        ValueError: if the added tokens leave a gap.
    """
    words = [added_tokens[id].content if id in added_tokens else piece.text for id, piece in enumerate(model.pieces)]
    unknown = next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), None)
    byte_fallback = any(piece.kind == _BYTE for piece in model.pieces)
    tokenizer = Tokenizer(
        BPE(
            {word: id for id, word in enumerate(words)},
            _merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    defined = [AddedToken(piece.text, normalized=False) for piece in model.pieces if piece.kind == _USER_DEFINED]
    tokenizer.add_tokens(defined)
    for id in sorted(added_tokens):
        token = added_tokens[id]
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != id:
            raise ValueError(
                f"The tokenizer's added token {token.content!r} should have id {id}, but the vocabulary of "
                f"{len(words)} pieces and the tokens before it lead to {tokenizer.token_to_id(token.content)}."
            )
    return tokenizer


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Pairs in the order SentencePiece prefers them: by the score of the piece they make."""
    normal = {piece.text: id for id, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    pieces = sorted((piece for piece in model.pieces if piece.kind == _NORMAL), key=lambda piece: -piece.score)
    return [
        (piece.text[:at], piece.text[at:])
        for piece in pieces
        for at in range(1, len(piece.text))
        if piece.text[:at] in normal and piece.text[at:] in normal
    ]


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


class _NotProtobuf(Exception):
    pass


def _parse(data: bytes) -> SentencePieceModel:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:  # repeated SentencePiece
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            pieces.append(Piece(fields.get(1, b"").decode(), score, fields.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=trainer.get(3, 1),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a message: its number, and an int (varint) or the raw bytes."""
    if not isinstance(data, bytes):
        raise _NotProtobuf
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise _NotProtobuf
        else:
            raise _NotProtobuf
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
