"""Samples: what is read, and what is refused with which words."""

import io

import numpy as np
import pytest
from helpers import picture

from perceptio_hf.data.form import SampleError
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.data.samples import check_sample, load_sample
from perceptio_hf.tokens import depth_span

SIZES = {"num_depth_tokens": 4, "num_depth_codes": 8}
SPAN = "<DEPTH_START><DEPTH_END>"


def sample(said="[SEG] There.", asked="Where?", **fields) -> dict:
    """A question about a picture of 48 x 40 pixels; by default its answer has one [SEG]."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    masks = [encode_mask(box())] * said.count("[SEG]")
    return {"images": [picture()], "messages": messages, "masks": masks} | fields


def box(height=40, width=48) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[5:20, 10:30] = True
    return mask


def metres(height=40, width=48) -> np.ndarray:
    return np.linspace(0.5, 4, height * width).reshape(height, width)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_pictures_come_before_the_first_words():
    loaded = load_sample(sample(), **SIZES)
    assert [part["type"] for part in loaded.messages[0]["content"]] == ["image", "text"]
    assert len(loaded.pictures) == 1 and np.array_equal(loaded.masks[0], box()) and loaded.depths == []


def test_pictures_in_all_their_forms(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), np.array(image), data]
    forms += [{"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    for form in forms:
        loaded = load_sample(sample("Yes.", images=[form]), **SIZES)
        assert np.array_equal(np.array(loaded.pictures[0]), np.array(image))
    part = {"type": "image", "image": image, "text": None}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "No."}]
    assert len(load_sample({"messages": chat}, **SIZES).pictures) == 1
    assert part["image"] is image  # the caller's messages stay as they were


@pytest.mark.parametrize("form", ["rle", "numbers", "bytes", "array", "lists", "file", "palette"])
def test_masks_in_all_their_forms(form, tmp_path):
    from PIL import Image

    mask = box()
    runs = np.diff(np.flatnonzero(np.diff(np.r_[-1, mask.ravel(order="F").astype(int), -1])))
    grey = Image.fromarray(mask.astype(np.uint8))
    grey.save(tmp_path / "mask.png")
    forms = {
        "rle": encode_mask(mask),
        "numbers": {"size": [40, 48], "counts": runs.tolist()},
        "bytes": {"size": [40, 48], "counts": encode_mask(mask)["counts"].encode()},
        "array": mask,
        "lists": mask.tolist(),
        "file": str(tmp_path / "mask.png"),
        "palette": grey.convert("P"),
    }
    loaded = load_sample(sample(masks=[forms[form]]), **SIZES)
    assert np.array_equal(loaded.masks[0], mask)


def test_depth_in_all_its_forms(tmp_path):
    from PIL import Image

    depth = metres()
    depth[:4] = 0
    millimetres = np.round(depth * 1000).astype(np.uint16)
    Image.fromarray(millimetres).save(tmp_path / "d.png")
    np.save(tmp_path / "d.npy", depth)
    forms = [(depth, "m"), (depth.tolist(), "m"), ([depth], "m"), (npy(depth), "m"), (tmp_path / "d.npy", "m")]
    forms += [(str(tmp_path / "d.png"), "mm"), (Image.open(tmp_path / "d.png"), "mm"), (millimetres, "mm")]
    for form, unit in forms:
        loaded = load_sample(sample(SPAN + "Far.", depth=form, depth_unit=unit), **SIZES)
        assert loaded.messages[1]["content"][0]["text"] == depth_span([0] * 4) + "Far."
        assert not loaded.depths[0].valid[:4].any() and loaded.depths[0].valid[4:].all()
        assert loaded.depths[0].relative[4, 0] == pytest.approx(1) and loaded.depths[0].relative[39, 47] == 0


def test_validity_of_the_sample_joins_that_of_the_map():
    for valid in (~box(), encode_mask(~box()), (~box()).tolist()):
        for unit in ("m", "disparity", "relative"):
            depth = metres() / 4
            loaded = load_sample(sample(SPAN, depth=depth, depth_unit=unit, depth_valid=valid), **SIZES)
            assert np.array_equal(loaded.depths[0].valid, ~box())
            assert not loaded.depths[0].relative[box()].any()


def test_codes_given_or_written():
    for fields, said in (({"depth_codes": [1, 7, 0, 2]}, SPAN), ({}, depth_span([1, 7, 0, 2]))):
        loaded = load_sample(sample(said + "Far.", **fields), **SIZES)
        assert loaded.messages[1]["content"][0]["text"] == depth_span([1, 7, 0, 2]) + "Far."
        assert loaded.depths == [None]


def test_several_turns_and_pictures():
    """The k-th response speaks of the pictures last shown; each mask must have the size of its own."""
    small = picture(20, 10)
    show = {"type": "image"}
    messages = [
        {"role": "user", "content": [show, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "[SEG]" + SPAN + "There."},
        {"role": "user", "content": [show, {"type": "text", "text": "And here?"}]},
        {"role": "assistant", "content": SPAN + " [SEG]"},
    ]
    masks = [encode_mask(box()), encode_mask(np.ones((10, 20), bool))]
    both = {"images": [picture(), small], "messages": messages, "masks": masks, "depth_codes": [[1] * 4, [2] * 4]}
    loaded = load_sample(both, **SIZES)
    assert [mask.shape for mask in loaded.masks] == [(40, 48), (10, 20)]
    assert loaded.messages[3]["content"][0]["text"] == depth_span([2] * 4) + " [SEG]"
    with pytest.raises(SampleError, match="mask 0 is 20 x 10 pixels and its picture 48 x 40"):
        load_sample(both | {"masks": masks[::-1]}, **SIZES)


def two_pictures(said: str, **fields) -> dict:
    """One of 48 x 40 and one of 20 x 10 pixels, shown together."""
    asked = [{"type": "image"}, {"type": "text", "text": "Image-2: or"}, {"type": "image"}]
    return sample(said, asked=asked, images=[picture(), picture(20, 10)]) | fields


def test_marks_say_which_picture_is_meant():
    large, small = encode_mask(box()), encode_mask(np.ones((10, 20), bool))
    said = f"Image-2: [SEG]{SPAN} and Image-1: [SEG]{SPAN} The second."
    both = two_pictures(said, masks=[small, large], depth_codes=[[1] * 4, [2] * 4])
    loaded = load_sample(both, **SIZES)
    assert (loaded.mask_pictures, loaded.depth_pictures) == ([1, 0], [1, 0])
    assert [mask.shape for mask in loaded.masks] == [(10, 20), (40, 48)]
    words = loaded.messages[1]["content"][0]["text"]
    assert words == f"Image-2: [SEG]{depth_span([1] * 4)} and Image-1: [SEG]{depth_span([2] * 4)} The second."
    again = load_sample(both | {"mask_pictures": [1, 0], "depth_pictures": [1, 0]}, **SIZES)
    assert again.mask_pictures == [1, 0]
    in_order = load_sample(
        two_pictures(f"[SEG]{SPAN}[SEG]{SPAN}", masks=[large, small], depth_codes=[[1] * 4] * 2), **SIZES
    )
    assert (in_order.mask_pictures, in_order.depth_pictures) == ([0, 1], [0, 1])


def test_a_later_turn_may_speak_of_an_earlier_picture():
    messages = two_pictures("[SEG]")["messages"] + [
        {"role": "user", "content": "And Image-1: again?"},
        {"role": "assistant", "content": "Image-2: [SEG] is it."},
    ]
    masks = [encode_mask(box()), encode_mask(np.ones((10, 20), bool))]
    loaded = load_sample(two_pictures("[SEG]", messages=messages, masks=masks), **SIZES)
    assert loaded.mask_pictures == [0, 1]


def test_the_orientation_of_every_depth_map_is_checked():
    upright = dict(depth=[metres(), metres(10, 20)], depth_unit="m")
    load_sample(two_pictures(SPAN * 2, **upright), **SIZES)
    load_sample(
        two_pictures(f"Image-2: {SPAN} Image-1: {SPAN}", **upright | {"depth": upright["depth"][::-1]}), **SIZES
    )
    with pytest.raises(SampleError, match="its depth map is 10 x 20 and its picture, shown upright, 20 x 10"):
        load_sample(two_pictures(SPAN * 2, **upright | {"depth": [metres(), metres(20, 10)]}), **SIZES)


LARGE, SMALL = encode_mask(box()), encode_mask(np.ones((10, 20), bool))
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[SEG]"}]
BAD_PICTURES = [
    (two_pictures("[SEG]", masks=[SMALL]), "masks", r"speaks of Image-1 \(write `Image-k: \[SEG\]`"),
    (two_pictures("[SEG]", mask_pictures=[1]), "picture", r"mask 0 belongs to picture 1 .* write `Image-2: \[SEG\]`"),
    (two_pictures("[SEG][SEG]", mask_pictures=[0]), "picture", r"name 1 pictures, but its words hold 2 \[SEG\]"),
    (two_pictures("[SEG]", mask_pictures=["b.png"]), "picture", "expected whole numbers"),
    (
        two_pictures(SPAN, depth_codes=[1] * 4, depth_pictures=[1]),
        "picture",
        "depth 0 belongs to picture 1 .* write `Image-2: <DEPTH_START><DEPTH_END>`",
    ),
    (two_pictures("Image-3: [SEG]", masks=[SMALL]), "picture", "writes Image-3: where 2 pictures have been shown"),
    (two_pictures("Image-2: " + SPAN * 2, depth_codes=[[1] * 4] * 2), "depth", "two depth spans for Image-2"),
    (sample(SPAN, depth_codes=[1] * 4, images=None), "picture", "a depth span but no picture; give the picture"),
    (two_pictures("[SEG]", messages=TALK + two_pictures("Yes.")["messages"]), "picture", "show the picture in a turn"),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD_PICTURES)
def test_samples_that_speak_of_other_pictures(bad, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        check_sample(bad, **SIZES)
    assert error.value.reason == reason


def test_words_about_pictures_need_none():
    assert load_sample(sample("Image-7: is what I call it.", images=None), **SIZES).mask_pictures == []


BAD = [
    (sample(masks=[]), "masks", r"1 \[SEG\], but 0 masks"),
    (sample(masks=[encode_mask(box())] * 2), "masks", r"1 \[SEG\], but 2 masks"),
    (sample(masks=[encode_mask(box(48, 40))]), "masks", "mask 0 is 40 x 48 pixels and its picture 48 x 40"),
    (sample(masks=[{"size": [40, 48], "counts": [7]}]), "masks", "cover 7 pixels"),
    (sample(masks=[{"size": [10**6, 10**6], "counts": [10**12]}]), "masks", "mask 0 is 1000000 x 1000000 pixels"),
    (sample(masks=[{"size": [40, 48]}]), "masks", "cannot be read"),
    (sample(masks=["/none.png"]), "masks", "/none.png"),
    (sample(images=None), "picture", r"\[SEG\] but no picture"),
    (sample(images=["/none.jpg"]), "picture", "no picture /none.jpg"),
    (sample(images=[b"nothing"]), "picture", "7 bytes of picture"),
    (sample(SPAN, depth_codes=[1, 2, 3, 8]), "codes", "code 8; codes are whole numbers 0 to 7"),
    (sample(SPAN, depth_codes=[1, 2, 3, -1]), "codes", "code -1"),
    (sample(SPAN, depth_codes=[1, 2, 3, 1.5]), "codes", "code 1.5"),
    (sample(SPAN, depth_codes=[1, 2, 3]), "codes", "3 codes; this model's codec writes 4"),
    (sample(depth_span([1, 2, 9, 1])), "codes", "code 9"),
    (sample(SPAN, depth=np.zeros((4, 4)), depth_unit="mm"), "depth", "no pixel holds a valid depth"),
    (sample(SPAN, depth=metres(), depth_unit="m", depth_valid=np.zeros((40, 48))), "depth", "no pixel"),
    (sample(SPAN, depth=metres(), depth_unit="m", depth_valid=np.ones((4, 4))), "depth", "validity mask is"),
    (sample(SPAN, depth=metres(48, 40), depth_unit="m"), "depth", "turn the depth map as well"),
    (sample(SPAN, depth=metres()), "depth", "no `depth_unit`"),
    (sample(SPAN, depth=metres(), depth_unit="feet"), "depth", "Unknown depth unit 'feet'"),
    (sample(SPAN, depth="/none.png", depth_unit="mm"), "depth", "no depth map /none.png"),
    (sample(SPAN, depth=b"\x93NUMPY\x01", depth_unit="mm"), "depth", "7 bytes"),
    (sample(SPAN), "depth", "1 empty depth spans .* depth for 0"),
    (sample(depth_codes=[1] * 4), "depth", "0 empty depth spans .* depth for 1"),
    (sample(SPAN, depth_codes=[1] * 4, depth=metres(), depth_unit="m"), "depth", "both"),
    (sample(SPAN + "and" + SPAN, depth_codes=[[1] * 4] * 2), "depth", "one response holds two depth spans for Image-1"),
    (sample("<DEPTH_START> <DEPTH_1>"), "depth", "<DEPTH_START> stands outside"),
    (sample("<DEPTH_1>"), "depth", "<DEPTH_1> stands outside"),
    (sample(" "), "conversation", "no words"),
    ({"images": [picture()], "messages": [{"role": "user", "content": "?"}]}, "conversation", "no turn of the assist"),
    ({"images": [picture()]}, "conversation", "expected a list of turns"),
    ({"messages": ["Hi"]}, "conversation", "a message is"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "conversation", "text or an image"),
    (
        {"images": [picture()], "messages": [{"role": "assistant", "content": "Hi."}]},
        "conversation",
        "no turn of the u",
    ),
    (
        sample(asked=[{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]),
        "picture",
        "show 2 pictures .parts, or <image>., but 1 are given",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "conversation",
        "pictures belong to the user",
    ),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD)
def test_bad_samples(bad, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        check_sample(bad | {"id": "the-bad-one"}, **SIZES)
    assert error.value.reason == reason
    assert str(error.value).startswith("Sample 'the-bad-one': ")


def test_a_sample_without_id_is_named_by_place_file_and_words():
    with pytest.raises(SampleError, match=r"Sample number 3 of its batch \(/none.jpg, 'Where\?'\)"):
        load_sample(sample(images=["/none.jpg"]), position=3, **SIZES)
    with pytest.raises(SampleError, match="number 2"):
        load_sample("not a dict", position=2, **SIZES)
