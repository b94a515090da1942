"""Folders, patterns, lists and data sets as items; what cannot be used is an item that says why."""

import base64
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import picture
from PIL import Image

from perceptio_hf.bulk import archives
from perceptio_hf.bulk.archives import ParquetRow, SavedRow, TarMember
from perceptio_hf.bulk.item import Fetched, Item
from perceptio_hf.bulk.items import is_collection, list_items
from perceptio_hf.bulk.order import order_by_size
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


def test_what_a_line_asks_is_taken_as_it_is(tmp_path):
    """`predict` says that it must be a text; `label` does not ask it."""
    line = {"picture": "a.png", "question": ["What?"], "spatial": 3, "error": "e", "id": None, "more": None}
    (tmp_path / "l.jsonl").write_text(json.dumps(line))
    (item,) = list_items([str(tmp_path / "l.jsonl")])
    assert (item.question, item.spatial, item.error, item.extra) == (["What?"], 3, None, {"more": None})
    assert item.id == "line 1"


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


def test_every_file_of_a_range_must_be_there(tmp_path):
    save(tmp_path / "p-0.png")
    save(tmp_path / "p-2.png")
    save(tmp_path / "odd[1]" / "p-1.png")
    for word, says in (
        ("p-{0..2}.png", r"Of the 3 files that .*\{0\.\.2\}\.png names, 1 are not there: [^,]*p-1\.png; complete them"),
        ("p-{0..9}.png", r"8 are not there: [^,]*p-1\.png, [^,]*p-3\.png, [^,]*p-4\.png, \.\.\.; "),
        ("q-{0..9}.png", "No file matches"),
    ):
        with pytest.raises(ValueError, match=says):
            list_items([str(tmp_path / word)])
    assert len(list_items([str(tmp_path / "p-{0..9}*.png")])) == 2, "a pattern is what matches"
    assert len(list_items([str(tmp_path / "odd[1]" / "p-{1..1}.png")])) == 1, "a name is a name"


def test_results_are_no_pictures(tmp_path, monkeypatch):
    """So that a command finds the same pictures when it is given again."""
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for name in ("a.png", "more/b.png", "out/depth/0.png", "out/1.png", "outer/c.png"):
        save(photos / name)
    (photos / "link").symlink_to(out / "depth")
    expected = ["a.png", "more/b.png", "outer/c.png"]
    assert [item.id for item in list_items([str(photos)], out)] == expected
    found = list_items([str(photos / "**" / "*.png")], out)
    assert [item.id for item in found] == [str(photos / name) for name in expected]
    monkeypatch.chdir(photos)
    assert [item.id for item in list_items(["."], "out")] == expected
    assert [item.id for item in list_items(["**/*.png"], "out")] == expected
    for word in ("out", "out/**/*.png"):
        with pytest.raises(ValueError, match=f"All . files that {word[:3]}.* stands for, .*; name another --out"):
            list_items([word], "out")
    for word in ("more", "more/*.png", "more/b.png"):  # chosen inside of a folder whose results lie beside them
        assert len(list_items([word], photos)) == 1
    save(tmp_path / "a.png")
    shard(tmp_path / "s.tar", ["a.png"])
    (tmp_path / "a.png").unlink()
    (item,) = list_items([str(tmp_path)], photos)
    assert item.id == "s.tar/a.png", "its shards, as before there were results"


def test_urls_of_data_and_of_files_are_kept_as_bytes_and_paths(tmp_path):
    data = save(tmp_path / "a b.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    lines = [{"picture": url}, {"picture": f"file://{tmp_path}/a%20b.png"}, {"picture": "https://host/a.png"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second, third = list_items([str(tmp_path / "l.jsonl")])
    assert first.encoded() == {"bytes": data, "path": None}
    assert second.encoded() == {"bytes": None, "path": str(tmp_path / "a b.png")}
    assert third.encoded() == {"bytes": None, "path": "https://host/a.png"}
    assert first.fetched() is first and second.open().size == first.open().size == (8, 6)


def test_a_saved_data_set_of_lists_of_pictures(tmp_path):
    """As multimodal data sets have them; saved with a format, which gives rows as tensors."""
    datasets = import_datasets()
    data = save(tmp_path / "a.png").read_bytes()
    rows = {"images": [[{"bytes": data, "path": "a.png"}], []], "label": [1, 2]}
    features = {"images": datasets.List(datasets.Image()), "label": datasets.Value("int64")}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features)).with_format("torch")
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.rename_column("images", "views").save_to_disk(str(tmp_path / "named"))
    for name in ("saved", "named"):
        first, second = list_items([str(tmp_path / name)])
        assert first.encoded() == {"bytes": data, "path": "a.png"} and first.size() == first.open().size == (8, 6)
        assert json.dumps(first.extra) == '{"label": 1}'
        with pytest.raises(ValueError, match="row 1: it has 0 pictures"):
            second.open()


def test_a_saved_data_set_is_its_rows(tmp_path):
    datasets = import_datasets()
    save(tmp_path / "a.png", 8, 6)
    save(tmp_path / "b.png", 5, 9)
    rows = {
        "image": [str(tmp_path / "a.png"), str(tmp_path / "b.png"), None],
        "question": ["One?", None, "Three?"],
        "label": [1, 2, 3],
        "score": [0.5, float("nan"), None],
        "boxes": [[1], [2], [float("nan")]],
        "kind": ["a", "b", "a"],
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    first, second, third = list_items([str(tmp_path / "saved")])
    expected = {"label": 1, "score": 0.5, "boxes": [1], "kind": "a"}
    assert (first.question, second.question, first.extra) == ("One?", "", expected)
    assert second.extra == {"label": 2, "boxes": [2], "kind": "b"} and third.extra == {"label": 3, "kind": "a"}
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


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], "is damaged at byte 1,024"),  # the second header
        (lambda data: data[:1024] + bytes(512) + data[1536:], "goes on behind its end at byte 1,024"),
        (lambda data: data[:2048], "is cut off at byte 2,048"),  # between two files
        (lambda data: data[:1300], "is cut off at byte 1,300"),
        (lambda data: data + data, "name each of them"),
    ],
)
def test_a_damaged_shard_is_an_error_whole(tmp_path, spoil, says):
    """Not the pictures in front of the damage."""
    save(tmp_path / "a.png", 8, 6)
    shard(tmp_path / "s.tar", ["1.png", "2.png", "3.png"])
    assert [item.source.offset for item in list_items([str(tmp_path / "s.tar")])] == [512, 1536, 2560]
    (tmp_path / "s.tar").write_bytes(spoil((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(ValueError, match=says):
        list_items([str(tmp_path / "s.tar")])


def test_links_in_a_shard_are_what_they_stand_for(tmp_path):
    save(tmp_path / "a.png", 8, 6)
    kinds = [("x/hard.png", tarfile.LNKTYPE, "x/a.png"), ("x/soft.png", tarfile.SYMTYPE, "a.png")]
    for name, more in (("s", []), ("t", [("x/lost.png", tarfile.SYMTYPE, "b.png")])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / "a.png", "x/a.png")
            for link, kind, target in kinds + more:
                member = tarfile.TarInfo(link)
                member.type, member.linkname = kind, target
                archive.addfile(member)
    items = list_items([str(tmp_path / "s.tar")])
    assert [item.id for item in items] == ["s.tar/x/a.png", "s.tar/x/hard.png", "s.tar/x/soft.png"]
    assert all(item.open().size == (8, 6) for item in items)
    with pytest.raises(ValueError, match=r"x/lost\.png is a link to b"):
        list_items([str(tmp_path / "t.tar")])


def test_a_sample_of_a_shard_is_one_picture(tmp_path):
    save(tmp_path / "a.png")
    names = ["1.png", "1.depth.png", "1.json", "2.seg.png", "2.png", "3.left.png", "3.right.png", "d.x/4.png"]
    shard(tmp_path / "s.tar", names)
    found = [item.source.name for item in list_items([str(tmp_path / "s.tar")])]
    assert found == ["1.png", "2.png", "3.left.png", "3.right.png", "d.x/4.png"]


def test_a_folder_holds_pictures_or_shards(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "shards" / "more").mkdir(parents=True)
    for name in ("0.tar", "more/1.tar"):
        shard(tmp_path / name.replace("/", "-"), ["1.png"])
        os.replace(tmp_path / name.replace("/", "-"), tmp_path / "shards" / name)
    items = list_items([str(tmp_path / "shards")])
    assert [item.id for item in items] == ["0.tar/1.png", "1.tar/1.png"]
    with pytest.raises(ValueError, match=r"holds pictures \(1, such as .*a.png\) and shards of pictures \(2, "):
        list_items([str(tmp_path)])
    assert len(list_items([str(tmp_path / "**" / "*.tar")])) == 2
    (tmp_path / "beside").mkdir()
    os.replace(tmp_path / "a.png", tmp_path / "beside" / "a.png")
    (tmp_path / "beside" / "metadata.parquet").write_bytes(b"PAR1")
    assert len(list_items([str(tmp_path / "beside")])) == 1


def test_a_name_in_a_shard_that_is_not_utf_8(tmp_path):
    save(tmp_path / "a.png")
    shard(tmp_path / "s.tar", ["a.png", "caf\udce9.png"])
    good, bad = list_items([str(tmp_path / "s.tar")])
    assert good.error is None and "s.tar, caf\\udce9.png is not UTF-8" in bad.error
    json.dumps([bad.id, bad.picture, bad.error], ensure_ascii=False).encode()


def test_row_groups_are_read_once_whatever_the_order_in_a_window(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures, reads = [bytes([number % 256]) * 9 for number in range(2000)], []
    pq.write_table(pa.table({"image": pictures}), tmp_path / "p.parquet", row_group_size=100)
    places = [place for place, _ in archives.parquet_rows(str(tmp_path / "p.parquet"))]
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or read(*a, **k))
    order = order_by_size([number * 37 % 101 for number in range(2000)], [None] * 2000)
    assert order[:100] != list(range(100))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: places[place].encoded(), order))
    assert found == [pictures[place] for place in order]
    # A thread that is held up for long may ask for a group once more; with two groups held they were 1,445 reads.
    assert set(reads) == set(range(20)) and len(reads) <= 30
    small = archives._Groups(most=2000)  # bytes; two groups are held at least
    assert [len(small.pictures(place.file, place.group)) for place in places[::100]] == [100] * 20
    assert list(small._held) == [(places[0].file, 18), (places[0].file, 19)]


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


def test_what_other_programs_write_into_parquet_is_carried_along(tmp_path):
    """Texts as dictionaries, as pandas has categories, and numbers of few bits."""
    import pyarrow
    import pyarrow.parquet

    save(tmp_path / "a.png", 8, 6)
    questions = pyarrow.array(["One?", "Two?", "One?"]).dictionary_encode()
    columns = {"image": [str(tmp_path / "a.png")] * 3, "question": questions, "tags": [["x"], [], ["y", "z"]]}
    columns |= {"level": pyarrow.array([1, 2, 3], pyarrow.int16()), "box": [{"x": 1}] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    items = list_items([str(tmp_path / "p.parquet")])
    assert [item.question for item in items] == ["One?", "Two?", "One?"]
    assert items[2].extra == {"tags": ["y", "z"], "level": 3}


def test_columns_of_plain_bytes_and_of_paths(tmp_path, monkeypatch):
    """As other programs write parquet, without the types of `datasets`; what is kept of a path holds anywhere, and is
    seen from the folder of the file."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = save(tmp_path / "a.png", 8, 6).read_bytes()
    datasets = import_datasets()
    for name, column, kept in (
        ("b", data, {"bytes": data, "path": None}),
        ("p", "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}),
        ("t", base64.b64encode(data).decode(), None),
    ):
        datasets.Dataset.from_dict({"image": [column]}).to_parquet(f"../{name}.parquet")
        (item,) = list_items([f"../{name}.parquet"])
        assert item.open().size == (8, 6) and (kept is None or (item.encoded(), item.size()) == (kept, (8, 6)))


def test_a_list_of_paths(tmp_path):
    save(tmp_path / "lists" / "a.png")
    text = "\ufeffa.png\n\nhttps://host/b.png\n~c.png\n"  # with the mark that editors of Windows begin with
    (tmp_path / "lists" / "l.txt").write_text(text, encoding="utf-8")
    first, second, third = list_items([str(tmp_path / "lists" / "l.txt")])
    assert first.source == str(tmp_path / "lists" / "a.png") and first.id == "a.png"
    assert second.source == "https://host/b.png"
    assert third.source == str(tmp_path / "lists" / "~c.png"), "nobody's home"


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


def test_the_file_that_a_machine_needs(tmp_path):
    def file_of(source) -> str | None:
        return Item(0, "a", "a", source).file

    assert file_of("/pictures/a.png") == "/pictures/a.png"
    assert file_of(TarMember("/shards/0.tar", "a.png", 512, 10)) == "/shards/0.tar"
    assert file_of(ParquetRow("/tables/0.parquet", 0, 1)) == "/tables/0.parquet"
    assert file_of(SavedRow("/saved", 3)) == "/saved"
    for elsewhere in ("https://example.org/a.png", "data:image/png;base64,AA==", Fetched("https://x", b""), None):
        assert file_of(elsewhere) is None
