"""`perceptio predict` for a folder, a pattern, a list, a data set: lines, failures, going on, flat memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture
from PIL import Image

from perceptio_hf.commands import main
from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.run import predictions

QUESTION = "Which is closer, the red ball or the blue box?"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(7):
        picture(30 + 7 * index, 40 - 3 * index, seed=index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def predict(tiny_folder, capsys):
    """Runs the command; gives exit code, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        words = [*map(str, arguments), "--model", str(tiny_folder), "--max-new-tokens", "24"]
        code = main.run(["predict", *words])
        return code, *capsys.readouterr()

    return run


def lines(folder: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_folder_gives_a_line_for_each_picture_equal_to_that_of_predict_alone(predict, photos, tmp_path):
    out = tmp_path / "out"
    code, said, _ = predict(photos, QUESTION, "--spatial", "seg+depth", "--out", out, "--batch-size", 3)
    assert code == 0 and "7 pictures answered" in said
    assert sorted(os.listdir(out)) == ["depth", "order.json", "results.claim.json", "results.jsonl"]
    assert predict(*sorted(photos.iterdir()), QUESTION, "--spatial", "seg+depth", "--out", tmp_path / "alone")[0] == 0
    found = lines(out)
    assert sorted(line["index"] for line in found) == list(range(7))
    for line in found:
        alone = json.loads((tmp_path / "alone" / str(line["index"]) / "answer.json").read_text())
        same = ("text", "depth_codes", "well_formed", "phrases", "width", "height", "question", "picture")
        assert {key: line[key] for key in same} == {key: alone[key] for key in same}
        for mask, other in zip(line["masks"], alone["masks"], strict=True):
            assert (decode_mask(mask) != decode_mask(other)).mean() < 0.01
        depths = [np.asarray(Image.open(path)) for path in (out / line["depth"], alone["files"]["depth"])]
        assert depths[0].dtype == np.uint16 and depths[0].shape == (line["height"], line["width"])
        assert np.abs(depths[0].astype(int) - depths[1]).max() <= 7


def test_a_list_has_its_own_questions_and_failures_are_listed(predict, photos, tmp_path):
    rows = [{"picture": f"photos/{index}.png", "question": f"What is {index}?", "tag": index} for index in range(7)]
    rows[6]["picture"] = "photos/missing.png"  # line 7
    rows[2]["question"] = " "
    rows[3]["picture"] = "photos/text.png"
    rows[4]["spatial"], rows[5]["spatial"] = "none", "deep"
    (photos / "text.png").write_text("no picture")
    own = {"text": "mine", "index": 70, "masks": None, "extra": {"a": 1}}  # names that the results have too
    rows[1] |= own
    rows[6] |= own
    rows.append({"picture": "photos/0.png", "question": ["What?"]})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    code, said, _ = predict(tmp_path / "list.jsonl", "--spatial", "depth", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(said) == {
        "answered": 3,
        "failed": 6,
        "fresh": 9,
        "files": {name: str(tmp_path / "out" / f"{name}.jsonl") for name in ("results", "failures")},
    }
    found = {line["id"]: line for line in lines(tmp_path / "out")}
    assert [line["tag"] for line in found.values() if "error" not in line and line["spatial"] == "depth"] == [0, 1]
    assert found["line 1"]["question"] == "What is 0?" and found["line 1"]["depth"] == "depth/000000.png"
    assert found["line 5"]["depth"] is None and found["line 5"]["depth_codes"] is None
    for number, why in (
        (7, "There is no picture"),
        (3, "question is empty"),
        (4, "is not a picture"),
        (6, "'deep'"),
        (8, "`question` is ['What?']; it must be a text"),
        (9, "line 9: it is not JSON"),
    ):
        assert why in found[f"line {number}"]["error"]
    assert found["line 2"]["extra"] == found["line 7"]["extra"] == own
    assert found["line 2"]["index"] == 1 and found["line 2"]["text"] != "mine"
    assert set(found["line 2"]) - {"tag"} <= set(predictions._OURS)

    # What was mended is asked again, and nothing else.
    failures = lines(tmp_path / "out", "failures.jsonl")
    assert {line["id"] for line in failures} == {f"line {number}" for number in (3, 4, 6, 7, 8, 9)}
    picture(9, 9).save(photos / "missing.png")
    code, said, _ = predict(tmp_path / "out" / "failures.jsonl", "--out", tmp_path / "again", "--json")
    assert code == 0 and json.loads(said)["answered"] == 1
    again = {line["id"]: line for line in lines(tmp_path / "again")}
    assert again["line 7"]["tag"] == 6 and "error" not in again["line 7"] and again["line 7"]["extra"] == own


def test_a_data_set_and_a_pattern(predict, photos, tmp_path):
    from perceptio_hf.data.rows import import_datasets

    datasets = import_datasets()
    rows = {"image": [str(photos / "1.png"), str(photos / "0.png")], "question": ["What?", "Who?"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert predict(tmp_path / "saved", "--out", tmp_path / "a", "--spatial", "depth")[0] == 0
    first, second = sorted(lines(tmp_path / "a"), key=lambda line: line["index"])
    assert (first["question"], second["question"]) == ("What?", "Who?") and (first["width"], second["width"]) == (
        37,
        30,
    )
    assert predict(f"{photos}/[01].png", "What?", "--out", tmp_path / "b", "--spatial", "depth")[0] == 0
    assert len(lines(tmp_path / "b")) == 2


def test_results_in_the_folder_of_the_pictures(predict, photos, monkeypatch):
    monkeypatch.chdir(photos)
    for fresh in (7, 0):
        code, said, error = predict(".", QUESTION, "--spatial", "depth", "--json")
        assert code == 0 and json.loads(said)["fresh"] == fresh, error
    assert len(list((photos / "perceptio-out" / "depth").iterdir())) == 7


KILLED = """
import sys
from perceptio_hf.commands import main
sys.exit(main.run(["predict", *sys.argv[1:]]))
"""


def test_sigkill_in_the_middle_and_the_same_lines_in_the_end(predict, photos, tmp_path, tiny_folder):
    rows = [{"picture": f"photos/{index % 8}.png", "question": f"What is {index}?"} for index in range(48)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [str(tmp_path / "list.jsonl"), "--spatial", "depth", "--batch-size", "3"]
    options = ["--model", str(tiny_folder), "--max-new-tokens", "24", "--out", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *words, *options], env=environment)
    journal, patience = tmp_path / "killed" / "results.jsonl", time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    assert 4 <= done < 48
    assert predict(*words, "--out", tmp_path / "calm")[0] == 0
    # It was missing: later runs keep to the order of the first, and answer it at last.
    picture(9, 9).save(photos / "7.png")
    failed = sum("error" in line for line in lines(tmp_path / "killed"))
    code, said, _ = predict(*words, "--out", tmp_path / "killed", "--json")
    assert code == 0 and json.loads(said)["fresh"] == 48 - done + failed
    calm, killed = lines(tmp_path / "calm"), lines(tmp_path / "killed")
    mended = [line["index"] for line in calm if "error" in line]
    assert len(mended) == 6 and not any("error" in line for line in killed)
    assert [line for line in killed if line["index"] not in mended] == [line for line in calm if "error" not in line]
    for line in calm:
        if "error" not in line:
            one, other = (tmp_path / name / line["depth"] for name in ("killed", "calm"))
            assert one.read_bytes() == other.read_bytes()


def test_a_picture_that_was_replaced_is_answered_once_more(predict, photos, tmp_path):
    words = (photos, QUESTION, "--spatial", "depth", "--json", "--out", tmp_path / "out")
    assert predict(*words)[0] == 0
    before = {line["id"]: line for line in lines(tmp_path / "out")}
    assert json.loads(predict(*words)[1])["fresh"] == 0
    picture(70, 30, seed=5).save(photos / "2.png")
    code, said, _ = predict(*words)
    after = {line["id"]: line for line in lines(tmp_path / "out")}
    assert code == 0 and json.loads(said)["fresh"] == 1 and after.keys() == before.keys()
    assert (after["2.png"]["width"], after["2.png"]["height"]) == (70, 30)
    assert all(after[name] == before[name] for name in before if name != "2.png")
    assert json.loads(predict(*words)[1])["fresh"] == 0


def test_results_of_other_questions_settings_or_weights_are_never_mixed(predict, photos, tmp_path):
    out = tmp_path / "out"
    first = (photos, QUESTION, "--spatial", "depth", "--out", out)
    assert predict(*first)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for other in (
        (photos, "What?", "--spatial", "depth", "--out", out),
        (photos, QUESTION, "--spatial", "none", "--out", out),
        (photos, QUESTION, "--spatial", "depth", "--out", out, "--dtype", "bfloat16"),
    ):
        code, _, error = predict(*other)
        assert code == 2 and "--overwrite" in error and len(error.splitlines()) == 1
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    code, said, _ = predict(*first, "--batch-size", 1, "--json")
    assert code == 0 and json.loads(said)["fresh"] == 0, "another batch size gives the same lines"
    assert predict(photos, QUESTION, "--spatial", "none", "--out", out, "--overwrite")[0] == 0
    assert not any((out / "depth").iterdir()), "depth of results that are gone"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["PHOTOS"], "Nothing is asked"),
        (["PHOTOS", " "], "question is empty"),
        (["PHOTOS", "PHOTOS/0.png"], "add the question"),
        (["PHOTOS/*.tiff", "What?"], "No file matches"),
        (["missing.jsonl"], "There is no file missing.jsonl"),
        (["PHOTOS", "What?", "--spatial", "depth", "--max-new-tokens", "3"], "3 tokens"),
        (["PHOTOS", "What?", "--workers", "2"], "--engine ray"),
        (["PHOTOS", "What?", "--address", "auto"], "--engine ray"),
        (["PHOTOS", "What?", "--load-in", "2bit"], "'2bit' is not one of"),
    ],
)
def test_mistakes_are_one_line(tiny_folder, photos, tmp_path, capsys, words, says):
    words = [word.replace("PHOTOS", str(photos)) for word in words]
    assert main.run(["predict", *words, "--model", str(tiny_folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and says in error


HOLD = """
import sys, time
from perceptio_hf.files import in_use
with in_use(sys.argv[1], "x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_files_of_others_are_not_taken_for_old_results(predict, photos, tmp_path):
    """A data set's own depth, whose names may look like ours, and a list that is read."""
    (photos.parent / "depth").mkdir()
    picture(4, 4).save(photos.parent / "depth" / "000001.png")
    code, _, error = predict(photos, QUESTION, "--spatial", "none", "--out", photos.parent)
    assert code == 2 and "depth is there, and results would replace it" in error
    assert (photos.parent / "depth" / "000001.png").is_file()
    for name in ("failures.jsonl", "results.jsonl"):
        (photos / name).write_text(json.dumps({"picture": "0.png", "question": QUESTION}) + "\n")
        code, _, error = predict(photos / name, "--spatial", "none", "--out", photos, "--overwrite")
        assert code == 2 and f"{name} is there, and results would replace it" in error
        assert (photos / name).is_file()


def test_a_run_that_answers_nothing_says_where_the_reasons_are(predict, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"picture": "gone.png", "question": "What?"}')
    code, _, error = predict(tmp_path / "list.jsonl", "--out", tmp_path / "out")
    assert code == 2 and "no picture was answered" in error
    assert "There is no picture" in (tmp_path / "out" / "failures.jsonl").read_text()


def test_two_runs_into_one_folder(predict, photos, tmp_path):
    pytest.importorskip("fcntl", reason="locks are those of POSIX")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        holder.stdout.readline()
        code, _, error = predict(photos, QUESTION, "--out", tmp_path / "out")
        assert code == 2 and "is in use by process" in error
    finally:
        holder.kill()
        holder.wait()


def test_where_memory_does_not_suffice_for_a_batch_its_halves_are_tried(photos, model, processor):
    from perceptio_hf.bulk.items import list_items
    from perceptio_hf.evaluation.run.predictions import Predictor, ask_of_all

    items = ask_of_all(list_items([str(photos)]), QUESTION, "depth")
    rows = []

    class Narrow:
        """The model on a machine that holds two rows, and no picture of 72 pixels."""

        device = model.device

        def generate(self, **inputs):
            rows.append(len(inputs["input_ids"]))
            if rows[-1] > 2 or 72 in inputs["original_sizes"]:
                raise torch.OutOfMemoryError("no memory")
            return model.generate(**inputs)

    expected = Predictor(model, processor, 24)
    expected = [result.record for result in expected.work(items, expected.read(items))]
    narrow = Predictor(Narrow(), processor, 24)
    found = [result.record for result in narrow.work(items, narrow.read(items))]
    assert rows[:3] == [7, 3, 1] and found[:6] == expected[:6]
    assert "not enough memory" in found[6]["error"]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantised_weights(photos, tmp_path, capsys, load_in):
    pytest.importorskip("bitsandbytes")
    from perceptio_hf import tiny_checkpoint
    from perceptio_hf.commands import checkpoints

    words = [str(photos / "0.png"), "How deep?", "--load-in", load_in, "--spatial", "depth", "--device", "cpu"]
    assert main.run(["predict", *words, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    model, _ = checkpoints.load(tiny_checkpoint(), "cpu", "auto", load_in)
    assert type(model.model.language_model.layers[0].mlp.down_proj) is not torch.nn.Linear
    assert model.device.type == "cpu"
