"""HardBLINK as it was published with AURORA (Bigverdi et al. 2024, "Perception Tokens Enhance Visual Reasoning").

FOLDER/questions/blink_3pointscenter_questions.jsonl    {"question_id": 0, "image": "0.png", "text": "..."}
FOLDER/answers/blink_3pointscenter_answers.jsonl        {"question_id": 0, "text": "(A)"}
FOLDER/images/blink3pointscenter/0.png
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from perceptio_hf.evaluation.metrics.answer_parsing import reference_letter
from perceptio_hf.evaluation.metrics.answer_statements import LETTERS

from .prompts import ask
from .reading import Faults, Request
from .registration import Prompt, benchmark
from .sample import PictureSource, Sample

_QUESTIONS = re.compile(r"blink_(\d+)(points\w*)_questions\.jsonl")


@benchmark(
    "hardblink",
    "HardBLINK: which of 3 to 5 marked points is the closest to the camera",
    files="the published folder with questions/, answers/ and images/",
    prompt=Prompt("{question}", "the published question, as AURORA asks it"),
    hub=("hardblink", "HardBLINK"),
    task="relative_depth",
    spatial="depth",
    splits=("all", "3", "4", "5"),
)
def read_hardblink(request: Request) -> Iterator[Sample]:
    """Questions in order of the number of points; the split is that number, or "all".

    Raises:
        ValueError: for a folder without questions, a question without answer or picture and the reverse, or two
            questions with one number.
    """
    folder, found = request.path, _question_files(request.path)
    if request.split != "all":
        found = [item for item in found if str(item[0]) == request.split]
    if not found:
        known = ", ".join(str(points) for points, _ in _question_files(folder)) or "none"
        raise ValueError(
            f"{folder} has no questions of the split {request.split!r} (numbers of points there: {known}); expected "
            "questions/blink_3pointscenter_questions.jsonl and so on, as published with AURORA."
        )
    for points, kind in found:
        yield from _read_set(folder, points, kind, request)


def _question_files(folder: Path) -> list[tuple[int, str]]:
    """(number of points, rest of the name) of every file with questions."""
    matches = (_QUESTIONS.fullmatch(file.name) for file in (folder / "questions").glob("*.jsonl"))
    return sorted((int(match[1]), match[2]) for match in matches if match)


def _read_set(folder: Path, points: int, kind: str, request: Request) -> Iterator[Sample]:
    name = f"blink{points}{kind}"
    faults, pictures = request.faults, folder / "images" / name
    questions = _by_number(folder / "questions" / f"blink_{points}{kind}_questions.jsonl", ("image", "text"), faults)
    answers = _by_number(folder / "answers" / f"blink_{points}{kind}_answers.jsonl", ("text",), faults)
    _check_files(pictures, questions, answers, faults)
    letters = list(LETTERS[:points])
    for number, question in questions.items():
        with faults.item(f"question {number} of {name}"):
            answer = _answer(answers.get(number), points)
            file = pictures / question["image"]
            if not file.is_file():
                raise ValueError(f"there is no picture {file}; complete the folder.")
            target = {"answer": answer, "choices": letters, "points": points}
            picture = PictureSource(f"{name}/{question['image']}", file)
            yield Sample(f"{name}/{number}", picture, ask(request.name, question=question["text"]), target)


def _check_files(pictures: Path, questions: dict, answers: dict, faults: Faults) -> None:
    """Answers without questions and pictures without questions; the reverse is found question by question."""
    if not pictures.is_dir():
        raise ValueError(f"There is no folder {pictures} with the pictures of these questions.")
    spare = [f"answer {number}" for number in answers if number not in questions]
    named = {question["image"] for question in questions.values()}
    spare += [str(file) for file in sorted(pictures.glob("*.png")) if file.name not in named]
    for item in spare:
        faults.report(item, "there is no question for it.")


def _answer(row: dict | None, points: int) -> str:
    if row is None:
        raise ValueError("it has no answer; complete the file of answers.")
    return reference_letter(row["text"], points)


def _by_number(file: Path, keys: tuple[str, ...], faults: Faults) -> dict[int, dict]:
    """The lines of a file by their `question_id`."""
    if not file.is_file():
        raise ValueError(f"There is no {file}; HardBLINK needs it beside the other files.")
    rows: dict[int, dict] = {}
    for line_number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            with faults.item(f"{file}, line {line_number}"):
                row = _parsed(line, keys)
                if row["question_id"] in rows:
                    raise ValueError(f"question_id {row['question_id']} occurs twice.")
                rows[row["question_id"]] = row
    return rows


def _parsed(line: str, keys: tuple[str, ...]) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error}).") from None
    texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
    if not texts or not isinstance(row.get("question_id"), int):
        raise ValueError(f"a line has a number question_id and the texts {', '.join(keys)}; found {line[:80]}.")
    return row
