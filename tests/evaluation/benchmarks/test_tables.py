"""Tables of multiple-choice questions."""

import csv

import pytest
from evaluation.published_formats import CHOICES, mmbench_rows, png, scenes_of, write_tsv

from perceptio_hf.evaluation.benchmarks import open_benchmark
from perceptio_hf.evaluation.metrics.multiple_choice import multiple_choice_accuracy
from perceptio_hf.evaluation.run.scoring import read_choice


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(5))


@pytest.fixture
def rows(scenes):
    return mmbench_rows(scenes)


def opened(folder, rows, name="mmbench", **options):
    write_tsv(folder / "table.tsv", rows)
    return open_benchmark(name, folder / "table.tsv", **options)


def test_every_row_with_the_picture_of_its_question(tmp_path, scenes, rows):
    read = opened(tmp_path, rows)
    assert len(read.samples) == 4 * len(scenes) and read.task == "multiple_choice" and read.spatial == "none"
    for sample, row in zip(read.samples, rows, strict=True):
        number = int(row["index"]) % 1_000_000
        assert sample.id == row["index"] and sample.target["group"] == number
        assert sample.target["texts"] == [row[letter] for letter in "ABCD"]
        assert sample.target["answer"] == row["answer"]
        assert (sample.target["category"], sample.target["l2_category"]) == (row["category"], row["l2-category"])
        assert (sample.picture.open().tobytes()) == scenes[number - 1].image.tobytes()
    assert read.samples[0].picture is read.samples[1].picture  # kept once


def test_the_wording(tmp_path, rows):
    with_hint, without = opened(tmp_path, rows).samples[0], opened(tmp_path, rows).samples[4]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", CHOICES, strict=True))
    end = f"What color is it?\n{options}\nAnswer with the option's letter from the given choices directly."
    assert with_hint.question == f"Look at the\nlargest thing.\n{end}" and without.question == end


def test_circular_scores_come_out(tmp_path, scenes, rows):
    """Always saying "red" is right in every rotation of the questions whose answer is red, and in no other."""
    targets = [sample.target for sample in opened(tmp_path, rows).samples]
    keys = {"choices": "texts", "index": "index", "category": "category", "l2_category": "l2_category"}
    columns = {name: [target[key] for target in targets] for name, key in keys.items()}
    scores = multiple_choice_accuracy(["red"] * len(rows), [target["answer"] for target in targets], **columns)
    red = sum(scene.seed % 4 == 0 for scene in scenes) / len(scenes)
    assert scores["accuracy"] == scores["circular_accuracy"] == pytest.approx(red) and scores["unparsable"] == 0


def test_two_to_eight_choices_and_words_that_look_empty(tmp_path, rows):
    """Choices such as "None" and "NA" are words; a table reader that takes them as missing shifts the letters."""
    wide = [
        rows[0] | dict(zip("ABCDEFGH", ("None", "NA", "nan", "3", "4", "5", "6", "7"), strict=True)) | {"answer": "H"}
    ]
    target = opened(tmp_path, wide).samples[0].target
    assert target["texts"] == ["None", "NA", "nan", "3", "4", "5", "6", "7"] and target["answer"] == "H"
    narrow = [rows[0] | {"C": "", "D": "", "answer": "B"}]
    assert opened(tmp_path, narrow, "scienceqa").samples[0].target["choices"] == ["A", "B"]


@pytest.mark.parametrize("empty", ["A", "B", "AC"])
def test_choices_that_are_empty_are_not_listed_and_the_others_keep_their_letters(tmp_path, rows, empty):
    """AI2D's published table has rows without a text of A."""
    row = rows[0] | dict.fromkeys(empty, "") | {"answer": "D"}
    sample = opened(tmp_path, [row], "ai2d").samples[0]
    listed = [letter for letter in "ABCD" if letter not in empty]
    assert sample.target["choices"] == listed and sample.target["answer"] == "D"
    assert [line[0] for line in sample.question.splitlines() if line[1:3] == ". "] == listed
    assert read_choice("multiple_choice", sample.target, row["D"]) == "D"
    assert read_choice("multiple_choice", sample.target, "") is None
    assert multiple_choice_accuracy(["D"], ["D"], choices=[sample.target["texts"]])["accuracy"] == 1.0


def test_a_right_answer_that_is_empty_stays_in_the_count(tmp_path, rows):
    """As in published figures: it can be right by its letter only."""
    target = opened(tmp_path, [rows[0] | {"A": "", "answer": "A"}], "ai2d").samples[0].target
    assert read_choice("multiple_choice", target, "A") == target["answer"] == "A"
    assert read_choice("multiple_choice", target, "...") is None


def test_tables_with_fewer_columns(tmp_path, rows):
    plain = [{key: row[key] for key in ("index", "image", "question", *"ABCD", "answer")} for row in rows]
    target = opened(tmp_path, plain, "ai2d").samples[0].target
    assert target["category"] is None and target["l2_category"] is None
    with pytest.raises(ValueError, match="has no column `split`"):
        opened(tmp_path, plain, split="dev")


def test_a_split(tmp_path, rows):
    rows[0]["split"] = "test"
    assert len(opened(tmp_path, rows, split="test").samples) == 1
    with pytest.raises(ValueError, match=r"no rows of the split 'train'; it has dev, test"):
        opened(tmp_path, rows, split="train")


def test_a_picture_outside_of_the_split_is_still_found(tmp_path, rows):
    rows[0]["split"] = "test"
    assert len(opened(tmp_path, rows, split="dev").samples) == len(rows) - 1


CASES = {
    "broken base64": ({"image": "iVBOR*w0KGgo"}, r"row 1 \(index 1\): the picture of index 1 is no base64"),
    "base64 of no picture": ({"image": "aGVsbG8gd29ybGQ="}, r"row 1 .* picture of index 1 cannot be read"),
    "no picture": ({"image": ""}, r"row 1 .* the picture of index 1 is empty"),
    "several pictures": ({"image": "['aaaa', 'bbbb']"}, "it has a list of pictures"),
    "a reference to nothing": ({"image": "12345"}, "its picture is that of index 12345, where there is none"),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_pictures_are_named_and_left_out_only_if_asked(tmp_path, rows, case):
    change, message = CASES[case]
    rows[0].update(change)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, rows)
    rest = opened(tmp_path, rows, on_error="skip")
    assert len(rest.samples) == len(rows) - 4 and len(rest.notes) == 4  # its rotations have no picture either
    assert all(sample.target["group"] != 1 for sample in rest.samples)


FAULTS = {
    "a letter beyond the choices": ({"answer": "E"}, r"row 2 .*'E' is no right answer among 4 choices"),
    "no answer": ({"answer": ""}, r"row 2 .*'' is no right answer"),
    "one choice": ({"B": "", "C": "", "D": "", "answer": "A"}, "its choices are A;"),
    "no choice": ({"A": "", "B": "", "C": "", "D": "", "answer": "A"}, "its choices are missing;"),
    "an index that is no number": ({"index": "x7"}, "its index 'x7' is no number"),
    "an index that occurs twice": ({"index": "1000002"}, "1000002: this id occurs twice"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_other_faults_of_a_row(tmp_path, rows, case):
    change, message = FAULTS[case]
    rows[1].update(change)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, rows)
    assert len(opened(tmp_path, rows, on_error="skip").samples) == len(rows) - 1


def test_missing_columns(tmp_path, rows):
    for row in rows:
        del row["answer"]
    with pytest.raises(ValueError, match=r"has the columns index, .*; answer is missing"):
        opened(tmp_path, rows)


def test_other_files(tmp_path, rows):
    (tmp_path / "a.tsv").write_bytes(png(scenes_of([0])[0].image))
    with pytest.raises(ValueError, match=r"a\.tsv is not a table of tab-separated UTF-8 text"):
        open_benchmark("mmbench", tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_text("")
    with pytest.raises(ValueError, match=r"has the columns \(none\)"):
        open_benchmark("mmbench", tmp_path)
    (tmp_path / "a.tsv").write_text("index\timage\tquestion\tA\tB\tanswer\n")
    with pytest.raises(ValueError, match=r"no rows of the split 'all'; it has no rows at all"):
        open_benchmark("mmbench", tmp_path)
    write_tsv(tmp_path / "b.tsv", rows)
    with pytest.raises(ValueError, match=r"should hold one \.tsv file, it holds a\.tsv, b\.tsv"):
        open_benchmark("mmbench", tmp_path)


def test_a_row_that_breaks_off(tmp_path, rows):
    write_tsv(tmp_path / "table.tsv", rows[4:8])
    with open(tmp_path / "table.tsv", "a") as file:
        file.write("9\tWhat")
    with pytest.raises(ValueError, match=r"row 5 \(index 9\)"):
        open_benchmark("mmbench", tmp_path)


def test_the_limit_of_the_csv_module_is_left_as_it_was(tmp_path, rows):
    before = csv.field_size_limit()
    opened(tmp_path, rows)
    assert csv.field_size_limit() == before
