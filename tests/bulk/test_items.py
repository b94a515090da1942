"""Folders, patterns, lists and data sets as items; what cannot be used is an item that says why."""

import io
import json
import os
import tarfile

import pytest
from helpers import picture
from PIL import Image

from perceptio_hf.bulk.items import is_collection, list_items
from perceptio_hf.data.rows import import_datasets


def save(path, width=8, height=6, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, seed=seed).save(path)
    return path


def test_a_folder_is_its_pictures_by_name_with_those_below_it(tmp_path):
    for name in ("b.png", "sub/a.jpg", "a.PNG", ".hidden.png", ".cache/c.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    items = list_items([str(tmp_path)])
    assert [item.id for item in items] == ["a.PNG", "b.png", os.path.join("sub", "a.jpg")]
    assert [item.index for item in items] == [0, 1, 2]
    assert all(os.path.isabs(item.source) and item.open().size == (8, 6) for item in items)


def test_patterns_pictures_and_lists_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x1.png", "x2.png", "y.png", "lists/z.png"):
        save(tmp_path / name)
    (tmp_path / "lists" / "l.jsonl").write_text('{"picture": "z.png", "question": "What?", "more": [1]}\n\n')
    items = list_items(["x?.png", "y.png", "lists/l.jsonl"])
    assert [item.picture for item in items] == ["x1.png", "x2.png", "y.png", os.path.join("lists", "z.png")]
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert items[3].question == "What?" and items[3].extra == {"more": [1]} and items[3].id == "line 1"
    assert items[3].source == str(tmp_path / "lists" / "z.png")


@pytest.mark.parametrize(
    ("word", "many"),
    [
        ("{folder}", True),
        ("{folder}/*.png", True),
        ("missing.jsonl", True),
        ("photo.jpg", False),
        ("https://host/a.png?width=3", False),
        ("data:image/png;base64,AAAA", False),
        ("{folder}/odd[1].png", False),  # a file of that name
    ],
)
def test_what_names_many_pictures(tmp_path, word, many):
    save(tmp_path / "odd[1].png")
    assert is_collection(word.format(folder=tmp_path)) == many


LINES = {
    "not json": "it is not JSON",
    "[1]": "it is a list",
    '{"question": "What?"}': "it has question, but no `picture`",
    '{"picture": 7}': "`picture` is 7",
    '{"picture": ""}': "`picture` is ''",
    '{"picture": "a.png", "question": ["What?"]}': "`question` is",
    '{"picture": "a.png", "score": NaN}': "not JSON compliant",
    r'{"picture": "a.png", "question": "\ud800"}': "it is not text in UTF-8",
}


def test_a_line_that_cannot_be_used_says_why_and_the_others_go_on(tmp_path):
    good = json.dumps({"image": "a.png", "id": 7, "error": "of an earlier run"})
    (tmp_path / "l.jsonl").write_text("\n".join([*LINES, good]))
    items = list_items([str(tmp_path / "l.jsonl")])
    assert len(items) == len(LINES) + 1
    for number, (item, why) in enumerate(zip(items[:-1], LINES.values(), strict=True), start=1):
        assert f"l.jsonl, line {number}: " in item.error and why in item.error and item.size() is None
        with pytest.raises(ValueError, match=f"line {number}"):
            item.open()
    assert items[-1].id == "7" and items[-1].error is None and items[-1].extra == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder.mkdir(), "without pictures"),
        (lambda folder: (folder / "train").mkdir(parents=True) or (folder / "dataset_dict.json").touch(), "train"),
        (lambda folder: folder.mkdir() or (folder / "dataset_info.json").write_text("{"), "cannot be read"),
    ],
)
def test_folders_that_hold_nothing(tmp_path, make, says):
    make(tmp_path / "folder")
    with pytest.raises(ValueError, match=says):
        list_items([str(tmp_path / "folder")])


def test_lists_and_patterns_that_hold_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "wrong.jsonl").write_text("a\nb\n")
    for word, says in (
        ("empty.jsonl", "is empty"),
        ("wrong.jsonl", "no line can be used; .*line 1: it is not JSON"),
        ("missing.jsonl", "There is no file"),
        ("*.png", "No file matches"),
    ):
        with pytest.raises(ValueError, match=says):
            list_items([str(tmp_path / word)])


def test_a_name_that_is_not_utf_8_is_an_error_of_its_own(tmp_path):
    save(tmp_path / "a.png")
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.link(tmp_path / "a.png", strange)
    good, bad = list_items([str(tmp_path)])
    assert good.error is None and "caf\\udce9.png is not UTF-8" in bad.error
    json.dumps([bad.id, bad.picture], ensure_ascii=False).encode()


def test_a_saved_data_set_is_its_rows(tmp_path):
    datasets = import_datasets()
    save(tmp_path / "a.png", 8, 6)
    save(tmp_path / "b.png", 5, 9)
    rows = {
        "image": [str(tmp_path / "a.png"), str(tmp_path / "b.png"), None],
        "question": ["One?", None, "Three?"],
        "label": [1, 2, 3],
        "score": [0.5, float("nan"), None],
        "boxes": [[1], [2], [3]],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    first, second, third = list_items([str(tmp_path / "saved")])
    assert (first.question, second.question, first.extra) == ("One?", "", {"label": 1, "score": 0.5})
    assert second.extra == {"label": 2}
    assert second.open().size == second.size() == (5, 9) and first.size() == (8, 6)
    with pytest.raises(ValueError, match="row 2: it has no picture"):
        third.open()


def shard(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            data = path.with_name("a.png").read_bytes() if name.endswith("png") else b"{}"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_tar_shards_are_their_pictures(tmp_path):
    save(tmp_path / "a.png", 8, 6)
    for number in range(3):
        shard(tmp_path / f"s-{number:02d}.tar", ["x/1.json", "x/1.png", "2.txt", "2.png"])
    items = list_items([str(tmp_path / "s-{00..01}.tar")])
    assert [item.id for item in items] == ["s-00.tar/x/1.png", "s-00.tar/2.png", "s-01.tar/x/1.png", "s-01.tar/2.png"]
    assert all(item.size() == item.open().size == (8, 6) for item in items)
    assert items[1].encoded() == {"bytes": (tmp_path / "a.png").read_bytes(), "path": "2.png"}
    assert len(list_items([str(tmp_path / "s-*.tar")])) == 6
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((900, 600), 90).save(tmp_path / "a.png", format="JPEG", quality=98, exif=exif)
    shard(tmp_path / "large.tar", ["1.png"])
    (large,) = list_items([str(tmp_path / "large.tar")])
    os.truncate(tmp_path / "large.tar", large.source.offset + (1 << 17))  # what it is read of
    assert large.source.size > 1 << 17 and large.size() == (600, 900)
    os.truncate(tmp_path / "s-01.tar", 1700)
    with pytest.raises(ValueError, match="the tar file ends"):
        items[3].open()


def test_parquet_is_its_rows_and_a_folder_its_shards(tmp_path):
    datasets = import_datasets()
    save(tmp_path / "a.png", 8, 6)
    save(tmp_path / "b.png", 5, 9)
    files = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")] * 3
    rows = {"image": [{"bytes": data, "path": None} for data in files], "question": ["Q?"] * 6, "score": [0.5] * 6}
    (tmp_path / "parts").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "parts" / "p.parquet"), batch_size=4)
    items = list_items([str(tmp_path / "parts")])
    assert [item.id for item in items] == [f"p.parquet row {row}" for row in range(6)]
    assert [item.open().size for item in items] == [(8, 6), (5, 9)] * 3
    assert items[5].question == "Q?" and items[5].extra == {"score": 0.5} and items[5].encoded()["bytes"] == files[5]


def test_columns_of_plain_bytes_and_of_paths(tmp_path, monkeypatch):
    """As other programs write parquet, without the types of `datasets`; what is kept of a path holds anywhere."""
    monkeypatch.chdir(tmp_path)
    data = save(tmp_path / "a.png", 8, 6).read_bytes()
    datasets = import_datasets()
    for name, column, kept in (
        ("b", data, {"bytes": data, "path": None}),
        ("p", "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}),
    ):
        datasets.Dataset.from_dict({"image": [column]}).to_parquet(f"{name}.parquet")
        (item,) = list_items([f"{name}.parquet"])
        assert item.encoded() == kept and item.size() == item.open().size == (8, 6)


def test_a_list_of_paths(tmp_path):
    save(tmp_path / "lists" / "a.png")
    (tmp_path / "lists" / "l.txt").write_text("a.png\n\nhttps://host/b.png\n")
    first, second = list_items([str(tmp_path / "lists" / "l.txt")])
    assert first.source == str(tmp_path / "lists" / "a.png") and first.id == "a.png"
    assert second.source == "https://host/b.png"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tar", b"no tar file" * 100, "cannot be read as a tar file"),
        ("a.parquet", b"no table", "cannot be read as parquet"),
        ("a.txt", b"\n \n", "is empty; write the path"),
        ("missing.tar", None, "There is no file"),
        ("missing.parquet", None, "There is no file"),
        ("missing.txt", None, "There is no file"),
    ],
)
def test_files_of_many_that_hold_nothing(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        list_items([str(tmp_path / name)])


def test_size_is_that_of_the_picture_as_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_text("no picture")
    text, turned = list_items([str(tmp_path)])
    assert turned.size() == turned.open().size == (6, 8)
    assert text.size() is None
