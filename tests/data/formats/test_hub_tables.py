"""Data sets of the Hub on disk, as .parquet files and as `save_to_disk` writes them: RefCOCO's and BLINK's."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from evaluation.published_formats import (
    scenes_of,
    write_blink_depth,
    write_hub_refcoco,
    write_parquet,
)

from perceptio_hf.data.formats.hub_tables import open_table
from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.benchmarks import open_benchmark

datasets = pytest.importorskip("datasets")
coco = pytest.importorskip("pycocotools.mask")
datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(3))


def saved(rows: list[dict], folder, split: str | None = None) -> None:
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (datasets.DatasetDict({split: dataset}) if split else dataset).save_to_disk(folder)


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco(tmp_path, scenes, name):
    rows = write_hub_refcoco(tmp_path, scenes)
    read = open_benchmark(name, tmp_path)
    expected = [(row, text) for row in rows for text in row["answer"]]
    assert len(read.samples) == len(expected)
    pictures = {(scene.image.tobytes()) for scene in scenes}
    for sample, (row, text) in zip(read.samples, expected, strict=True):
        assert sample.question == f"Please segment {text} in this image."
        (mask,) = sample.target["masks"]
        assert (decode_mask(mask) == coco.decode(coco.frPyObjects([row["segmentation"]], 64, 64))[:, :, 0]).all()
    assert {sample.picture.open().tobytes() for sample in read.samples} == pictures
    json.dumps([sample.target for sample in read.samples])


def test_threads_read_it_together(tmp_path):
    """As an evaluation does on a machine with four processors or more; pyarrow's own files end the process then."""
    rows = [{"image": {"bytes": bytes([number % 251]) * 4000, "path": None}} for number in range(300)]
    write_parquet(tmp_path, rows, "val")
    table = open_table(tmp_path, "val")
    order = np.random.default_rng(0).integers(0, len(rows), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for row, cell in zip(order, pool.map(lambda row: table.cell(row, "image"), order), strict=True):
            assert cell["bytes"] == rows[row]["image"]["bytes"]


def test_all_ways_of_keeping_it_give_the_same(tmp_path, scenes):
    rows = write_hub_refcoco(tmp_path / "parquet", scenes)
    write_parquet(tmp_path / "converted" / "default" / "val", rows, "0000")
    saved(rows, tmp_path / "saved")
    saved(rows, tmp_path / "divided", "validation")
    first = open_benchmark("refcoco", tmp_path / "parquet")
    (file,) = (tmp_path / "converted" / "default" / "val").iterdir()
    for path in (tmp_path / "converted", file, tmp_path / "saved", tmp_path / "divided"):
        other = open_benchmark("refcoco", path)
        assert [(s.id, s.target, s.question) for s in other.samples] == [
            (s.id, s.target, s.question) for s in first.samples
        ]
        images = [np.asarray(read.samples[-1].picture.open()) for read in (first, other)]
        assert (images[0] == images[1]).all()


def test_rows_over_files_and_groups(tmp_path):
    rows = [{"number": number, "text": "x" * number} for number in range(23)]
    write_parquet(tmp_path, rows, "val", shards=4)
    write_parquet(tmp_path, rows[:2], "validity", shards=1)  # another split whose name starts the same
    table = open_table(tmp_path, "val")
    assert len(table) == 23 and list(table.rows(("number", "text"))) == rows
    assert [table.cell(row, "number") for row in (22, 0, 11)] == [22, 0, 11]
    places = [table.place(row) for row in range(23)]
    assert places[0].startswith("val-00000-of-00004.parquet (") and places[7].endswith("row 1")
    assert len(set(places)) == 23


def test_single_faults(tmp_path, scenes):
    rows = write_hub_refcoco(tmp_path / "whole", scenes)
    faults = [
        ({"segmentation": [1.0, 2.0]}, "neither polygons nor run lengths"),
        ({"iscrowd": 1}, "it is a crowd"),
        ({"answer": []}, "it has no expression"),
        ({"image": {"bytes": None, "path": "gone.jpg"}}, "holds no bytes of a picture"),
        ({"image": {"bytes": b"broken", "path": None}}, "cannot be read"),
    ]
    for number, (change, message) in enumerate(faults):
        folder = tmp_path / str(number)
        write_parquet(folder, [*rows[:4], rows[4] | change, *rows[5:]], "val")
        with pytest.raises(ValueError, match=rf"val-00000-of-00001\.parquet \(\d+ bytes\), row 4.*{message}"):
            open_benchmark("refcoco", folder)
        rest = open_benchmark("refcoco", folder, on_error="skip")
        assert len(rest.samples) == 2 * len(rows) - 2 and len(rest.notes) == 1


def test_missing_columns_splits_and_files(tmp_path, scenes):
    rows = write_hub_refcoco(tmp_path / "whole", scenes)
    with pytest.raises(ValueError, match=r"no \.parquet files of the split 'testA'.* it has val-00000"):
        open_benchmark("refcoco", tmp_path / "whole", split="testA")
    write_parquet(tmp_path / "narrow", [{"image": row["image"], "answer": row["answer"]} for row in rows], "val")
    with pytest.raises(ValueError, match="has the columns image, answer; segmentation is missing"):
        open_benchmark("refcoco", tmp_path / "narrow")
    saved(rows, tmp_path / "divided", "val")
    with pytest.raises(ValueError, match="has no split 'testB'; it has val"):
        open_benchmark("refcoco", tmp_path / "divided", split="testB")
    datasets.Dataset.from_list(rows, split="validation").cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "part"
    )
    assert open_benchmark("refcoco", tmp_path / "part", split="val").samples
    with pytest.raises(ValueError, match="has no split 'testB'; it has validation"):
        open_benchmark("refcoco", tmp_path / "part", split="testB")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "val-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"val-0\.parquet: not a \.parquet file that can be read"):
        open_benchmark("refcoco", tmp_path / "broken")


def test_an_empty_table(tmp_path):
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("image", "answer", "segmentation")])
    parquet.write_table(schema.empty_table(), tmp_path / "val-0.parquet")
    with pytest.raises(ValueError, match="the split 'val' is empty"):
        open_benchmark("refcoco", tmp_path)


def test_blink(tmp_path, scenes):
    rows = write_blink_depth(tmp_path, scenes)
    for path in (tmp_path, tmp_path / "Relative_Depth"):
        read = open_benchmark("blink-depth", path)
        assert [sample.id for sample in read.samples] == [row["idx"] for row in rows]
        assert [sample.question for sample in read.samples] == [row["prompt"] for row in rows]
        assert [f"({sample.target['answer']})" for sample in read.samples] == [row["answer"] for row in rows]
        assert read.samples[0].target["points"] == 2 and read.samples[0].target["choices"] == ["A", "B"]
        assert read.samples[0].picture.open().size == (64, 64)


def test_blink_s_faults(tmp_path, scenes):
    rows = write_blink_depth(tmp_path / "whole", scenes)
    hidden = [row | {"answer": "(hidden)"} for row in rows]
    write_parquet(tmp_path / "hidden" / "Relative_Depth", hidden, "test")
    with pytest.raises(ValueError, match="its answer is hidden"):
        open_benchmark("blink-depth", tmp_path / "hidden", split="test")
    write_parquet(tmp_path / "beyond", [rows[0], rows[1] | {"answer": "(C)"}], "val")
    with pytest.raises(ValueError, match=r"row 1 \(val_Relative_Depth_2\): '\(C\)' is no right answer among 2 choices"):
        open_benchmark("blink-depth", tmp_path / "beyond")
    write_parquet(tmp_path / "twice", [rows[0], rows[0]], "val")
    with pytest.raises(ValueError, match="val_Relative_Depth_1: this id occurs twice"):
        open_benchmark("blink-depth", tmp_path / "twice")
