"""`perceptio decode`: what it writes, which lines it flags, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import encode
from PIL import Image

from perceptio_hf.commands import main
from perceptio_hf.commands.checkpoints import load
from perceptio_hf.tokens import depth_span

QUESTION = "Which object is closest?"


def decode(tiny_folder, answers: Path, *arguments) -> int:
    out = answers.parent / "out"
    return main.run(["decode", str(answers), "--model", str(tiny_folder), "--out", str(out), *map(str, arguments)])


def write(folder: Path, *rows) -> Path:
    """Lines, and the pictures a.png and b.png that they are about."""
    for name, size in (("a.png", (60, 40)), ("b.png", (30, 50))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
    answers = folder / "answers.jsonl"
    answers.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return answers


def row(text: str, picture: str = "a.png", **values) -> dict:
    return {"picture": picture, "question": QUESTION, "text": text, **values}


def results(answers: Path) -> list[dict]:
    return [json.loads(line) for line in (answers.parent / "out" / "answers.jsonl").read_text().splitlines()]


def test_writes_what_predict_writes_for_its_own_answer(tiny_folder, tmp_path, capsys):
    answers = write(tmp_path)
    arguments = [str(tmp_path / "a.png"), QUESTION, "--spatial", "seg+depth", "--model", str(tiny_folder)]
    assert main.run(["predict", *arguments, "--out", str(tmp_path / "own")]) == 0
    own = json.loads((tmp_path / "own" / "a" / "answer.json").read_text())

    model, processor = load(str(tiny_folder))
    content = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": QUESTION}]
    inputs = encode(processor, [{"role": "user", "content": content}])
    ids = model.generate(**inputs, spatial="seg+depth", do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    answers.write_text(json.dumps({"picture": "a.png", "question": QUESTION, "token_ids": ids}) + "\n")
    capsys.readouterr()
    assert decode(tiny_folder, answers) == 0
    folder = tmp_path / "out" / "a"
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "own" / "a"))
    read = json.loads((folder / "answer.json").read_text())
    assert results(answers) == [read]
    for name in ("text", "masks", "phrases", "depth_codes", "well_formed", "width", "height", "question"):
        assert read[name] == own[name], name
    np.testing.assert_allclose(read["mask_scores"], own["mask_scores"], atol=2e-4)  # both are rounded to four places
    depths = [np.asarray(Image.open(tmp_path / name / "a" / "depth.png")).astype(int) for name in ("out", "own")]
    assert np.abs(depths[0] - depths[1]).max() <= 7, "1e-4 of 65535"
    assert str(folder) in capsys.readouterr().out


def test_rows_are_flagged_one_by_one_and_the_others_go_on(tiny_folder, tmp_path, capsys):
    span = depth_span([3] * 16)
    rows = [
        row(f"[SEG]{span} near"),
        row("<DEPTH_START><DEPTH_3> far", picture="b.png"),
        row("", token_ids=[4, 999999]),
        "no JSON",
        row(f"{span} both", picture="b.png"),
        "",
        row("gone", picture="missing.png"),
        row("words"),
    ]
    answers = write(tmp_path, *rows)
    assert decode(tiny_folder, answers, "--batch-size", 3) == 0
    errors = capsys.readouterr().err.splitlines()
    for said, (number, what) in zip(
        errors,
        [(2, "broken depth span"), (3, "999999"), (4, "is not JSON"), (7, "missing.png")],
        strict=True,
    ):
        assert said.startswith(f"{answers}, line {number}: ") and what in said
    found = results(answers)
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5, 7, 8]
    assert [record["line"] for record in found if "error" in record] == [3, 4, 7]
    assert [record["line"] for record in found if record.get("well_formed") is False] == [2]
    assert [record["line"] for record in found if record.get("depth_codes")] == [1, 5]
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "a-2", "answers.jsonl", "b", "b-2"]
    assert not (tmp_path / "out" / "b" / "depth.png").exists() and (tmp_path / "out" / "b-2" / "depth.png").exists()


def test_several_pictures_of_one_answer(tiny_folder, tmp_path, capsys):
    said = f"[SEG]{depth_span([1] * 16)}[SEG][SEG]{depth_span([2] * 16)} two"
    answers = write(tmp_path, {"pictures": ["a.png", "b.png"], "question": QUESTION, "text": said})
    assert decode(tiny_folder, answers, "--json") == 0
    captured = capsys.readouterr()
    first, second = json.loads(captured.out)["answers"]
    assert captured.err == "" and results(answers) == [first, second]
    assert (first["width"], second["width"]) == (60, 30)
    assert (len(first["masks"]), len(second["masks"])) == (1, 2)
    assert first["depth_codes"] == [1] * 16 and second["depth_codes"] == [2] * 16


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no answer that can be used."),
        (["{"], "line 1: it is not JSON"),
        ([row("a", question="")], "line 1: it has no `question`"),
    ],
)
def test_a_file_without_an_answer_is_one_line(tiny_folder, tmp_path, capsys, rows, says):
    assert decode(tiny_folder, write(tmp_path, *rows)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and says in error
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(tiny_folder, tmp_path, capsys):
    answers = write(tmp_path, row("words"))
    for arguments, says in ((["--device", "gpu"], "--device gpu"), (["--out", str(answers)], "is a file")):
        assert decode(tiny_folder, answers, *arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and says in error
    assert decode(tiny_folder, tmp_path / "absent.jsonl") == 2 and "There is no file" in capsys.readouterr().err
    assert decode(tmp_path / "absent", answers) == 2 and "absent" in capsys.readouterr().err


def test_a_question_that_no_prompt_can_hold_refuses_its_line_alone(tiny_folder, tmp_path, capsys):
    """A tokenizer may have a token of one character, which cannot be taken apart."""
    from transformers import AutoProcessor

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.add_tokens(["\u2603"], special_tokens=True)
    processor.save_pretrained(checkpoint)
    answers = write(tmp_path, row("one"), row("two", question="\u2603?"), row("three"), row("", picture="none.png"))
    assert decode(checkpoint, answers) == 0
    assert [("error" in record, record["line"]) for record in results(answers)] == [
        (False, 1),
        (True, 2),
        (False, 3),
        (True, 4),
    ]
    assert "line 2: The tokenizer reads a token" in capsys.readouterr().err
