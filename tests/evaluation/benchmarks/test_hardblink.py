"""HardBLINK's folder: as written here, and as published."""

import json
import re

import pytest
from evaluation.published_formats import scenes_of, write_hardblink

from perceptio_hf.evaluation.benchmarks import open_benchmark
from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy


@pytest.fixture
def folder(tmp_path):
    write_hardblink(tmp_path, scenes_of(range(4)))
    return tmp_path


def test_every_question_with_its_answer(tmp_path):
    answers = write_hardblink(tmp_path, scenes_of(range(4)), numbers=(3, 4, 5))
    for file in tmp_path.rglob("*.jsonl"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    read = open_benchmark("hardblink", tmp_path)
    assert {sample.id: sample.target["answer"] for sample in read.samples} == answers
    assert read.spatial == "depth" and read.task == "relative_depth"
    for sample in read.samples:
        points = int(re.search(r"\d", sample.id)[0])
        assert sample.target["choices"] == list("ABCDE"[:points]) and sample.target["points"] == points
        assert sample.question == "Which point is the closest to the camera?"
        assert sample.picture.open().size == (64, 64) and sample.picture.name == f"{sample.id}.png"
    four = open_benchmark("hardblink", tmp_path, split="4")
    assert [sample.id for sample in four.samples] == [s.id for s in read.samples if s.target["points"] == 4]


def test_as_published(shared):
    read = open_benchmark("hardblink", shared / "hardblink")
    assert [sum(s.target["points"] == points for s in read.samples) for points in (3, 4, 5)] == [124, 124, 0]
    for points in (3, 4):
        file = shared / "hardblink" / "answers" / f"blink_{points}pointscenter_answers.jsonl"
        found = [f"({s.target['answer']})" for s in read.samples if s.target["points"] == points]
        assert found == [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert all("closest to the camera?" in sample.question for sample in read.samples)
    assert min(read.samples[130].picture.open().size) > 100
    targets = [sample.target for sample in read.samples]
    right = relative_depth_accuracy(
        [f"({target['answer']})" for target in targets],
        [target["answer"] for target in targets],
        [target["points"] for target in targets],
    )
    assert right["accuracy"] == 1.0 and right["samples_4"] == 124


def rewrite(file, change) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


ANSWERS, QUESTIONS = "answers/blink_3pointscenter_answers.jsonl", "questions/blink_3pointscenter_questions.jsonl"
CASES = {
    "a picture is missing": (
        lambda folder: (folder / "images/blink3pointscenter/1.png").unlink(),
        r"question 1 of blink3pointscenter: there is no picture .*1\.png",
    ),
    "a picture without question": (
        lambda folder: (folder / "images/blink3pointscenter/99.png").touch(),
        r"99\.png: there is no question for it",
    ),
    "a question without answer": (
        lambda folder: rewrite(folder / ANSWERS, lambda rows: rows.pop(0)),
        "question 0 of blink3pointscenter: it has no answer",
    ),
    "an answer without question": (
        lambda folder: rewrite(folder / ANSWERS, lambda rows: rows.append({"question_id": 77, "text": "(A)"})),
        "answer 77: there is no question for it",
    ),
    "a letter beyond the points": (
        lambda folder: rewrite(folder / ANSWERS, lambda rows: rows[1].update(text="(D)")),
        r"question 1 of .*'\(D\)' is no right answer among 3 choices; give A to C",
    ),
    "a question twice": (
        lambda folder: rewrite(folder / QUESTIONS, lambda rows: rows.append(rows[0])),
        r"questions\.jsonl, line \d+: question_id 0 occurs twice",
    ),
    "a line that is no JSON": (
        lambda folder: (folder / QUESTIONS).open("a").write('{"question_id": 5'),
        r"questions\.jsonl, line \d+: it is not JSON",
    ),
    "a line without text": (
        lambda folder: rewrite(folder / ANSWERS, lambda rows: rows.append({"question_id": 5})),
        r"answers\.jsonl, line \d+: a line has a number question_id and the texts text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_single_faults_are_named_and_can_be_left_out(folder, case):
    spoil, message = CASES[case]
    whole = open_benchmark("hardblink", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_benchmark("hardblink", folder)
    rest = open_benchmark("hardblink", folder, on_error="skip")
    assert len(whole.samples) - 1 <= len(rest.samples) <= len(whole.samples) and rest.notes


def test_missing_files(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no questions of the split '4' \(numbers of points there: 3, 5\)"):
        open_benchmark("hardblink", folder, split="4")
    (folder / ANSWERS).unlink()
    with pytest.raises(ValueError, match=rf"There is no .*{ANSWERS}"):
        open_benchmark("hardblink", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"numbers of points there: none"):
        open_benchmark("hardblink", tmp_path / "empty")
