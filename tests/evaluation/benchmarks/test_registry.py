"""What may be asked for, and the table of prompts."""

import re
import string
from pathlib import Path

import pytest
from evaluation.published_formats import scenes_of, write_hardblink

from perceptio_hf.evaluation.benchmarks import BENCHMARKS, PROMPTS, open_benchmark
from perceptio_hf.evaluation.benchmarks.prompts import ask, named_letters


def test_every_benchmark_has_a_prompt_with_its_source():
    assert PROMPTS.keys() == BENCHMARKS.keys()
    known = {"expression", "question", "hint", "options"}
    for prompt in PROMPTS.values():
        assert {name for _, name, _, _ in string.Formatter().parse(prompt.template) if name} <= known
        assert prompt.source


def test_braces_in_data_are_words():
    assert ask("refcoco", expression="{size} {0}") == "Please segment {size} {0} in this image."


def test_named_letters():
    assert named_letters(("A", "B", "C")) == "A, B or C" and named_letters("AB") == "A or B"


def test_limit_and_where_the_prompt_is_recorded(tmp_path):
    write_hardblink(tmp_path, scenes_of(range(4)))
    read, few = (open_benchmark("hardblink", tmp_path, limit=limit) for limit in (None, 2))
    assert [sample.id for sample in few.samples] == [sample.id for sample in read.samples[:2]]
    assert few.data_hash != read.data_hash
    assert read.prompt == PROMPTS["hardblink"].template and read.split == "all" and read.notes == ()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("nonsense",), {}, r"no benchmark 'nonsense'; choose from refcoco, "),
        (("hardblink",), {}, r"hardblink needs a path: the published folder"),
        (("hardblink", "/nowhere/at/all"), {}, r"There is no /nowhere/at/all; hardblink needs the published folder"),
        (("world-depth", "/tmp"), {}, r"world-depth is rendered and takes no path"),
        (("world-depth",), {"split": "val"}, r"world-depth has no splits"),
        (("world-depth",), {"limit": 0}, r"limit is 0; it must be 1 or more"),
        (("world-depth",), {"unit": "mm"}, r"for the benchmark `depth` only"),
        (("world-depth",), {"on_error": "ignore"}, r"on_error is 'ignore'; use raise or skip"),
    ],
)
def test_bad_requests(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        open_benchmark(*arguments, **options)


def test_nothing_left(tmp_path):
    write_hardblink(tmp_path, scenes_of(range(4)), numbers=(3,))
    for picture in (tmp_path / "images").rglob("*.png"):
        picture.unlink()
    with pytest.raises(ValueError, match=r"hardblink, split all: no sample can be used. left out question 0"):
        open_benchmark("hardblink", tmp_path, on_error="skip")


def test_the_guide_runs_and_names_every_benchmark(capsys):
    text = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    printed = capsys.readouterr().out
    assert all(f"`{name}`" in text and f"{name}: " in printed for name in BENCHMARKS)
    assert printed.endswith("(128, 128)\n")
