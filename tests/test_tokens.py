"""Reading spatial tokens out of a row of ids."""

from dataclasses import replace

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


# A tokenizer that spells marks with these pieces, two of them by two ids each.
PIECES = {20: "Im", 21: "age-", 22: "1", 23: "2", 24: "12", 25: ":", 26: ":", 27: "Image", 28: "-"}
MARKED = replace(WORDS, mark_pieces=PIECES)
FIRST, SECOND, TWELFTH = [20, 21, 22, 25], [27, 28, 23, 26], [20, 21, 24, 25]


def pictures_of(ids, start=0, words=MARKED):
    read = read_sequence(ids, words, start)
    return [seg.picture for seg in read.segs], [span.picture for span in read.spans]


def test_a_mark_names_any_picture_of_the_conversation():
    shown = [IMAGE, WORD, IMAGE, EOS, SEG, *SPAN, EOS, IMAGE, WORD, EOS]
    responses = {
        "nothing": ([SEG, *SPAN], [2], [2]),
        "one": ([*FIRST, SEG, *SPAN, SEG], [0, 1], [0]),
        "words between": ([*SECOND, WORD, WORD, SEG, SEG], [1, 1], []),
        "each in another order": ([*SECOND, *SPAN, *FIRST, *SPAN, SEG, EOS], [1], [1, 0]),
        "all in order": ([*FIRST, *SPAN, *SPAN, *SPAN], [], [0, 1, 2]),
        "back and forth": ([SEG, *FIRST, SEG, *SECOND, SEG], [2, 0, 1], []),
        "until the turn ends": ([*FIRST, SEG, EOS, WORD, EOS, SEG], [0, 2], []),
        "one that was never shown": ([*TWELFTH, SEG], [2], []),
        "digits in two tokens": ([20, 21, 22, 23, 25, SEG], [2], []),
        "no colon": ([20, 21, 22, WORD, SEG], [2], []),
        "interrupted": ([20, 21, WORD, 22, 25, SEG], [2], []),
        "interrupted by a span": ([20, 21, *SPAN, 22, 25, SEG], [2], [2]),
    }
    for name, (ids, segs, spans) in responses.items():
        assert pictures_of([*shown, *ids], start=len(shown)) == (segs, spans), name
        assert read_sequence([*shown, *ids], MARKED, len(shown)).well_formed, name
    many = [*[IMAGE, WORD] * 12, EOS]
    assert pictures_of([*many, *TWELFTH, SEG, *FIRST, SEG], start=len(many)) == ([11, 0], [])
    assert pictures_of([*shown, *FIRST, SEG], len(shown), words=WORDS) == ([2], [])  # older checkpoints know no marks
    read = read_sequence(shown, MARKED, len(shown))
    assert (read.num_pictures, read.pictures_shown) == (1, 3)


def test_marks_that_a_user_types_say_nothing():
    turns = {
        "before the pictures": [*SECOND, IMAGE, WORD, IMAGE, EOS],
        "behind them": [IMAGE, WORD, IMAGE, *SECOND, EOS],
        "in a later turn": [IMAGE, WORD, IMAGE, EOS, WORD, EOS, *SECOND, EOS],
        "in a prompt without turns": [IMAGE, WORD, IMAGE, *SECOND],
    }
    for name, prompt in turns.items():
        assert pictures_of([*prompt, SEG, *SPAN], start=len(prompt)) == ([0], [0]), name
        if prompt[-1] == EOS:
            assert pictures_of([*prompt, SEG, *SPAN]) == ([0], [0]), name  # read as a whole, as training does


def test_a_response_begun_in_the_prompt_keeps_its_mark():
    prompt = [IMAGE, WORD, IMAGE, EOS, *SECOND]
    assert pictures_of([*prompt, SEG], start=len(prompt)) == ([1], [])
    assert pictures_of([*prompt[:-1], SECOND[-1], SEG], start=len(prompt) - 1) == ([1], [])


def test_without_a_picture_there_is_nothing_to_speak_of():
    prompt = [WORD, EOS]
    for ids in ([SEG], SPAN, [*FIRST, SEG], [SEG, *SPAN, WORD]):
        read = read_sequence([*prompt, *ids], MARKED, len(prompt))
        assert not read.segs and not read.spans and not read.well_formed
        assert read.num_pictures == read.pictures_shown == 0
    later = [SEG, *SPAN, EOS, IMAGE, EOS]
    assert pictures_of([*later, SEG, *SPAN]) == ([0], [0])  # what came before the picture does not speak of it


@given(st.lists(st.sampled_from([SEG, START, END, IMAGE, EOS, WORD, *CODES, *PIECES]), max_size=40), st.integers(0, 40))
def test_no_sequence_is_too_foreign(ids, start):
    read = read_sequence(ids, MARKED, start)
    assert all(len(span.codes) == N for span in read.spans)
    assert all(seg.position >= start for seg in read.segs)
    assert all(0 <= item.picture < read.pictures_shown for item in (*read.segs, *read.spans))
    assert read.num_pictures <= read.pictures_shown
