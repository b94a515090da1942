"""Questions are checked before the model sees them; answers come bit by bit; results as files and as HTML."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import perceptio_hf
from perceptio_hf.app import results
from perceptio_hf.app.assistant import CLOSEST, Assistant, Question, mark
from perceptio_hf.app.examples import EXAMPLES
from perceptio_hf.commands import checkpoints
from perceptio_hf.data.depth_maps import read_depth
from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.processing.processing_perceptio import PictureGeometry, SpatialAnswer
from perceptio_hf.processing.streaming import AnswerEvent, DepthRowEvent, MaskEvent, TextEvent
from perceptio_hf.world import draw_points

PICTURE = Image.effect_noise((90, 60), 60).convert("RGB")


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*checkpoints.load(perceptio_hf.tiny_checkpoint(), "cpu"), "tiny")


def answer(masks: int = 2) -> SpatialAnswer:
    planes = np.zeros((masks, 60, 90), bool)
    for number in range(masks):
        planes[number, 5 : 40 + number, 10 : 30 + 20 * number] = True
    depth = np.linspace(0, 1, 60 * 90, dtype=np.float32).reshape(60, 90)
    phrases, scores = ["the <b>cat</b>", None][:masks], np.linspace(0.4, 0.8, masks, dtype=np.float32)
    geometry = PictureGeometry(planes, scores, depth, [1] * 64, np.full((60, 90), 0.7, np.float32), phrases)
    return SpatialAnswer("words", (geometry,))


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "empty"),
        ({"text": " \n"}, "empty"),
        ({"points": [(1, 1)]}, "empty"),
        ({"text": "x" * 2001}, "2,001"),
        ({"text": "Where?", "spatial": "masks"}, "seg\\+depth"),
        ({"points": [(1, 1)] * 9}, "at most 8"),
        ({"points": [(1, 1), (90, 1)]}, "outside"),
        ({"points": [(1, 1), (float("nan"), 1)]}, "outside"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_in_one_line(asked, problem):
    with pytest.raises(ValueError, match=problem) as refused:
        Question(PICTURE, **asked)
    assert "\n" not in str(refused.value)


def test_points_without_words_ask_for_the_closest():
    assert Question(PICTURE, points=[(1, 1), (50, 30)]).text == CLOSEST


def test_points_are_drawn_as_hardblink_draws_them():
    """At the picture's size exactly so; at another where they lie there."""
    drawn = np.asarray(mark(PICTURE, [(20, 30), (60.4, 10.9)], PICTURE.size))
    assert np.array_equal(drawn, draw_points(np.asarray(PICTURE), [(20, 30), (60, 11)], "AB"))
    large = Image.new("RGB", (900, 600))
    red = np.argwhere((np.asarray(mark(large, [(20, 30)], (90, 60))) == (255, 0, 0)).all(-1))
    assert np.allclose(red.mean(0), (305, 205), atol=1)
    assert mark(Image.new("RGB", (5, 9)), [(0, 0)], (5, 9)).size == (35, 63), "too small to draw on"
    narrow = Image.new("RGB", (100_000, 1))  # a file of some hundred bytes; at 32 rows it would have 102 million pixels
    with pytest.raises(ValueError, match="too narrow for points: 100000 x 1 pixels"):
        Question(narrow, points=[(0, 0), (5, 0)])
    assert Question(narrow, "What is it?") and Question(Image.new("RGB", (5000, 4000)), points=[(0, 0), (5, 0)])


def test_an_answer_comes_bit_by_bit_at_the_size_of_the_picture(assistant):
    example = EXAMPLES[1]
    *events, last = assistant.ask(Question(example.render(), example.question, "seg+depth", example.points))
    assert {type(event) for event in events} == {MaskEvent, DepthRowEvent, TextEvent}
    assert isinstance(last, AnswerEvent) and last.answer.depth.shape == last.answer.masks[0].shape == (512, 512)
    codes = [code for event in events if isinstance(event, DepthRowEvent) for code in event.codes]
    growing = assistant.partial_depth(codes[: 3 * assistant.model.config.depth_config.grid_size])
    whole = assistant.partial_depth(codes)
    missing = np.abs(growing - whole)
    assert growing.shape == whole.shape and missing[: len(whole) // 4].mean() < missing.mean()


def test_the_model_sees_points_as_sharp_as_in_training(assistant):
    """Drawn at its own size, not scaled down with the picture, where it sees one tile."""
    example = EXAMPLES[1]
    seen = assistant._seen(Question(example.render(), example.question, points=example.points))
    tile = assistant.processor.image_processor.size
    assert seen.size == (tile["width"], tile["height"])
    assert (np.asarray(seen) == (255, 0, 0)).all(-1).sum() > 20
    assert assistant._seen(Question(PICTURE, "Where?", points=[(1, 1)])).size == PICTURE.size


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_files_hold_what_was_answered(masks, tmp_path):
    said = answer(masks)
    files = results.write_files(said, tmp_path)
    assert np.abs(read_depth(files["depth"], "relative").relative - said.depth).max() < 1e-4
    if not masks:
        assert files["masks"] is files["lengths"] is None
        return
    record = json.loads(Path(files["lengths"]).read_text())
    assert np.array_equal(np.stack([decode_mask(mask) for mask in record["masks"]]), said.masks)
    if masks == 1:
        found = [Image.open(files["masks"])]
    else:
        with zipfile.ZipFile(files["masks"]) as archive:
            found = [Image.open(io.BytesIO(archive.read(f"mask-{number}.png"))) for number in (1, 2)]
    assert np.array_equal(np.stack([np.asarray(picture) > 0 for picture in found]), said.masks)


def test_words_of_users_and_models_are_never_html():
    shown = results.show_words("<script>1</script>", "<img onerror=x>")
    assert "<script" not in shown and "<img" not in shown
    written = results.show_written([MaskEvent(0, 0, None), TextEvent("<i>a</i>"), DepthRowEvent(0, 0, 2, (1, 2))])
    assert "<i>" not in written and "2 of 4 codes" in written and "<details>" in written


def test_looking_up_is_shown_below_its_result():
    shown = results.show_words("Which?", "A p27 d00 B p09 d02: B")
    assert '<p class="pp-said">B</p>' in shown and "A p27 d00 B p09 d02" in shown
    assert "pp-aside" not in results.show_words("Which?", "At 10:30 it rains: B")


def test_layers_have_colours_places_and_scores():
    first, second = results.show_masks(answer())
    assert first["phrase"] == "the <b>cat</b>" and second["phrase"] is None
    assert first["color"] != second["color"] and (first["score"], second["score"]) == (0.4, 0.8)
    assert 0.1 < first["at"][0] < 0.35 and 0.1 < first["at"][1] < 0.7
