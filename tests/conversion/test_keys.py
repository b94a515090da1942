"""Maps of tensor names, reports and strict loading."""

import json

import pytest
import torch
from torch import nn

from perceptio_hf.conversion.keys import ConversionReport, KeyMap, fill_model, refusal, require

RENAMES = [(r"old\.(\d+)\.w", r"new.\1.weight"), (r"old\.(\d+)\.b", r"new.\1.bias")]


def source(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"old.0.w": torch.ones(3, 2), "old.0.b": torch.arange(3.0), "video.x": torch.zeros(1)}
    return {**tensors, **{name.replace("_", "."): tensor for name, tensor in changes.items()}}


def convert(tensors: dict[str, torch.Tensor], report: ConversionReport, **options) -> nn.ModuleDict:
    model = nn.ModuleDict({"new": nn.ModuleList([nn.Linear(2, 3)])})
    renamed = KeyMap(RENAMES, {r"video\..+": "only for videos"}).apply(tensors, report)
    fill_model(model, renamed, report, "an example", **options)
    return model


def test_tensors_arrive_under_their_new_names_and_the_report_says_so():
    report = ConversionReport("x.pt")
    model = convert(source(), report)
    assert torch.equal(model["new"][0].weight, torch.ones(3, 2))
    assert torch.equal(model["new"][0].bias, torch.arange(3.0))
    assert report.mapped == {"old.0.w": "new.0.weight", "old.0.b": "new.0.bias"}
    assert report.ignored == {"only for videos": ["video.x"]}
    assert report.num_read == 3


def test_the_report_as_json():
    report = ConversionReport("x.pt", layout="an example", added={"new.1": "zeros"}, notes=["a note"])
    convert(source(), report)
    document = json.loads(json.dumps(report.as_dict()))
    assert (document["read"], document["mapped"]) == (3, 2)
    assert document["ignored"] == [{"why": "only for videos", "count": 1, "names": ["video.x"]}]
    assert document["added"] == {"new.1": "zeros"} and document["notes"] == ["a note"]


def test_the_first_rule_that_matches_the_whole_name_decides():
    names = KeyMap([(r"a\.(.)", r"first.\1"), (r"a\..+", "second")])
    assert [names.rename(name) for name in ("a.b", "a.bc", "xa.b", "a.")] == ["first.b", "second", None, None]


def test_two_names_for_one_are_refused():
    with pytest.raises(ValueError, match=r"x\.pt holds both a\.1 and a\.2, which would both become b"):
        KeyMap([(r"a\..", "b")]).apply({"a.1": torch.ones(1), "a.2": torch.ones(1)}, ConversionReport("x.pt"))


def test_unexpected_missing_and_misshapen_tensors_are_named_as_the_source_calls_them():
    tensors = source(old_0_b=torch.ones(4), other=torch.ones(1), another=torch.ones(1))
    tensors.pop("old.0.w")
    with pytest.raises(ValueError) as error:
        convert(tensors, ConversionReport("x.pt"))
    assert str(error.value) == (
        "x.pt is not an example: unexpected other (and 1 more); missing new.0.weight; "
        "wrong old.0.b is (4,), expected (3,)."
    )


def test_renamed_tensors_that_the_model_lacks_are_unexpected():
    with pytest.raises(ValueError, match=r"unexpected old\.7\.w\."):
        convert(source(old_7_w=torch.ones(3, 2)), ConversionReport("x.pt"))


def test_values_that_are_not_finite_are_refused_and_nothing_is_copied():
    model = nn.ModuleDict({"new": nn.ModuleList([nn.Linear(2, 3)])})
    before = model["new"][0].weight.clone()
    tensors = {"new.0.weight": torch.ones(3, 2), "new.0.bias": torch.tensor([0.0, float("nan"), 1.0])}
    with pytest.raises(ValueError, match=r"new\.0\.bias holds NaN or infinity"):
        fill_model(model, tensors, ConversionReport("x.pt"), "an example")
    assert torch.equal(model["new"][0].weight, before)


def test_optional_tensors_may_be_absent_and_keep_their_values():
    model = nn.ModuleDict({"new": nn.ModuleList([nn.Linear(2, 3)])})
    before = model["new"][0].bias.clone()
    fill_model(model, {"new.0.weight": torch.ones(3, 2)}, ConversionReport("x"), "an example", optional=["new.0.bias"])
    assert torch.equal(model["new"][0].bias, before)


def test_the_precision_is_that_of_the_model():
    model = convert(source(old_0_w=torch.full((3, 2), 0.1, dtype=torch.bfloat16)), ConversionReport("x.pt"))
    assert model["new"][0].weight.dtype == torch.float32
    assert torch.equal(model["new"][0].weight, torch.full((3, 2), 0.1, dtype=torch.bfloat16).float())


def test_parts_are_merged_under_their_prefixes():
    part = ConversionReport("part", notes=["n"])
    KeyMap(RENAMES, {r"video\..+": "only for videos"}).apply(source(stray=torch.ones(1)), part)
    whole = ConversionReport("whole", ignored={"only for videos": ["first"]}, mapped={"a": "b"})
    whole.merge(part, "sam.", "mask_model.")
    assert whole.mapped["sam.old.0.w"] == "mask_model.new.0.weight" and whole.mapped["a"] == "b"
    assert whole.ignored == {"only for videos": ["first", "sam.video.x"]}
    assert whole.unexpected == ["sam.stray"] and whole.notes == ["n"]
    assert whole.num_read == 6


def test_what_a_reader_needs_first_is_required():
    report = ConversionReport("x.pt", unexpected=["strange"])
    require({"a": torch.ones(1)}, ["a"], report, "an example")
    with pytest.raises(ValueError, match=r"^x\.pt is not an example: unexpected strange; missing b \(and 1 more\)\.$"):
        require({"a": torch.ones(1)}, ["a", "b", "c"], report, "an example")


def test_a_refusal_names_only_what_there_is():
    assert str(refusal("x", "y", missing=["m"])) == "x is not y: missing m."


def test_what_is_rounded_is_said():
    """A source of mixed precision: three of four values of a matrix fit into bfloat16."""
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    tensors = {"weight": torch.tensor([[1.0, 0.5], [2.0, 0.1]]), "bias": torch.tensor([0.25, -3.0])}
    report = ConversionReport("x.pt", mapped={"old.w": "weight", "old.b": "bias"})
    fill_model(model, tensors, report, "an example")
    assert report.notes == ["1 tensors do not fit into torch.bfloat16 and were rounded, the first is old.w."]
    report = ConversionReport("x.pt")
    fill_model(nn.Linear(2, 2), {name: value.bfloat16() for name, value in tensors.items()}, report, "an example")
    assert report.notes == []
