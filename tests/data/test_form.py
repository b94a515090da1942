"""The form of a sample: unknown keys, LLaVA's files, places of pictures; and whatever else may be written there."""

import base64
import contextlib
import json
import re

import datasets
import numpy as np
import pytest
from helpers import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from perceptio_hf.data.form import SAMPLE_KEYS, split_at_pictures
from perceptio_hf.data.rows import as_rows, dataset_of, sample_features, to_row
from perceptio_hf.data.samples import SampleError, load_sample
from perceptio_hf.data.sources import load_llava, load_samples, write_samples
from perceptio_hf.data.tasks import load_tasks

datasets.disable_progress_bars()
SIZES = {"num_depth_tokens": 4, "num_depth_codes": 8}
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
CHAT_OF_WORDS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
TALK = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "There."}]


@pytest.fixture
def folder(tmp_path):
    picture().save(tmp_path / "a.png")
    picture(seed=1).save(tmp_path / "b.png")
    return tmp_path


def written(folder, *lines, name="samples.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    return folder / name


def shown(sample) -> list:
    """Texts, and None for a picture, in reading order."""
    parts = [part for message in load_sample(sample, **SIZES).messages for part in message["content"]]
    return [part.get("text") for part in parts]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("image", "did you mean `images`"),
        ("imgs", "did you mean `images`"),
        ("Images", "did you mean `images`"),
        ("mask", "did you mean `masks`"),
        ("depht", "did you mean `depth`"),
        ("depth_units", "did you mean `depth_unit`"),
        ("licence", "a sample has images, messages"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_likely_one(folder, key, hint):
    sample = {"messages": CHAT, key: "a.png"}
    with pytest.raises(SampleError, match=f"unknown key '{key}'; {hint}"):
        load_sample(sample, **SIZES)
    path = written(folder, {"messages": CHAT}, sample)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"samples\.jsonl, line 2.*unknown key '{key}'; {hint}"):
            list(load_samples(path, streaming=streaming))
    with pytest.raises(ValueError, match=f"unknown key '{key}'; {hint}"):
        dataset_of([sample])
    table = datasets.Dataset.from_list([sample])
    for dataset in (table, table.to_iterable_dataset()):
        right = hint.rpartition("mean `")[2].rstrip("`")
        advice = f"rename_column('{key}', '{right}')" if "did you" in hint else f"remove_columns(['{key}'])"
        with pytest.raises(ValueError) as error:
            as_rows(dataset)
        assert advice in str(error.value)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "Hi", "weight": 0}, "unknown key 'weight'"),
        ({"from": "human", "value": "Hi"}, "keys of LLaVA's form; name the list of turns `conversations`"),
        ({"role": "user", "content": None}, "a message is"),
        ({"role": "user", "content": 5}, "a message is"),
        ({"role": 3, "content": "Hi"}, "a message is"),
        ({"role": "user", "content": [{"type": "image", "img": "a.png"}]}, "a text or an image"),
        ({"role": "user", "content": [{"type": "text", "text": "Hi", "image": "a.png"}]}, "a text or an image"),
        ({"role": "user", "content": [{"type": "image", "image": "a.png", "url": "b.png"}]}, "a text or an image"),
        ({"role": "user", "content": ["Hi"]}, "a text or an image"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a text or an image"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "low"}}]}, "a text or an image"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]},
            "download it",
        ),
        ({"role": "user", "content": [{"type": "image", "url": "HTTP://a.b/c.png"}]}, "download it"),
    ],
)
def test_messages_of_another_form(folder, message, words):
    sample = {"messages": [message, *CHAT], "id": "bad"}
    with pytest.raises(SampleError, match=words):
        load_sample(sample, **SIZES)
    with pytest.raises(ValueError, match=f"'bad'.*{words}"):
        to_row(sample)
    with pytest.raises(ValueError, match=rf"line 1: .*{words}"):
        load_samples(written(folder, sample))


def test_the_place_of_a_picture_in_a_text(folder):
    images = [str(folder / "a.png"), str(folder / "b.png")]

    def asked(content, images=images):
        return shown({"images": images, "messages": [{"role": "user", "content": content}, CHAT[1]]})[:-1]

    assert asked("Left <image>\nand right <image>: alike?") == ["Left ", None, "and right ", None, ": alike?"]
    assert asked([{"type": "text", "text": "<image>"}, {"type": "image"}, {"type": "text", "text": "?"}]) == [
        None,
        None,
        "?",
    ]
    assert asked("What?\n<image>", images[:1]) == ["What?\n", None]
    assert asked("Where?") == [None, None, "Where?"]
    for content, count in (("<image><image><image> What?", 1), ("<image> What?", 2), ("Is <image> a tag?", 0)):
        places = content.count("<image>")
        with pytest.raises(SampleError, match=rf"show {places} pictures .*, but {count} are given"):
            asked(content, images[:count])
    with pytest.raises(SampleError, match="assistant's turn holds a picture"):
        load_sample({"images": images[:1], "messages": [CHAT[0], {"role": "assistant", "content": "<image>"}]}, **SIZES)


@given(st.lists(st.sampled_from(["<image>", "<image", "\n", "a", "<imag", "e>", " "])).map("".join))
def test_no_word_is_lost_where_a_text_is_split(text):
    parts = split_at_pictures(text)
    again = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
    assert again == text.replace("<image>\n", "<image>")


@pytest.mark.parametrize("form", ["array", "pretty", "lines"])
def test_llava_files(folder, form):
    samples = [
        {"id": 7, "image": "a.png", "conversations": TALK, "width": 48, "source": "coco"},
        {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image> <image>?"}, TALK[1]]},
        {"id": "words", "conversations": [{"from": "system", "value": "Be brief."}, *CHAT_OF_WORDS]},
    ]
    text = {
        "array": json.dumps(samples),
        "pretty": "\ufeff" + json.dumps(samples, indent=2) + "\n",
        "lines": "\n".join(map(json.dumps, samples)),
    }[form]
    file = folder / ("llava.jsonl" if form == "lines" else "llava.json")
    file.write_text(text, encoding="utf-8")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    file_elsewhere = elsewhere / file.name
    file_elsewhere.write_text(text, encoding="utf-8")
    task = {"llava": f"elsewhere/{file.name}", "images": ".", "name": "talk"}
    for dataset in (
        load_samples(file),
        load_samples(file, streaming=True),
        load_llava(file),
        load_llava(file_elsewhere, images=folder, streaming=True),
        load_tasks([task], str(folder))[0]["talk"],
    ):
        rows = list(dataset)
        assert dataset.features == sample_features() and len(rows) == 3
        assert shown(rows[0]) == [None, "Where?", "There."]
        assert shown(rows[1]) == [None, " ", None, "?", "There."]
        assert shown(rows[2]) == ["Be brief.", "Why?", "So."]
        assert [row["id"] for row in rows][::2] == ["7", "words"]
        assert rows[1]["id"].endswith("line 2" if form == "lines" else "item 2")
        assert np.array_equal(np.asarray(load_sample(rows[0], **SIZES).pictures[0]), np.asarray(picture()))


def test_llava_in_a_data_set(folder):
    rows = [{"id": "1", "image": str(folder / "a.png"), "conversations": TALK, "note": "x"}] * 2
    table = datasets.Dataset.from_list(rows)
    decoding = table.cast_column("image", datasets.Image())
    for dataset in (table, table.to_iterable_dataset(), decoding, decoding.to_iterable_dataset()):
        read = as_rows(dataset)
        assert read.features == sample_features()
        assert shown(next(iter(read))) == [None, "Where?", "There."]
    assert shown(rows[0]) == [None, "Where?", "There."]


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"image": "a.png", "images": ["a.png"], "conversations": TALK}, "both `image` and `images`"),
        ({"imgs": ["a.png"], "conversations": CHAT_OF_WORDS}, "unknown key 'imgs'; did you mean `images`"),
        ({"video": "a.mp4", "conversations": CHAT_OF_WORDS}, "unknown key 'video'"),
        ({"conversations": [{"from": "narrator", "value": "Hi"}]}, "a turn of `conversations` is"),
        ({"conversations": [{"from": "human"}]}, "a turn of `conversations` is"),
        ({"conversations": ["Hi"]}, "a turn of `conversations` is"),
    ],
)
def test_llava_files_that_are_none(folder, sample, words):
    (folder / "x.json").write_text(json.dumps([{"conversations": CHAT_OF_WORDS}, sample]))
    with pytest.raises(ValueError, match=rf"x\.json, item 2.*{words}"):
        load_samples(folder / "x.json")
    with pytest.raises(SampleError, match=words):
        load_sample(sample, **SIZES)


def test_a_llava_source_that_is_not_there(folder):
    file = written(folder, {"conversations": CHAT_OF_WORDS}, name="x.jsonl")
    for task, words in (({"llava": "none.json"}, "no file"), ({"llava": str(file), "images": "none"}, "no folder")):
        with pytest.raises(ValueError, match=words):
            load_tasks([task], str(folder))


def test_pictures_named_in_parts_lie_beside_the_file(folder, monkeypatch):
    data = base64.b64encode((folder / "b.png").read_bytes()).decode()
    sources = [{"image": "a.png"}, {"path": "a.png"}, {"url": "a.png"}, {"image": {"path": "a.png"}}]
    sources += [{"url": f"data:image/png;base64,{data}"}, {"base64": data}, {"url": (folder / "b.png").as_uri()}]
    openai = [{"url": "a.png"}, {"url": f"data:image/png;base64,{data}", "detail": "low"}, (folder / "b.png").as_uri()]
    sources += [{"type": "image_url", "image_url": url} for url in openai]
    lines = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "?"}]},
                CHAT[1],
            ]
        }
        for source in sources
    ]
    lines += [{"images": [source], "messages": CHAT} for source in ("a.png", {"path": "a.png"})]
    lines += [{"images": [f"data:image/png;base64,{data}"], "messages": CHAT}]
    file = written(folder, *lines)
    monkeypatch.chdir(folder.parent)
    again = write_samples(folder / "again", load_samples(file))
    for dataset in (load_samples(file), load_samples(file, streaming=True), load_samples(again)):
        seeds = [0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1]
        for seed, row in zip(seeds, dataset, strict=True):
            (read,) = load_sample(row, **SIZES).pictures
            assert np.array_equal(np.asarray(read), np.asarray(picture(seed=seed)))
    both = {"images": ["a.png"], **lines[0]}
    with pytest.raises(ValueError, match="both in `images` and in `messages`"):
        load_samples(written(folder, both))


def test_pictures_that_lie_elsewhere_are_not_fetched_again_and_again():
    for source in ("https://a.b/c.png", {"path": "http://a.b/c.png", "bytes": None}):
        with pytest.raises(SampleError, match=r"a\.b/c\.png lies elsewhere; download it") as refused:
            load_sample({"images": [source], "messages": CHAT}, **SIZES)
        assert refused.value.reason == "picture"


def test_masks_and_depth_as_data_urls(folder):
    mask, depth = np.zeros((40, 48), np.uint8), np.arange(1920, dtype=np.uint16).reshape(40, 48)
    mask[5:9] = 1
    Image.fromarray(mask).save(folder / "m.png")
    Image.fromarray(depth).save(folder / "d.png")
    urls = {
        name: "data:;base64," + base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in ("m", "d")
    }
    said = [CHAT[0], {"role": "assistant", "content": "[SEG]<DEPTH_START><DEPTH_END>"}]
    sample = {"images": ["a.png"], "messages": said, "masks": [urls["m"]], "depth": urls["d"], "depth_unit": "mm"}
    row = load_samples(written(folder, sample))[0]
    for form in (row, sample | {"images": [picture()]}):
        loaded = load_sample(form, **SIZES)
        assert np.array_equal(loaded.masks[0], mask > 0) and np.array_equal(loaded.depths[0].valid, depth > 0)
    with pytest.raises(SampleError, match="no data: URL"):
        load_sample(sample | {"images": ["data:image/png;base64,%%%"]}, **SIZES)


def test_polygons_in_a_file(folder):
    square = [[10, 5, 30, 5, 30, 20, 10, 20]]
    said = [CHAT[0], {"role": "assistant", "content": "[SEG]"}]
    lines = [{"images": ["a.png"], "messages": said, "masks": masks} for masks in ([square], square, [square[0]])]
    file = written(folder, *lines)
    read = load_samples(write_samples(folder / "again", load_samples(file)))
    for row in (*load_samples(file), *load_samples(file, streaming=True), *read):
        (mask,) = load_sample(row, **SIZES).masks
        assert mask[5:20, 10:30].all() and mask.sum() == 300
    with pytest.raises(SampleError, match=r"2 \[SEG\], but 1 masks"):  # or are these two polygons of one mask?
        said = [CHAT[0], {"role": "assistant", "content": "[SEG][SEG]"}]
        load_sample({"images": [picture()], "messages": said, "masks": square * 2}, **SIZES)


WORDS = ["type", "text", "image", "role", "content", "size", "counts", "bytes", "path", "polygons", "from", "value"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
GOOD = {
    "images": [picture()],
    "messages": [CHAT[0], {"role": "assistant", "content": "[SEG]<DEPTH_START><DEPTH_END>"}],
    "masks": [np.ones((40, 48))],
    "depth": np.arange(1920.0).reshape(40, 48),
    "depth_unit": "m",
}


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*SAMPLE_KEYS, "conversations"]), st.one_of(JSON, st.lists(JSON, min_size=1, max_size=2)))
def test_whatever_a_key_holds_the_error_is_one_of_that_sample(key, value):
    sample = GOOD | {key: value}
    if key in ("depth_valid", "depth_codes"):
        sample.pop("depth", None) if key == "depth_codes" else None
    if key == "conversations":
        sample.pop("messages")
    with contextlib.suppress(SampleError):
        load_sample(sample, **SIZES)
    try:
        dataset_of([sample])
    except ValueError as error:
        assert "does not have the form of a sample" in str(error)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from([*SAMPLE_KEYS, "conversations"]), st.one_of(JSON, st.lists(JSON, min_size=1, max_size=2)))
def test_whatever_a_line_holds_the_error_names_it(tmp_path, key, value):
    sample = {"messages": CHAT, key: value}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample, default=lambda data: data.decode("latin-1")))
    with contextlib.suppress(SampleError):
        try:
            row = load_samples(tmp_path)[0]
        except ValueError as error:
            assert re.search(r"samples\.jsonl, line 1(: | has |')", str(error)) or "id" in key
        else:
            load_sample(row, **SIZES)
