"""The metric scripts: loaded by path, fed in every way, and the same as the functions of the package."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from perceptio_hf.data.run_length import encode_mask, read_counts
from perceptio_hf.evaluation.metrics.depth import mean_depth_metrics
from perceptio_hf.evaluation.metrics.multiple_choice import multiple_choice_accuracy
from perceptio_hf.evaluation.metrics.relative_depth import relative_depth_accuracy
from perceptio_hf.evaluation.metrics.segmentation import referring_segmentation
from perceptio_hf.extras import how_to_install

evaluate = pytest.importorskip("evaluate", reason="evaluate comes with the extra eval")

METRICS = Path(__file__).parents[2] / "metrics"
NAMES = ["depth_estimation", "multiple_choice", "referring_segmentation", "relative_depth_accuracy"]


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


@pytest.fixture
def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((11, 7)) < share for share in (0.0, 0.2, 0.5, 0.8, 1.0, 0.0)]


def test_the_folders_are_complete():
    assert sorted(folder.name for folder in METRICS.iterdir()) == NAMES
    for name in NAMES:
        files = {path.name for path in (METRICS / name).iterdir() if path.is_file()}
        assert files == {f"{name}.py", "README.md", "requirements.txt", "app.py"}


def test_masks_of_every_kind_may_be_mixed(load, masks):
    texts = [encode_mask(mask) for mask in masks]
    as_bytes = [{**text, "counts": text["counts"].encode()} for text in texts]
    as_lists = [{**text, "counts": read_counts(text).tolist()} for text in texts]
    expected = referring_segmentation(texts, texts[::-1])
    metric = load("referring_segmentation")
    assert metric.compute(predictions=as_lists, references=as_bytes[::-1]) == expected
    mixed = [texts[0], as_bytes[1], as_lists[2], texts[3], as_lists[4], as_bytes[5]]
    metric.add_batch(predictions=mixed[:2], references=as_lists[:3:-1])
    for prediction, reference in zip(mixed[2:5], texts[3:0:-1], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute(predictions=mixed[5:], references=mixed[:1]) == expected
    assert metric.compute(predictions=texts, references=texts[::-1], min_pixels=80) != expected


def test_masks_of_pycocotools(load, masks):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools comes with the extra dev or eval")
    encoded = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks[1:5]]
    scores = load("referring_segmentation").compute(predictions=encoded, references=encoded[::-1])
    ious = np.diag(coco.iou(encoded, encoded[::-1], [0] * 4))
    assert scores["giou"] == pytest.approx(ious.mean())
    assert scores["precision@0.5"] == pytest.approx((ious >= 0.5).mean())


def test_relative_depth_with_and_without_numbers_of_points(load):
    texts, references, points = ["(A)", "B is closest", "dunno", "D"], ["A", "(B)", "A", "B"], [3, 3, 4, 4]
    metric = load("relative_depth_accuracy")
    assert metric.compute(predictions=texts, references=references) == relative_depth_accuracy(texts, references)
    expected = relative_depth_accuracy(texts, references, points, confidence=0.9)
    metric.add_batch(predictions=texts[:3], references=references[:3], num_points=points[:3])
    metric.add(prediction=texts[3], reference=references[3], num_points=points[3])
    assert metric.compute(confidence=0.9) == expected
    assert metric.compute(predictions=texts, references=[0, 1, 0, 1], num_points=points, confidence=0.9) == expected
    assert (
        metric.compute(predictions=texts, references=["A", 1, "(A)", 1], num_points=points, confidence=0.9) == expected
    )
    assert "accuracy_3" in expected and expected["unparsable"] == 1


@pytest.mark.parametrize(
    "mask", [0.5, None, {"size": [1, 1]}, {"size": 1, "counts": [1]}, {"size": [1, 1], "counts": 1}]
)
def test_what_is_no_mask_is_refused(load, mask):
    with pytest.raises(ValueError, match="a mask is"):
        load("referring_segmentation").add(prediction=mask, reference={"size": [1, 1], "counts": [1]})


def test_a_reference_beyond_the_points_is_refused(load):
    with pytest.raises(ValueError, match="sample 1: 'E' is no right answer among 3"):
        load("relative_depth_accuracy").compute(predictions=["A", "A"], references=["A", "E"], num_points=[3, 3])


def test_multiple_choice_with_some_inputs_left_out(load):
    texts, references = ["A", "the dog", "C", "cat"], ["A", "A", "B", "A"]
    columns = {
        "choices": [["cat", "dog"], ["dog", "cat"], [], ["cat", "dog"]],
        "index": [0, 1_000_000, 1, 1_000_001],
        "category": ["x", "x", "", ""],
    }
    metric = load("multiple_choice")
    expected = multiple_choice_accuracy(texts, references, **columns)
    assert metric.compute(predictions=texts, references=references, **columns) == expected
    assert expected["circular_accuracy"] == 0.5 and list(expected["by_category"]) == ["x"]
    for row in range(4):
        metric.add(
            prediction=texts[row], reference=references[row], **{name: values[row] for name, values in columns.items()}
        )
    assert metric.compute() == expected
    plain = metric.compute(predictions=texts, references=[0, 0, 1, 0])
    assert plain == multiple_choice_accuracy(texts, references) and plain["unparsable"] == 2


def test_depth_of_pictures_of_several_sizes(load):
    rng = np.random.default_rng(0)
    references = [rng.uniform(1, 5, size) for size in ((5, 7), (3, 2), (4, 4))]
    references[0][0, :3] = [0, np.nan, np.inf]
    predictions = [1 / (z + rng.random(z.shape)) for z in references]
    predictions[0] = np.nan_to_num(predictions[0])
    valid = [rng.random(z.shape) < 0.7 for z in references[:2]] + [None]
    as_single = [[array.astype(np.float32) for array in arrays] for arrays in (predictions, references)]
    metric = load("depth_estimation")
    whole = metric.compute(predictions=predictions, references=references)
    assert whole == pytest.approx(mean_depth_metrics(*as_single))
    expected = pytest.approx(mean_depth_metrics(*as_single, valid))
    assert metric.compute(predictions=predictions, references=references, valid=valid) == expected
    for index in range(3):
        nested = predictions[index].tolist()
        metric.add(prediction=nested, reference=references[index].tolist(), valid=valid[index])
    assert metric.compute() == expected
    with pytest.raises(ValueError, match=r"a depth map is \(height, width\), not \(3,\)"):
        metric.add(prediction=[1.0, 2.0, 3.0], reference=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_score_is_an_error(load, name):
    with pytest.raises(ValueError, match=r"there are no|no picture"):
        load(name).compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="both needed"):
        load(name).add_batch(predictions=["A"])


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_input_is_refused(load, name):
    example = runpy.run_path(str(METRICS / name / "app.py"))["EXAMPLE"]
    with pytest.raises(ValueError, match="Bad inputs"):
        load(name).add_batch(**example, weights=[1.0])


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_page_and_combined_metrics(load, name):
    example = runpy.run_path(str(METRICS / name / "app.py"))["EXAMPLE"]
    metric = load(name)
    scores = metric.compute(**example)
    assert evaluate.combine([metric]).compute(**example) == scores and scores


@pytest.mark.parametrize("name", NAMES)
def test_the_card_and_its_example(name, monkeypatch, capsys):
    monkeypatch.chdir(METRICS.parent)
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    head = card.split("---")[1]
    assert "sdk: gradio" in head and "- evaluate\n- metric" in head and "app_file: app.py" in head
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(compile(code, name, "exec"), {})
    promised = [line.split("#")[1].strip() for line in code.splitlines() if line.startswith("print")]
    assert capsys.readouterr().out.splitlines() == promised and promised


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_every_score(load, name):
    example = runpy.run_path(str(METRICS / name / "app.py"))["EXAMPLE"]
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    for key in load(name).compute(**example):
        key = re.sub(r"_\d(?=_|$)", "_N", key)
        assert f"`{key}`" in card or key.startswith("precision@"), key


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "perceptio_hf", None)
    with pytest.raises(ImportError, match=re.escape("pip install perceptio-hf[eval]")):
        evaluate.load(str(METRICS / "multiple_choice"), cache_dir=str(tmp_path))


def test_the_page_without_gradio_says_what_to_install(monkeypatch):
    from perceptio_hf.evaluation.metrics.widget import metric_interface

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape(how_to_install("app,eval"))):
        metric_interface(METRICS / "multiple_choice", {})


def test_the_page_computes():
    pytest.importorskip("gradio", reason="gradio comes with the extra app")
    import json

    from perceptio_hf.evaluation.metrics.widget import metric_interface

    example = runpy.run_path(str(METRICS / "depth_estimation" / "app.py"))["EXAMPLE"]
    page = metric_interface(METRICS / "depth_estimation", example)
    assert page.fn(json.dumps(example))["images"] == 1
