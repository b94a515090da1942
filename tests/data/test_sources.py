"""Folders, data sets on disk and the rendered world as samples."""

import json
import re
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image

from perceptio_hf.data.encoded import open_encoded
from perceptio_hf.data.rows import as_rows, dataset_of, sample_features, to_row
from perceptio_hf.data.sources import depth_folder, load_samples, write_samples
from perceptio_hf.data.world_samples import WORLD_TASKS, iter_world_samples, world_dataset
from perceptio_hf.extras import how_to_install
from perceptio_hf.processing.pictures import load_picture
from perceptio_hf.training.collator import PerceptioDataCollator
from perceptio_hf.world import HELD_OUT_SEED

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def collator(processor):
    return PerceptioDataCollator(processor, depth_image_size=32)


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    return [sample for task in WORLD_TASKS for sample in iter_world_samples(task, range(2), size=64)]


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "world", samples)


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key == "layout":  # read off the labels
            assert ours[key].items == theirs[key].items
        else:
            assert torch.equal(ours[key], theirs[key]), key


def test_a_written_folder_reads_back(samples, folder, collator):
    expected = collator(samples)
    table = load_samples(folder)
    assert isinstance(table, datasets.Dataset) and table["id"][:] == [sample["id"] for sample in samples]
    stream = load_samples(folder, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    for read in (table, stream, load_samples(folder / "samples.jsonl")):
        assert_same(collator(list(read)), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["files", "samples.jsonl"]
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert first["images"] == ["files/000000-images-0.png"] and first["masks"][0].keys() == {"size", "counts"}


def test_a_folder_moves_and_is_rewritten(samples, folder, collator, tmp_path):
    again = write_samples(tmp_path / "again", load_samples(folder))
    (again / "files").rename(tmp_path / "files")
    with pytest.raises(ValueError, match=r"000000-images-0\.png"):
        collator([load_samples(again)[0]])
    (tmp_path / "files").rename(again / "files")
    moved = again.rename(tmp_path / "moved")
    assert_same(collator(list(load_samples(moved))), collator(samples))


def test_a_data_set_on_disk(samples, collator, tmp_path):
    dataset_of(samples).save_to_disk(str(tmp_path / "disk"))
    expected = collator(samples)
    assert_same(collator(list(load_samples(tmp_path / "disk"))), expected)
    assert_same(collator(list(load_samples(tmp_path / "disk", streaming=True))), expected)


def test_embedded_pictures_stay_encoded(collator, tmp_path):
    """A data set with an Image column is neither decoded nor broken by one bad picture."""
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = {"images": [[str(tmp_path / "a.png")], [str(tmp_path / "b.png")]], "messages": [chat, chat]}
    decoding = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    for dataset in (decoding, decoding.to_iterable_dataset()):
        converted = as_rows(dataset)
        assert converted.features == sample_features()
        good, bad = list(converted)
        assert good["images"][0]["path"].endswith("a.png")
        assert collator([good])["pixel_values"].shape[0] == 1
        with pytest.raises(ValueError, match=r"b\.png is damaged"):
            collator([bad])
    turned = Image.effect_noise((30, 20), 60).convert("CMYK")
    turned.getexif()[0x0112] = 6
    for deep in (
        Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)),
        Image.fromarray((np.arange(600) * 109).astype(">u2").reshape(20, 30)),
        turned,
    ):
        given = load_picture(deep)
        kept = load_picture(open_encoded(to_row({"images": [deep], "messages": chat})["images"][0]))
        assert (np.asarray(kept) == np.asarray(given)).all() and np.asarray(kept).std() > 30
    unnamed = datasets.Dataset.from_list([{"images": [picture()], "messages": chat}])
    assert collator([as_rows(unnamed)[0]])["pixel_values"].shape[0] == 1


def test_depth_pairs(collator, tmp_path):
    for number in range(3):
        picture(seed=number).save(tmp_path / f"f{number}.jpg")
        depth = np.full((40, 48), 1000 * (number + 1), np.uint16)
        depth[20:] = 4000
        depth[:, :12] = 0  # holes
        Image.fromarray(depth).save(tmp_path / f"f{number}.png")
    dataset = depth_folder(tmp_path, unit="mm", pictures="*.jpg", depths="*.png", questions=["How far?"])
    assert dataset["id"][:] == ["f0", "f1", "f2"] and set(dataset["task"]) == {"depth"}
    batch = collator(list(dataset))
    assert batch["depth_targets"].shape == (3, 32, 32) and not batch["depth_valid"][:, :, :7].any()
    assert batch["depth_targets"][:, 2, 20].tolist() == [1, 1, 1] and batch["depth_targets"][0, 30, 20] == 0
    picture().save(tmp_path / "alone.jpg")
    with pytest.raises(ValueError, match=r"has 4 pictures \*\.jpg and 3 depth maps \*\.png.*partner: alone"):
        depth_folder(tmp_path, unit="mm", pictures="*.jpg", depths="*.png")
    with pytest.raises(ValueError, match="has 0 pictures"):
        depth_folder(tmp_path, unit="mm", pictures="*.jpeg", depths="*.tif")
    for folder, name in (("rgb", "*.jpg"), ("depth", "*.png"), ("a/rgb", "f1.jpg"), ("a/depth", "f1.png")):
        (tmp_path / folder).mkdir(parents=True)
        for file in tmp_path.glob(name):
            if file.stem != "alone":
                (tmp_path / folder / file.name).symlink_to(file)
    apart = depth_folder(tmp_path, unit="mm", pictures="rgb/*.jpg", depths="depth/*.png")
    assert apart["id"][:] == ["f0", "f1", "f2"]
    deep = depth_folder(tmp_path, unit="mm", pictures="**/rgb/*.jpg", depths="**/depth/*.png")
    assert deep["id"][:] == ["a/f1", "f0", "f1", "f2"]
    with pytest.raises(ValueError, match="is an absolute path"):
        depth_folder(tmp_path, unit="mm", pictures=str(tmp_path / "rgb" / "*.jpg"), depths="depth/*.png")
    with pytest.raises(ValueError, match="must hold one"):
        depth_folder(tmp_path, unit="mm", pictures="picture.jpg", depths="*.png")
    with pytest.raises(ValueError, match="Unknown depth unit 'cm'"):
        depth_folder(tmp_path, unit="cm")


def test_real_depth(collator, shared):
    dataset = depth_folder(shared / "rgbd", unit="mm")
    assert len(dataset) == 50
    batch = collator([dataset[0], dataset[49]])
    assert 0.5 < batch["depth_valid"].float().mean() < 1
    assert batch["depth_targets"].max() > 0.9


def test_files_that_are_no_samples(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"messages": []}\nnothing\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2 is not JSON"):
        load_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"image": "a.png", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 1 has \['image', 'text'\]; a sample is"):
        load_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"messages": ["Hi"]}\n')
    with pytest.raises(ValueError, match="line 1' does not have the form of a sample"):
        load_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text("\n")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"samples\.jsonl is empty"):
            load_samples(tmp_path, streaming=streaming)
    with pytest.raises(ValueError, match="holds no samples"):
        load_samples(tmp_path / "none")


def test_a_folder_is_written_whole_or_not_at_all(samples, folder, tmp_path):
    def failing():
        yield samples[0]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_samples(tmp_path / "half", failing())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="exists already"):
        write_samples(folder, samples)
    with pytest.raises(ValueError, match=r"/none\.png cannot be read"):
        write_samples(tmp_path / "bad", [samples[0] | {"images": ["/none.png"]}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_the_world(task, collator):
    stream = world_dataset(task, scenes=6, first_seed=HELD_OUT_SEED, size=64)
    rows = list(stream)
    assert stream.num_shards == 6 and {row["task"] for row in rows} == {task}
    assert_same(
        collator(rows), collator(list(iter_world_samples(task, range(HELD_OUT_SEED, HELD_OUT_SEED + 6), size=64)))
    )
    said = [row["messages"][1]["content"][0]["text"] for row in rows]
    spans = sum("<DEPTH_START><DEPTH_END>" in text for text in said)
    assert spans == (len(rows) if task in ("depth", "spatial") else 0)
    assert any("[SEG]" in text for text in said) == (task in ("refer", "spatial"))
    bare = list(world_dataset(task, scenes=6, first_seed=HELD_OUT_SEED, size=64, masks=False, depth=False))
    assert [row["messages"][0] for row in bare] == [row["messages"][0] for row in rows]
    assert not any("[SEG]" in str(row["messages"]) or "DEPTH" in str(row["messages"]) for row in bare)


def test_answers_that_name_cells():
    samples = list(iter_world_samples("spatial", range(12), cells=8))
    said = [sample["messages"][1]["content"] for sample in samples if "p" in sample["messages"][1]["content"]]
    walks = [re.fullmatch(r"<DEPTH_START><DEPTH_END>((?:[A-E] p\d\d ?)+): ([A-E])", words) for words in said]
    assert sum(map(bool, walks)) >= 3
    assert all(walk[2] in walk[1] for walk in walks if walk)


def test_the_world_refuses():
    with pytest.raises(ValueError, match="Unknown task 'segment'; the world has refer, depth, spatial, plain"):
        world_dataset("segment", scenes=1)
    with pytest.raises(ValueError, match="scenes is 0"):
        world_dataset("refer", scenes=0)


def test_without_datasets_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(how_to_install("train"))):
        load_samples(tmp_path)


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    assert "[SEG][SEG]<DEPTH_START><DEPTH_0>" in capsys.readouterr().out
    assert {item["task"] for item in islice(names["train"], 40)} == {"mine", "refer", "plain"}
    lines = "".join(re.findall(r"```json\n(.*?)```", guide, re.DOTALL)).splitlines()
    for name in ("kitchen.mug.png", "right.mug.png"):
        Image.fromarray(np.ones((40, 48), np.uint8)).save(tmp_path / name)
    Image.fromarray(np.arange(1, 1921, dtype=np.uint16).reshape(40, 48)).save(tmp_path / "kitchen.depth.png")
    for name in ("kitchen.jpg", "left.jpg", "right.jpg"):
        picture().save(tmp_path / name)
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    assert len(names["collator"](list(load_samples(tmp_path)))["labels"]) == len(lines) == 3
