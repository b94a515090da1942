"""Large files of samples: parts for several readers, Arrow on disk, memory that stays flat."""

import codecs
import json
import os
import tracemalloc
from itertools import islice

import datasets
import pyarrow as pa
import pytest
from datasets.distributed import split_dataset_by_node
from helpers import picture
from torch.utils.data import DataLoader

from perceptio_hf.data import lines, sources
from perceptio_hf.data.samples import SampleError, load_sample
from perceptio_hf.data.sources import load_samples

datasets.disable_progress_bars()


def line(number: int) -> str:
    words = "word " * (number % 7)
    chat = [{"role": "user", "content": f"Hi {number} {words}ü"}, {"role": "assistant", "content": "Hello."}]
    mask = {"size": [480, 640], "counts": "Qn?9" * 10}
    return json.dumps({"images": [f"{number}.png"], "messages": chat, "masks": [mask]}, ensure_ascii=False)


def text_of(count: int, first: int = 0) -> str:
    return "".join(line(number) + "\n" * (1 + number % 3) for number in range(first, first + count))


def ids(samples) -> list[str]:
    return [sample["id"] for sample in samples]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every file is large."""
    monkeypatch.setattr(lines, "MOST_IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "perceptio_hf"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\n\n"])
def test_every_line_is_in_one_shard(tmp_path, ending, start):
    file = tmp_path / "samples.jsonl"
    file.write_bytes((start + text_of(50)).replace("\n", ending).encode("utf-8"))
    whole = load_samples(file)
    assert len(whole) == 50 and whole[0]["id"] == f"{file}, line {1 + start.count(chr(10))}"
    for most in (1, 2, 7, 64, 1000):
        shards = lines.shards_of(file, tmp_path, most)
        assert len(shards) <= most and shards[-1][3] == file.stat().st_size
        assert list(lines.rows_of_shards(shards)) == list(whole)
        assert [row for shard in shards for row in lines.rows_of_shards([shard])] == list(whole)


def test_a_picture_whose_name_only_begins_like_a_home_folder(tmp_path):
    (tmp_path / "samples.jsonl").write_text(line(0).replace("0.png", "~0.png"))
    assert load_samples(tmp_path)[0]["images"][0]["path"] == str(tmp_path / "~0.png")


def test_a_stream_is_shared_by_processes_and_workers(tmp_path):
    (tmp_path / "samples.jsonl").write_text(text_of(200))
    whole, stream = load_samples(tmp_path), load_samples(tmp_path, streaming=True)
    assert ids(stream) == whole["id"][:] and stream.num_shards > 32
    parts = [ids(split_dataset_by_node(stream, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole["id"][:]) and min(map(len, parts)) > 50
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=ids)
    assert sorted(name for batch in loader for name in batch) == sorted(whole["id"][:])
    for stop in (1, 70):
        first, again = load_samples(tmp_path, streaming=True), load_samples(tmp_path, streaming=True)
        seen = ids(islice(first, stop))
        again.load_state_dict(first.state_dict())
        assert seen + ids(again) == whole["id"][:]


def test_a_set_in_several_files(tmp_path, cache):
    for number in range(3):
        (tmp_path / f"samples-{number:05d}-of-00003.jsonl").write_text(text_of(10, first=10 * number))
    stream, table = load_samples(tmp_path, streaming=True), load_samples(tmp_path)
    assert [row["images"][0]["path"] for row in table] == [str(tmp_path / f"{number}.png") for number in range(30)]
    assert list(stream) == list(table) and len(list(cache.glob("*.arrow"))) == 3
    (tmp_path / "samples.jsonl").write_text(text_of(1))
    with pytest.raises(ValueError, match=r"both samples\.jsonl and samples-00000-of-00003\.jsonl"):
        load_samples(tmp_path)


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.json"])
def test_a_large_file_is_arrow_on_disk(tmp_path, cache, name):
    """Neither Python objects (some 8 kB each) nor Arrow are in memory, and the second time nothing is read."""
    count, file = 4000, tmp_path / name
    items = [line(number) for number in range(count)]
    file.write_text("\n".join(items) if file.suffix == ".jsonl" else f"[{', '.join(items)}]")
    del items
    sources.sample_features()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    table = load_samples(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == count and peak < 12e6
    assert pa.total_allocated_bytes() - before < 1e5
    (copy,) = cache.glob("*.arrow")
    assert table.cache_files == [{"filename": str(copy)}]
    made = copy.stat()
    assert load_samples(file)[7] == table[7] and copy.stat().st_mtime_ns == made.st_mtime_ns
    stream = load_samples(file, streaming=True)
    assert stream.num_shards == 64 and next(iter(stream)) == table[0]


def test_a_file_that_changed_is_read_again(tmp_path, cache):
    file = tmp_path / "samples.jsonl"
    file.write_text(text_of(3))
    first = load_samples(file)
    file.write_text(text_of(3, first=5))
    os.utime(file, ns=(1, 1))
    assert load_samples(file)["images"][0][0]["path"].endswith("5.png")
    assert first["images"][0][0]["path"].endswith("0.png")  # who has read the old one keeps it
    (copy,) = cache.glob("*.arrow")
    copy.write_bytes(copy.read_bytes()[:100])  # whatever happened to it
    assert len(load_samples(file)) == 3
    file.write_text(text_of(3) + "{}\n")
    with pytest.raises(ValueError, match=r"line 7 has \[\]"):
        load_samples(file)
    assert [path.name for path in cache.glob("*.tmp")] == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (text_of(2).encode("utf-16"), "line 1 is not text in UTF-8"),
        (b'{"messages": [], "id": "\xff"}', "line 1 is not text in UTF-8"),
        (b'{"messages": ', "line 1 is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"messages": ' + b"[" * 100_000, "line 1 is not JSON"),
        (b'{"messages": [], "depth_codes": [' + b"9" * 5000 + b"]}", "is not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
        (b'[{"messages": []}, {"messages": [}]', "item 2 is not JSON"),
        (b'[{"messages": []}, {"messages": []}', "item 3 is not JSON"),
        (b'[{"messages": []}, 7]', "item 2 has int"),
        (b'[{"messages": []}, "\xff"]', "is not text in UTF-8"),
        (b'{"messages": [], "depth_codes": [[1.5]]}', "1.5 is no whole number"),
        (b"[]", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
    ],
)
def test_broken_files_are_named(tmp_path, data, words):
    file = tmp_path / "samples.json"
    file.write_bytes(data)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"samples\.json\b.*{words}"):
            list(load_samples(file, streaming=streaming))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth_codes": [[99999999999]]}, "code 99999999999"),
        ({"masks": [{"size": [99999999999, 1], "counts": "0"}]}, "mask 0 is 1 x 99999999999"),
    ],
)
def test_numbers_that_no_column_holds(tmp_path, fields, words):
    """Turned into Arrow, the line is named; read line by line, it is an error of its sample, as `on_error` wants it."""
    picture().save(tmp_path / "a.png")
    said = "[SEG]" if "masks" in fields else "<DEPTH_START><DEPTH_END>"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    (tmp_path / "samples.jsonl").write_text(json.dumps({"images": ["a.png"], "messages": chat, **fields}))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1' does not have the form"):
        load_samples(tmp_path)
    (row,) = load_samples(tmp_path, streaming=True)
    with pytest.raises(SampleError, match=words):
        load_sample(row, num_depth_tokens=1, num_depth_codes=8)


def test_items_that_lie_across_the_ends_of_what_is_read(tmp_path, monkeypatch):
    items = [json.loads(text) for text in text_of(30).split("\n") if text]
    for chunk, text in ((1, json.dumps(items)), (7, json.dumps(items, indent=1)), (1 << 20, json.dumps(items))):
        monkeypatch.setattr(lines, "_CHUNK", chunk)
        (tmp_path / "x.json").write_text("\n " + text)
        assert list(lines._items(tmp_path / "x.json")) == items
