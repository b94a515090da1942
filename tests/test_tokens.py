"""Reading spatial tokens out of a row of ids."""

from hypothesis import given
from hypothesis import strategies as st

from perceptio_hf.tokens import (
    SpatialVocabulary,
    depth_span,
    read_sequence,
    spatial_tokens,
)

N, CODES = 3, tuple(range(10, 14))
SEG, START, END, IMAGE, EOS, WORD = 1, 2, 3, 4, 5, 6
WORDS = SpatialVocabulary(SEG, START, END, CODES, N, IMAGE, frozenset([EOS]))
SPAN = [START, 10, 11, 12, END]


def test_names_are_those_of_public_checkpoints():
    tokens = spatial_tokens(128)
    assert tokens[:3] == ["[SEG]", "<DEPTH_START>", "<DEPTH_0>"]
    assert tokens[-2:] == ["<DEPTH_127>", "<DEPTH_END>"] and len(tokens) == 131
    assert depth_span([3, 0]) == "<DEPTH_START><DEPTH_3><DEPTH_0><DEPTH_END>"


def test_whole_response():
    read = read_sequence([IMAGE, IMAGE, WORD, EOS, SEG, *SPAN, WORD, EOS], WORDS, start=4)
    assert [seg.position for seg in read.segs] == [4]
    assert [(span.position, span.codes) for span in read.spans] == [(5, (0, 1, 2))]
    assert read.well_formed and read.num_pictures == 1 and read.open_codes is None


def test_broken_spans_are_flagged_and_left_out():
    broken = {
        "too few": [START, 10, 11, END],
        "too many": [START, 10, 11, 12, 13, END],
        "word inside": [START, 10, WORD, 11, 12, END],
        "no start": [10, 11, 12, END],
        "no end": [START, 10, 11, 12],
        "stray code": [WORD, 12, WORD],
        "two starts": [START, START, 10, 11, 12, 13, END],
        "seg inside": [START, 10, SEG, 11, 12, END],
        "turn ends inside": [START, 10, EOS, 11, 12, END],
    }
    for name, ids in broken.items():
        read = read_sequence([IMAGE, EOS, *ids], WORDS, start=2)
        assert not read.well_formed, name
        assert not read.spans, name


def test_the_prompt_gives_context_only():
    prompt = [IMAGE, EOS, SEG, *SPAN, EOS, WORD, EOS]
    read = read_sequence([*prompt, SEG, *SPAN], WORDS, start=len(prompt))
    assert len(read.segs) == 1 and len(read.spans) == 1
    broken_prompt = [IMAGE, EOS, 10, END, EOS]
    assert read_sequence([*broken_prompt, *SPAN], WORDS, start=len(broken_prompt)).well_formed


def test_a_span_opened_in_the_prompt_is_reported_when_it_ends():
    prompt = [IMAGE, EOS, START, 10]
    assert read_sequence(prompt, WORDS, start=len(prompt)).open_codes == 1
    read = read_sequence([*prompt, 11, 12, END], WORDS, start=len(prompt))
    assert read.spans[0].codes == (0, 1, 2) and read.well_formed


def test_the_kth_span_speaks_of_the_kth_picture():
    ids = [IMAGE, IMAGE, WORD, IMAGE, EOS, SEG, *SPAN, SEG, *SPAN, SEG, EOS]
    read = read_sequence(ids, WORDS)
    assert [seg.picture for seg in read.segs] == [0, 1, 1]
    assert [span.picture for span in read.spans] == [0, 1] and read.num_pictures == 2


def test_a_later_turn_speaks_of_the_pictures_shown_last():
    first = [IMAGE, EOS, SEG, *SPAN, EOS]
    new_picture = read_sequence([*first, IMAGE, WORD, EOS, SEG, *SPAN], WORDS, start=len(first))
    assert [seg.picture for seg in new_picture.segs] == [1] and new_picture.spans[0].picture == 1
    same_picture = read_sequence([*first, WORD, EOS, SEG, *SPAN], WORDS, start=len(first))
    assert [seg.picture for seg in same_picture.segs] == [0] and same_picture.spans[0].picture == 0


@given(st.lists(st.sampled_from([SEG, START, END, IMAGE, EOS, WORD, *CODES]), max_size=40), st.integers(0, 40))
def test_no_sequence_is_too_foreign(ids, start):
    read = read_sequence(ids, WORDS, start)
    assert all(len(span.codes) == N for span in read.spans)
    assert all(seg.position >= start for seg in read.segs)
