"""Multiple choice in VLMEvalKit's tables: MMBench, ScienceQA, AI2D.

One row is one question: `index`, `image` (base64), `question`, `hint`, `A`, `B`, ..., `answer`, `category`,
`l2-category`, `split`. A picture is given once; rows that ask about it again hold the index of its row instead. In
MMBench the rotated copies of a question have its index plus multiples of one million.

A choice that is empty is not listed, as VLMEvalKit lists none, and the others keep their letters. Where the right
answer is empty, the row stays, as it does in published figures: it can only be right by its letter.
"""

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perceptio_hf.evaluation.metrics.answer_parsing import reference_letter
from perceptio_hf.evaluation.metrics.answer_statements import LETTERS
from perceptio_hf.evaluation.metrics.multiple_choice import INDEX_PERIOD

from .prompts import ask, listed_options
from .reading import Request
from .registration import Prompt, benchmark
from .sample import PictureSource, Sample

_NEEDED = ("index", "image", "question", "A", "B", "answer")


_FILES = "VLMEvalKit's table {name}.tsv, pictures in base64"
_CHOOSE = Prompt(
    "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "InternVL's prompt for multiple choice in VLMEvalKit; the hint, if any, stands on a line of its own",
)


@benchmark(
    "ai2d",
    "AI2D: multiple choice about diagrams",
    files=_FILES.format(name="AI2D_TEST"),
    prompt=_CHOOSE,
    hub=("ai2d", "AI2D"),
    task="multiple_choice",
    spatial="none",
    splits=("all",),
)
@benchmark(
    "scienceqa",
    "ScienceQA: multiple choice, questions with a picture",
    files=_FILES.format(name="ScienceQA_TEST"),
    prompt=_CHOOSE,
    hub=("scienceqa", "ScienceQA"),
    task="multiple_choice",
    spatial="none",
    splits=("all",),
)
@benchmark(
    "mmbench",
    "MMBench: multiple choice, with the rotated copies of each question",
    files=_FILES.format(name="MMBench_DEV_EN"),
    prompt=_CHOOSE,
    hub=("mmbench", "MMBench"),
    task="multiple_choice",
    spatial="none",
    splits=("all", "dev"),
)
def read_tsv(request: Request) -> Iterator[Sample]:
    """The rows of a table in order, those of the split where one is given.

    Raises:
        ValueError: for another kind of file, missing columns, a split without rows, and rows that cannot be used.
    """
    file = _table_file(request.path)
    rows = _rows(file)
    pictures = _Pictures(rows)
    for number, row in _of_split(rows, request.split, file):
        with request.faults.item(f"{file.name}, row {number} (index {row['index']})"):
            yield _sample(request.name, row, pictures)


def _table_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.tsv"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise ValueError(f"{path} should hold one .tsv file, it holds {found}; name the file.")
    return files[0]


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """(number from 1 without the header, row); what is left empty is "" or None."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines, _long_fields():
            reader = csv.DictReader(lines, delimiter="\t")
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{file} has the columns {', '.join(reader.fieldnames or ['(none)'])}; {', '.join(missing)} is "
                    "missing. Take VLMEvalKit's table, tab-separated, of a part whose answers are public."
                )
            return list(enumerate(reader, 1))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a table of tab-separated UTF-8 text ({error}).") from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module stops at 128 KiB a field; a picture is longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _of_split(rows: list[tuple[int, dict]], split: str | None, file: Path) -> list[tuple[int, dict]]:
    if split == "all" or split is None:
        chosen = rows
    elif rows and "split" not in rows[0][1]:
        raise ValueError(f"{file} has no column `split`; leave out the split {split!r}.")
    else:
        chosen = [(number, row) for number, row in rows if row["split"] == split]
    if not chosen:
        known = ", ".join(sorted({str(row.get("split")) for _, row in rows})) or "no rows at all"
        raise ValueError(f"{file} has no rows of the split {split!r}; it has {known}.")
    return chosen


class _Pictures:
    """The pictures of a table by the index of their row; each is decoded from base64 once."""

    def __init__(self, rows: list[tuple[int, dict]]):
        self._texts: dict[str, str] = {}
        for _, row in rows:
            self._texts.setdefault(row["index"], (row["image"] or "").strip())
        self._known: dict[str, PictureSource] = {}

    def of(self, index: str) -> PictureSource:
        text = self._texts[index]
        owner = text if text.isdigit() else index
        if owner not in self._texts or self._texts[owner].isdigit():
            raise ValueError(f"its picture is that of index {owner}, where there is none; take the whole table.")
        if owner not in self._known:
            self._known[owner] = self._decoded(owner)
        return self._known[owner]

    def _decoded(self, index: str) -> PictureSource:
        text = self._texts[index]
        if not text:
            raise ValueError(f"the picture of index {index} is empty.")
        if text.startswith("["):
            raise ValueError("it has a list of pictures; questions about one picture are read.")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"the picture of index {index} is no base64 ({error}); copy the table again.") from None
        picture = PictureSource(f"picture of index {index}", data)
        picture.size()  # base64 of something else shows here
        return picture


def _sample(benchmark: str, row: dict[str, str], pictures: _Pictures) -> Sample:
    if not str(row["index"]).isdigit():
        raise ValueError(f"its index {row['index']!r} is no number.")
    texts = [(row.get(letter) or "").strip() for letter in LETTERS]
    texts = texts[: max((place for place, text in enumerate(texts, 1) if text), default=0)]
    letters = [letter for letter, text in zip(LETTERS, texts, strict=False) if text]  # of AI2D's rows some have no A
    if len(letters) < 2:
        raise ValueError(f"its choices are {', '.join(letters) or 'missing'}; there should be two or more.")
    hint = (row.get("hint") or "").strip()
    question = ask(
        benchmark,
        hint=f"{hint}\n" if hint else "",
        question=(row["question"] or "").strip(),
        options=listed_options(letters, [text for text in texts if text]),
    )
    index = int(row["index"])
    target = {
        "answer": reference_letter(row["answer"] or "", len(texts)),
        "choices": letters,
        "texts": texts,
        "category": row.get("category") or None,
        "l2_category": row.get("l2-category") or None,
        "index": index,
        "group": index % INDEX_PERIOD,
    }
    return Sample(str(index), pictures.of(row["index"]), question, target)
