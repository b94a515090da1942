"""`perceptio label`: rows equal the teacher's and codec's own, from every kind of collection; it goes on; bad input."""

import base64
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from component_helpers import save_teacher
from helpers import picture
from PIL import Image

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.commands import main
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.data.depth_maps import depth_from_values, read_depth
from perceptio_hf.data.published.labels import read_label_metadata
from perceptio_hf.data.rows import import_datasets
from perceptio_hf.data.samples import check_sample
from perceptio_hf.data.tasks import load_tasks
from perceptio_hf.labelling.labels import read_rows
from perceptio_hf.modeling.codec_identity import codec_fingerprint
from perceptio_hf.processing.pictures import load_picture


@pytest.fixture(scope="module")
def labelled(parts, tmp_path_factory) -> Path:
    """The nine pictures, one that is none, and their maps."""
    out, photos = tmp_path_factory.mktemp("labelled") / "out", tmp_path_factory.mktemp("with") / "photos"
    shutil.copytree(parts / "photos", photos)
    (photos / "5.png").write_text("no picture")
    words = ["--teacher", str(parts / "teacher"), "--depth-codec", str(parts / "codec"), "--maps", "--batch-size", "2"]
    assert main.run(["label", str(photos), *words, "--out", str(out)]) == 0
    return out


def codes_of(out: Path) -> dict[str, list[int]]:
    rows = read_rows(out)
    return dict(zip(rows["id"], rows["codes"], strict=True))


def test_rows_hold_what_teacher_and_codec_say(labelled, parts):
    from transformers import pipeline

    rows, codec = read_rows(labelled), load_depth_codec(parts / "codec")
    assert rows["id"] == sorted(rows["id"]) and len(rows) == 9
    estimate = pipeline("depth-estimation", model=str(parts / "teacher"), device="cpu")
    for row in rows:
        opened = load_picture(row["image"]["path"])
        assert row["image"]["bytes"] is None and (row["width"], row["height"]) == opened.size and row["extra"] is None
        expected = depth_from_values(estimate(opened)["predicted_depth"].numpy(), "disparity").relative
        kept = read_depth(labelled / row["depth"], "relative")
        assert kept.relative.shape == opened.size[::-1]
        np.testing.assert_allclose(kept.relative, expected, atol=2e-5)
        again = codec.encode(torch.from_numpy(kept.relative))
        assert (again != torch.tensor(row["codes"])).float().mean() < 0.1  # 16 bits round
    assert len({tuple(codes) for codes in rows["codes"]}) > 5


def test_metadata_names_teacher_and_codec(labelled, parts):
    import pyarrow as pa

    about = read_label_metadata(labelled)
    assert about["complete"] and (about["rows"], about["failures"]) == (9, 1) and about["maps"]
    assert about["teacher"]["unit"] == "disparity" and about["teacher"]["model_type"] == "depth_anything"
    assert about["codec"]["fingerprint"] == codec_fingerprint(load_depth_codec(parts / "codec"))
    assert (about["codec"]["num_tokens"], about["codec"]["num_codes"]) == (16, 16)
    with pa.memory_map(str(labelled / "labels" / "data-00000.arrow")) as file:
        metadata = json.loads(pa.ipc.open_stream(file).schema.metadata[b"perceptio_labels"])
    assert metadata["codec"] == about["codec"] and metadata["teacher"] == about["teacher"]
    failure = json.loads((labelled / "failures.jsonl").read_text())
    assert failure["id"] == "5.png" and "is not a picture" in failure["error"]


def test_pictures_that_were_mended_or_replaced_are_done_once_more(parts, label, tmp_path):
    """And no other; questions about rows that are there no longer go, those about the same rows stay."""
    photos, out, asked = tmp_path / "photos", tmp_path / "out", ("--questions", "closest", "--batch-size", "2")
    shutil.copytree(parts / "photos", photos)
    good = (photos / "0.jpg").read_bytes()
    (photos / "0.jpg").write_text("no picture")
    (photos / "8.jpg").write_text("nor this")
    assert label(photos, "--out", out, *asked)[1]["failed"] == 2
    before = codes_of(out)
    assert label(photos, "--out", out, "--maps")[1]["fresh"] == 2 and (out / "questions.json").is_file()
    assert codes_of(out) == before and len(before) == 7

    (photos / "0.jpg").write_bytes(good)
    picture(160, 120, seed=70).save(photos / "more" / "3.png")
    code, said, _ = label(photos, "--out", out, "--maps")
    assert code == 0 and (said["labelled"], said["failed"], said["fresh"]) == (8, 1, 3)
    assert not (out / "questions").exists() and not (out / "questions.json").exists()
    rows = {row["id"]: row for row in read_rows(out)}
    assert list(rows) == sorted(rows) and (rows["more/3.png"]["width"], rows["more/3.png"]["height"]) == (160, 120)
    assert label(photos, "--out", tmp_path / "anew", "--maps")[1]["labelled"] == 8
    assert codes_of(out) == codes_of(tmp_path / "anew")
    assert label(photos, "--out", out, "--maps")[1]["fresh"] == 1, "the one that fails"


def test_training_reads_them_as_they_are(labelled):
    samples = load_tasks([{"labels": str(labelled)}, {"labels": str(labelled), "maps": True, "name": "maps"}])[0]
    assert samples["out"]["depth_codes"] == [[codes] for codes in codes_of(labelled).values()]
    for kind in samples.values():
        for sample in kind:
            check_sample(sample, num_depth_tokens=16, num_depth_codes=16)


def test_a_fingerprint_is_that_of_the_weights(parts, tmp_path):
    codec = load_depth_codec(parts / "codec")
    before = codec_fingerprint(codec)
    codec.depth_codebook.ema_count.add_(1.0)
    codec.save_pretrained(tmp_path / "again")
    assert codec_fingerprint(load_depth_codec(tmp_path / "again")) == before
    codec.codebook[3, 1] += 1e-6
    assert codec_fingerprint(codec) != before


def collections(parts: Path, folder: Path) -> dict[str, list[str]]:
    """The nine pictures as a list, lines, two tar shards, parquet and a saved data set."""
    datasets = import_datasets()
    paths = sorted((parts / "photos").rglob("*.*"), key=lambda path: str(path.relative_to(parts / "photos")))
    (folder / "list.txt").write_text("\n".join(map(str, paths)) + "\n")
    lines = [json.dumps({"image": str(path), "id": path.name, "caption": "noise"}) for path in paths]
    (folder / "list.jsonl").write_text("\n".join(lines))
    for number, part in enumerate((paths[:5], paths[5:])):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as archive:
            for place, path in enumerate(part):
                for name, data in ((f"{place:04d}{path.suffix}", path.read_bytes()), (f"{place:04d}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths], "caption": ["noise"] * 9}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    )
    table.save_to_disk(str(folder / "saved"))
    table.to_parquet(str(folder / "table.parquet"), batch_size=4)
    (folder / "shards").mkdir()
    shutil.copy(folder / "table.parquet", folder / "shards")
    return {
        "list": [str(folder / "list.txt")],
        "lines": [str(folder / "list.jsonl")],
        "tar": [str(folder / "shard-{000..001}.tar")],
        "tars": [str(folder / "shard-*.tar")],
        "parquet": [str(folder / "table.parquet")],
        "a folder of shards": [str(folder / "shards")],
        "saved": [str(folder / "saved")],
    }


def test_every_collection_gives_the_same_codes(label, labelled, parts, tmp_path):
    expected = list(codes_of(labelled).values())
    for name, words in collections(parts, tmp_path).items():
        out = tmp_path / name
        code, said, error = label(*words, "--out", out, "--batch-size", 2)
        assert code == 0 and said["labelled"] == 9, (name, error)
        rows = read_rows(out)
        assert rows["codes"] == expected, name
        assert len(set(rows["id"])) == 9
        assert (rows[0]["image"]["bytes"] is None) == (name in ("list", "lines"))
        picture_again = load_picture(Image.open(io.BytesIO(rows[8]["image"]["bytes"]))) if name == "tar" else None
        assert picture_again is None or picture_again.size == (rows[8]["width"], rows[8]["height"])
        assert rows[0]["extra"] == (
            '{"caption": "noise"}' if name in ("lines", "parquet", "saved", "a folder of shards") else None
        )


@contextmanager
def served(folder: Path):
    """The address of a server that has the files of a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_list_says_comes_along_and_pictures_without_a_file_as_bytes(label, parts, tmp_path):
    photos = parts / "photos"
    data = [(photos / name).read_bytes() for name in ("0.jpg", "2.jpg")]
    url = f"data:image/jpeg;base64,{base64.b64encode(data[1]).decode()}"
    said = [{"question": ["no text"], "spatial": 7, "error": 1, "tag": "x"}, {"question": "What?"}, {}, {}]
    with served(photos) as address:
        pictures = [f"{address}/0.jpg", url, f"file://{photos}/4.jpg", f"{address}/gone.jpg"]
        lines = [json.dumps({"picture": picture} | more) for picture, more in zip(pictures, said, strict=True)]
        (tmp_path / "list.jsonl").write_text("\n".join(lines))
        code, told, error = label(tmp_path / "list.jsonl", "--out", tmp_path / "out")
    assert code == 0 and (told["labelled"], told["failed"]) == (3, 1), error
    assert "gone.jpg cannot be fetched" in (tmp_path / "out" / "failures.jsonl").read_text()
    rows = read_rows(tmp_path / "out")
    kept = [row["image"] for row in rows]
    assert kept == [
        {"bytes": data[0], "path": f"{address}/0.jpg"},
        {"bytes": data[1], "path": None},
        {"bytes": None, "path": str(photos / "4.jpg")},
    ]
    extra = [json.loads(row["extra"] or "null") for row in rows]
    assert extra == [{"question": ["no text"], "spatial": 7, "tag": "x"}, {"question": "What?"}, None]
    assert not (tmp_path / "out" / "journal" / "fetched").exists()
    for sample in load_tasks([{"labels": str(tmp_path / "out")}])[0]["out"]:
        check_sample(sample, num_depth_tokens=16, num_depth_codes=16)
    # Given again, the one that failed is tried again (there is no server now); what was fetched is not.
    code, told, error = label(tmp_path / "list.jsonl", "--out", tmp_path / "out")
    assert code == 0 and (told["labelled"], told["failed"], told["fresh"]) == (3, 1, 1), error
    assert [row["image"] for row in read_rows(tmp_path / "out")] == kept


def test_objects_of_pictures_that_rows_of_a_table_name(label, parts, tmp_path):
    """As the Hub keeps COCO: bytes, and the name beside them."""
    names = ("0.jpg", "2.jpg")
    rows = [{"bytes": (parts / "photos" / name).read_bytes(), "path": name} for name in names]
    import_datasets().Dataset.from_dict({"image": rows}).to_parquet(str(tmp_path / "p.parquet"))
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    things = [{"id": n, "image_id": 1, "category_id": n, "segmentation": square, "iscrowd": 0} for n in (1, 2)]
    document = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": things}
    document["categories"] = [{"id": 1, "name": "cup"}, {"id": 2, "name": "box"}]
    (tmp_path / "a.json").write_text(json.dumps(document))
    words = ("--questions", "objects", "--annotations", tmp_path / "a.json", "--out", tmp_path / "out")
    code, said, error = label(tmp_path / "p.parquet", *words)
    assert code == 0, error
    assert said["questions"]["annotations"]["pictures_without_annotations"] == 1
    assert said["questions"]["annotations"]["annotated_pictures_not_labelled"] == 0


def test_a_picture_too_narrow_for_the_teacher_is_listed(label, parts, tmp_path):
    picture(3000, 3).save(tmp_path / "banner.png")
    shutil.copy(parts / "photos" / "0.jpg", tmp_path / "0.jpg")
    assert label(tmp_path, "--out", tmp_path / "out")[1]["failed"] == 1
    failure = json.loads((tmp_path / "out" / "failures.jsonl").read_text())
    assert failure["error"].startswith("the teacher's image processor cannot take a picture of 3000 x 3 (")


def test_labels_in_the_folder_of_the_pictures(label, parts, tmp_path):
    shutil.copytree(parts / "photos" / "more", tmp_path / "photos")
    words = [tmp_path / "photos", "--maps", "--out", tmp_path / "photos" / "labels"]
    assert label(*words)[1]["fresh"] == 4
    code, said, error = label(*words)
    assert code == 0 and (said["fresh"], said["labelled"]) == (0, 4), error


def test_a_finished_run_does_nothing_and_other_labels_are_not_mixed(label, parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert label(parts / "photos", "--out", out)[1]["fresh"] == 9
    before = (out / "labels" / "state.json").read_bytes()
    assert label(parts / "photos", "--out", out)[1]["fresh"] == 0
    assert (out / "labels" / "state.json").read_bytes() == before
    save_teacher(tmp_path / "other", seed=1)
    DepthVQVAE(
        DepthVQVAEConfig(image_size=32, downsample=4, num_codes=16, code_dim=8, base_channels=4)
    ).save_pretrained(tmp_path / "grid")
    for words, says in (
        (["--maps"], "another maps"),
        (["--teacher", str(tmp_path / "other")], "another teacher"),
        (["--depth-codec", str(tmp_path / "grid")], "another codec"),
    ):
        given = ["label", str(parts / "photos"), "--depth-codec", str(parts / "codec"), "--out", str(out)]
        assert main.run([*given, "--teacher", str(parts / "teacher"), *words]) == 2
        assert says in capsys.readouterr().err
    code, _, error = label(parts / "photos" / "more", "--out", out)
    assert code == 2 and "another set of pictures" in error and "--overwrite" in error
    assert label(parts / "photos" / "more", "--out", out, "--overwrite")[1]["labelled"] == 4
    assert len(read_rows(out)) == 4


def test_a_moved_teacher_is_the_same_one_and_a_difference_is_named(label, parts, tmp_path):
    for name in ("teacher", "codec"):
        shutil.copytree(parts / name, tmp_path / name)
    assert label(parts / "photos", "--out", tmp_path / "out")[1]["fresh"] == 9
    moved = {"teacher": tmp_path / "teacher", "depth_codec": tmp_path / "codec"}
    code, said, error = label(parts / "photos", "--out", tmp_path / "out", **moved)
    assert code == 0 and said["fresh"] == 0, error
    code, _, error = label(parts / "photos", "--out", tmp_path / "out", "--dtype", "float32")
    assert code == 2 and "results of another teacher: dtype auto there, dtype float32 now" in error


def test_a_start_that_failed_hinders_no_other(label, parts, tmp_path):
    """What was mistyped, or a cluster that was not there, left no result; nothing speaks against other words."""
    out = tmp_path / "out"
    code, _, error = label(parts / "photoz", "--out", out)
    assert code == 2 and error == f"perceptio: There is no picture, folder or list {parts / 'photoz'}.\n"
    (out / "journal").mkdir(parents=True)
    (out / "journal" / "labels.claim.json").write_text('{"maps": true}')
    (out / "labels.json").write_text("{}")
    assert label(parts / "photos", "--out", out)[1]["labelled"] == 9


def test_a_tilde_is_the_home_folder(label, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert label(parts / "photos" / "more", "--out=~/a")[1]["labelled"] == 4
    assert label(parts / "photos" / "more", "--out", "~/b")[1]["labelled"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert len(read_rows(tmp_path / "a")) == len(read_rows(tmp_path / "b")) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{broken", "is not JSON"),
        ("[1, 2]", "is not of COCO's form"),
        (
            '{"images": [{"id": 1, "file_name": "zebra.png"}], "annotations": [], "categories": []}',
            "none of these pict",
        ),
    ],
)
def test_annotations_are_looked_at_before_the_work(label, parts, tmp_path, text, says):
    (tmp_path / "a.json").write_text(text)
    words = ["--questions", "objects", "--annotations", tmp_path / "a.json", "--out", tmp_path / "out"]
    code, _, error = label(parts / "photos", *words)
    assert code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_rows(label, parts, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(parts / "photos", photos)
    for index in range(9, 36):
        picture(60, 40, seed=index).save(photos / f"z{index}.png")
    words = ["label", str(photos), "--teacher", str(parts / "teacher"), "--depth-codec", str(parts / "codec")]
    words += ["--maps", "--batch-size", "2"]
    assert label(photos, "--out", tmp_path / "whole", "--maps", "--batch-size", 2)[0] == 0
    process = subprocess.Popen([sys.executable, "-m", "perceptio_hf", *words, "--out", str(out)])
    journal, patience = out / "journal" / "labels.jsonl", time.monotonic() + 100
    while time.monotonic() < patience and not (journal.exists() and journal.read_bytes().count(b"\n") >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n")
    assert 6 <= done < 36, "it was killed in the middle"
    with pytest.raises(ValueError, match="not complete"):
        read_rows(out)
    code, said, _ = label(photos, "--out", out, "--maps", "--batch-size", 2)
    assert code == 0 and said["fresh"] == 36 - done and said["labelled"] == 36
    assert read_rows(out).to_list() == read_rows(tmp_path / "whole").to_list()
    for path in (tmp_path / "whole" / "depth").rglob("*.png"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "whole")).read_bytes()


def test_half_written_rows_of_a_killed_run_are_cleared_away(label, parts, tmp_path):
    (tmp_path / ".labels.1.tmp").mkdir()
    (tmp_path / ".labels.1.tmp" / "data-00000.arrow").write_bytes(b"gigabytes")
    assert label(parts / "photos" / "more", "--out", tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "labels", "labels.json"]


def test_a_full_disk_is_one_line_and_the_run_goes_on(label, parts, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # no file may become larger
    try:
        code, _, error = label(parts / "photos", "--out", tmp_path / "out", "--batch-size", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and error.count("\n") == 1
    assert (
        f"{tmp_path / 'out' / 'journal' / 'labels.jsonl'}: File too large; make room there and give the same" in error
    )
    assert 0 < (tmp_path / "out" / "journal" / "labels.jsonl").stat().st_size <= 900
    code, said, _ = label(parts / "photos", "--out", tmp_path / "out", "--batch-size", 1)
    assert code == 0 and said["labelled"] == 9 and 0 < said["fresh"] < 9


def test_metric_teachers_say_so_and_others_are_asked(label, parts, tmp_path):
    from perceptio_hf.labelling.teacher import teacher_info

    save_teacher(tmp_path / "metric", kind="metric")
    assert teacher_info(str(tmp_path / "metric")).unit == "m"
    with pytest.raises(ValueError, match="gives m"):
        teacher_info(str(tmp_path / "metric"), "disparity")
    folder = tmp_path / "dpt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "dpt"}))
    with pytest.raises(ValueError, match="give --teacher-unit"):
        teacher_info(str(folder))
    assert teacher_info(str(folder), "disparity").unit == "disparity"
    given = ["label", str(parts / "photos"), "--depth-codec", str(parts / "codec"), "--maps"]
    assert main.run([*given, "--teacher", str(tmp_path / "metric"), "--out", str(tmp_path / "out")]) == 0
    assert read_label_metadata(tmp_path / "out")["teacher"]["unit"] == "m"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--teacher", "CODEC"],
            "is a 'perceptio_depth_vqvae' model, which says no depth",
        ),
        (["--teacher", "PHOTOS"], "has no config.json"),
        (["--teacher", "no-such-teacher"], "no-such-teacher cannot be loaded: it is no folder here"),
        (["--depth-codec", "TEACHER"], "is not a depth codec"),
        (["--depth-codec", "nowhere"], "nowhere"),
        (["--workers", "2"], "--engine ray"),
        (["--questions", "nearest"], "choose from closest, order, objects"),
        (["--questions", "objects"], "needs --annotations"),
        (["--annotations", "x.json"], "--questions objects"),
        (["--out", "PHOTOS/0.jpg"], "is a file"),
        (["--device", "quantum"], "--device quantum"),
    ],
)
def test_mistakes_are_one_line(parts, tmp_path, capsys, words, says):
    places = {"CODEC": "codec", "TEACHER": "teacher", "PHOTOS": "photos"}
    for name, part in places.items():
        words = [word.replace(name, str(parts / part)) for word in words]
    given = ["--teacher", str(parts / "teacher"), "--depth-codec", str(parts / "codec"), "--out", str(tmp_path / "out")]
    assert main.run(["label", str(parts / "photos"), *given, *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out" / "journal").exists()


def test_folders_of_others_are_left_alone(label, parts, tmp_path):
    (tmp_path / "out" / "depth").mkdir(parents=True)
    (tmp_path / "out" / "depth" / "mine.png").write_text("mine")
    code, _, error = label(parts / "photos", "--out", tmp_path / "out")
    assert code == 2 and "is there already" in error and (tmp_path / "out" / "depth" / "mine.png").exists()


def test_two_runs_into_one_folder(label, parts, tmp_path):
    from perceptio_hf.files import in_use

    code = f"""import sys; from perceptio_hf.files import in_use
with in_use({str(tmp_path / "out")!r}, "perceptio label"): print("held", flush=True); sys.stdin.read()"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    refused = label(parts / "photos", "--out", tmp_path / "out")
    other.communicate()
    assert refused[0] == 2 and "is in use by process" in refused[2]
    with in_use(tmp_path / "out", "a test"):
        assert label(parts / "photos", "--out", tmp_path / "out")[0] == 0
