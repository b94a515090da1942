"""tokenizer.model -> a fast tokenizer that splits as SentencePiece does, by a plain reading of its algorithm."""

import pytest
from original_layout import internlm2_pieces, sentencepiece_bytes
from tokenizers import AddedToken

from perceptio_hf.conversion.sentencepiece_model import bpe_tokenizer, read_sentencepiece_model

PIECES = internlm2_pieces()


def encode(text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose join scores best, leftmost first, while there are any."""
    ids = {piece: id for id, (piece, _, kind) in enumerate(PIECES) if kind == 1}
    scores = {piece: score for piece, score, kind in PIECES if kind == 1}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joins = [(-scores[a + b], place) for place, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]  # noqa: B905, RUF007
        if not joins:
            break
        _, place = min(joins)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]  # bytes follow <unk>, <s>, </s>
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(sentencepiece_bytes(PIECES))
    count = len(PIECES)
    named = {0: "<unk>", 1: "<s>", 2: "</s>", count - 2: "<|im_end|>", count: "<img>", count + 1: "[SEG]"}
    added = {id: AddedToken(token, special=True, normalized=False) for id, token in named.items()}
    return bpe_tokenizer(read_sentencepiece_model(path), added)


@pytest.mark.parametrize(
    "text",
    [
        "the red ball",
        "Which is the user's  ball",
        "   blue",
        "theredballs",
        "日本 ball\n",
        "red" * 7,
        "seeed reed",
        "é",
        "",
    ],
)
def test_texts_split_as_sentencepiece_splits_them(tokenizer, text):
    assert tokenizer.encode(text).ids == encode(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_added_tokens_rename_spare_pieces_or_follow_them(tokenizer):
    count = len(PIECES)
    assert tokenizer.encode("red<|im_end|><img>[SEG]").ids == [*encode("red"), count - 2, count, count + 1]
    assert tokenizer.id_to_token(count - 2) == "<|im_end|>" and tokenizer.token_to_id("[UNUSED_TOKEN_0]") is None


def test_a_dummy_prefix_is_a_space_before_the_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(PIECES, dummy_prefix=True))
    tokenizer = bpe_tokenizer(read_sentencepiece_model(tmp_path / "tokenizer.model"), {})
    assert tokenizer.encode("the red ball").ids == encode(" the red ball")
    assert tokenizer.decode(encode(" the red ball")) == "the red ball"


def test_scores_and_kinds_are_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(PIECES))
    model = read_sentencepiece_model(tmp_path / "tokenizer.model")
    assert [(piece.text, piece.score, piece.kind) for piece in model.pieces] == PIECES
    assert not model.add_dummy_prefix and not model.remove_extra_whitespaces and model.charsmap == b""


def test_a_gap_between_added_tokens_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(PIECES))
    model = read_sentencepiece_model(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=f"'<img>' should have id {len(PIECES) + 1}"):
        bpe_tokenizer(model, {len(PIECES) + 1: AddedToken("<img>")})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a SentencePiece model"),
        (b"<!DOCTYPE html>", "not a SentencePiece model"),
        (b"\x0a\x80\x80\x80\x80\x08x", "not a SentencePiece model"),
        (sentencepiece_bytes(PIECES)[:-1], "not a SentencePiece model"),
        (sentencepiece_bytes(PIECES, model_type=1), "of type 1; only BPE"),
    ],
)
def test_other_files_are_refused(tmp_path, content, named):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=named):
        read_sentencepiece_model(tmp_path / "tokenizer.model")
