"""`perceptio eval`: published formats through a model to scores, and what it refuses."""

import json
import re

import numpy as np
import pytest
from evaluation import published_formats as formats
from PIL import Image

from perceptio_hf.commands import main
from perceptio_hf.data.run_length import decode_mask
from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS
from perceptio_hf.hub.card import read_results


@pytest.fixture(scope="module")
def scenes():
    return formats.scenes_of(range(5, 12))[:4]


@pytest.fixture
def evaluate(tiny_folder, capsys):
    """Runs the command; gives exit code, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        limit = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "24"]
        code = main.run(["eval", *map(str, arguments), "--model", str(tiny_folder), *limit])
        return code, *capsys.readouterr()

    return run


def true_mask(annotation: dict, size: int) -> np.ndarray:
    """An object of instances.json as pycocotools draws it."""
    tools = pytest.importorskip("pycocotools.mask")
    segments = annotation["segmentation"]
    if isinstance(segments, dict):
        return tools.decode(tools.frPyObjects(segments, size, size)).astype(bool)
    return tools.decode(tools.merge(tools.frPyObjects(segments, size, size))).astype(bool)


def test_refcoco_as_published_gives_the_ciou_of_its_masks(evaluate, tmp_path, scenes):
    """cIoU against pixels counted here, from the objects that the sentences name."""
    formats.write_refcoco(tmp_path / "data", scenes)
    instances = json.loads((tmp_path / "data" / "instances.json").read_text())
    objects = {item["id"]: item for item in instances["annotations"]}
    code, out, _ = evaluate("refcoco", "--data", tmp_path / "data", "--out", tmp_path / "out", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == summary["samples"] >= 4
    common = union = 0
    for row in rows:
        named = int(re.search(r"thing (\d+)", row["question"])[1])
        predicted, true = decode_mask(row["mask"]), true_mask(objects[named], formats.SIZE)
        common, union = common + (predicted & true).sum(), union + (predicted | true).sum()
    assert summary["scores"]["ciou"] == pytest.approx(common / union)


def test_hardblink_as_published_with_all_replacements_but_the_oracle(evaluate, tmp_path, scenes):
    right = formats.write_hardblink(tmp_path / "data", scenes)
    names = "identity,random,other-image,first-repeat"
    arguments = ("hardblink", "--data", tmp_path / "data", "--out", tmp_path / "out", "--batch-size", 3)
    code, out, _ = evaluate(*arguments, "--replace-depth", names)
    assert code == 0
    assert re.search(r"^accuracy +\d\.\d{3} +\d\.\d{3} +\d\.\d{3}$", out, re.MULTILINE), "model, chance, majority"
    assert "Published" in out and "Qwen2.5-VL-3B: identity 71.2, oracle 80.6, random 51.3, constant 58.9" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["samples"] == len(right) and set(summary["replacement"]["replacements"]) == set(names.split(","))
    with Image.open(tmp_path / "out" / "cases.png") as sheet:
        assert sheet.width > 1000
    code, _, error = evaluate(*arguments, "--replace-depth", "oracle")
    assert code == 2 and "--oracle" in error and "blink" in error


def test_all_replacements_are_those_that_can_be_had(evaluate, tmp_path, scenes):
    """HardBLINK knows no true depth; with one picture there is no other."""
    formats.write_hardblink(tmp_path / "data", scenes)
    arguments = ("hardblink", "--data", tmp_path / "data", "--replace-depth", "all")
    assert evaluate(*arguments, "--out", tmp_path / "some")[0] == 0
    summary = json.loads((tmp_path / "some" / "summary.json").read_text())
    assert set(summary["replacement"]["replacements"]) == set(REPLACEMENTS) - {"oracle"}
    assert any("the replacement oracle: no true depth of blink" in line for line in summary["left_out"])
    code, out, _ = evaluate(*arguments, "--out", tmp_path / "one", "--limit", 1)
    assert (
        code == 0 and "left out the replacement oracle" in out and "left out the replacement other-image: 1 of" in out
    )
    code, out, _ = evaluate("world-closest", "--limit", 4, "--replace-depth", "all", "--out", tmp_path / "w", "--json")
    assert code == 0 and set(json.loads(out)["replacement"]["replacements"]) == set(REPLACEMENTS)


def test_a_card_collects_benchmarks(evaluate, tmp_path):
    for name in ("world-depth", "world-plain"):
        assert evaluate(name, "--limit", 2, "--out", tmp_path / "card.yaml")[0] == 0
        assert (tmp_path / "card" / name / "summary.json").is_file()
    assert {item.dataset_config for item in read_results(tmp_path / "card.yaml")} == {"world-depth", "world-plain"}


def test_a_second_run_changes_nothing_and_another_is_refused(evaluate, tmp_path):
    arguments = ("world-plain", "--out", tmp_path / "out")
    assert evaluate(*arguments, "--limit", 3)[0] == 0
    lines = (tmp_path / "out" / "samples.jsonl").read_bytes()
    code, out, _ = evaluate(*arguments, "--limit", 3, "--json")
    assert code == 0 and json.loads(out)["time"]["answered"] == 0
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == lines
    code, _, error = evaluate(*arguments, "--limit", 2)
    assert code == 2 and "another data" in error and "--overwrite" in error
    code, _, error = evaluate(*arguments, "--limit", 3, "--spatial", "depth")
    assert code == 2 and "another spatial" in error
    assert evaluate(*arguments, "--limit", 2, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == b"".join(lines.splitlines(keepends=True)[:2])


def test_broken_rows_of_a_table_are_left_out_when_asked(evaluate, tmp_path, scenes):
    rows = formats.mmbench_rows(scenes)
    first = next(row for row in rows if len(row["image"]) > 20)
    first["image"] = "!" + first["image"][1:]
    formats.write_tsv(tmp_path / "mmbench.tsv", rows)
    arguments = ("mmbench", "--data", tmp_path / "mmbench.tsv", "--out", tmp_path / "out")
    code, _, error = evaluate(*arguments)
    assert code == 2 and first["index"] in error and "--on-error skip" in error and "Traceback" not in error
    code, out, _ = evaluate(*arguments, "--on-error", "skip")
    assert code == 0 and f"index {first['index']}" in out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "refcoco"),
        (["hardblink"], "needs a path"),
        (["world-plain", "--data", "."], "takes no path"),
        (["world-refer", "--replace-depth", "random"], "spatial='seg'"),
        (["world-depth", "--replace-depth", "random", "--limit", "1"], "answers in words"),
        (["world-closest", "--replace-depth", "noise"], "no replacement 'noise'"),
        (["world-plain", "--oracle", "x"], "--replace-depth"),
        (["world-plain", "--limit", "1", "--max-new-tokens", "3", "--spatial", "depth"], "for its spans"),
        (["world-plain", "--batch-size", "0"], "batch-size"),
    ],
)
def test_mistakes_get_one_line(evaluate, tmp_path, arguments, message):
    code, out, error = evaluate(*arguments, "--out", tmp_path / "out")
    assert code == 2 and message in error and not out and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_places_that_cannot_be_written_or_hold_something_else(evaluate, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, error = evaluate("world-plain", "--out", tmp_path / "file" / "out")
    assert code == 2 and "is a file" in error
    (tmp_path / "card.yaml").write_text("seed: 0")
    code, _, error = evaluate("world-plain", "--limit", 1, "--out", tmp_path / "card.yaml")
    assert code == 2 and "no card of results" in error
    assert not (tmp_path / "card").exists(), "it says so before the work"


def test_the_sheet_shows_the_cases(evaluate, tmp_path):
    assert evaluate("world-refer", "--limit", 3, "--out", tmp_path)[0] == 0
    pixels = np.asarray(Image.open(tmp_path / "cases.png").convert("RGB"))
    assert pixels.shape[1] > 2000 and pixels.std() > 30
