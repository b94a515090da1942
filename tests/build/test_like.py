"""An InternVL that was exported, perhaps trained further, and joined again to what stayed behind (`like`)."""

import shutil
from pathlib import Path

import pytest
import torch
from component_helpers import codec, mask_model, save_internvl, stock_internvl, stock_tokenizer
from helpers import assert_alike, chat, encode
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor, tiny_checkpoint
from perceptio_hf.build import checkpoint as building
from perceptio_hf.build.checkpoint import build
from perceptio_hf.conversion.export import export_internvl
from perceptio_hf.tokens import spatial_tokens
from perceptio_hf.world import HELD_OUT_SEED, render_scene

TRAINED = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tiny() -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    return AutoModel.from_pretrained(tiny_checkpoint()).eval(), AutoProcessor.from_pretrained(tiny_checkpoint())


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint's InternVL, exported, and saved by stock transformers with a weight that has moved."""
    folder = tmp_path_factory.mktemp("trained") / "internvl"
    export_internvl(*tiny, folder)
    stock = InternVLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        stock.state_dict()[TRAINED].mul_(1.02)
    stock.save_pretrained(folder)
    return folder


def small_perceptio(folder: Path) -> Path:
    """A random Perceptio whose settings are not the defaults."""
    save_internvl(folder / "internvl", tie=False)
    parts = folder / "internvl", mask_model(), codec()
    processor = PerceptioProcessor.from_components(*parts)
    processor.mask_threshold, processor.mask_resample = 0.5, "bicubic"
    model = PerceptioForConditionalGeneration.from_components(*parts, processor=processor, seed=7)
    model.config.mask_padding_points, model.config.mask_multimask_output = 1, False
    model.save_pretrained(folder / "old")
    processor.save_pretrained(folder / "old")
    return folder / "old"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Folders: old, a Perceptio; served, its export; internvl, what it was once built from."""
    old = small_perceptio(tmp_path_factory.mktemp("small"))
    model, processor = AutoModel.from_pretrained(old), AutoProcessor.from_pretrained(old)
    export_internvl(model, processor, old.parent / "served")
    return old.parent


def test_round_trip(tiny, trained, tmp_path):
    """Masks and depth of the result are those of the old one with the same weight moved."""
    report = build(trained, None, None, tmp_path / "new", like=tiny_checkpoint())
    assert (report.new_tokens, report.like, report.rows) == (0, tiny_checkpoint(), report.rows_before)
    assert report.check.weights == len(tiny[0].state_dict())
    model, processor = AutoModel.from_pretrained(tmp_path / "new"), AutoProcessor.from_pretrained(tmp_path / "new")
    old = AutoModel.from_pretrained(tiny_checkpoint()).eval()
    with torch.no_grad():
        old.state_dict()[TRAINED].mul_(1.02)
    for name, value in old.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not model.config.mask_multimask_output  # which is no default
    assert processor.mask_threshold == tiny[1].mask_threshold
    turn = chat(Image.fromarray(render_scene(HELD_OUT_SEED).image), text="Give me the mask of the largest object.")
    answers, outputs = [], []
    for asked, reader in ((old, tiny[1]), (model, processor)):
        inputs = encode(reader, turn)
        outputs.append(asked.generate(**inputs, spatial="seg+depth", return_dict_in_generate=True, max_new_tokens=90))
        answers.append(reader.post_process_spatial(outputs[-1])[0])
    assert torch.equal(outputs[0].sequences, outputs[1].sequences) and answers[0].masks.any()
    assert_alike(outputs[1].mask_logits[0], outputs[0].mask_logits[0], depth=100)
    assert answers[1].depth_codes == answers[0].depth_codes
    assert_alike(torch.tensor(answers[1].depth), torch.tensor(answers[0].depth))


def test_every_setting_of_masks_is_taken_over(small, tmp_path):
    build(small / "served", None, None, tmp_path / "new", like=small / "old")
    one, other = AutoModel.from_pretrained(small / "old"), AutoModel.from_pretrained(tmp_path / "new")
    assert {**one.config.to_dict(), "_name_or_path": ""} == {**other.config.to_dict(), "_name_or_path": ""}
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    processor = AutoProcessor.from_pretrained(tmp_path / "new")
    assert (processor.mask_threshold, processor.mask_resample, processor.mask_image_size) == (0.5, "bicubic", 128)


@pytest.mark.parametrize("changed", ["seg_projector", "mask_multimask_output"])
def test_verification_covers_what_is_taken_over(small, tmp_path, monkeypatch, changed):
    """A projector that went wrong before it was written, by a millionth, and a setting that flipped."""

    def damaging(*arguments, **options):
        model = assemble(*arguments, **options)
        if changed == "seg_projector":
            weight = model.seg_projector.linear_out.weight
            weight.data = weight.data * (1 + 1e-6)
        else:
            model.config.mask_multimask_output = True
        return model

    assemble = building.assemble
    monkeypatch.setattr(building, "assemble", damaging)
    says = (
        "seg_projector.linear_out.weight differs" if changed == "seg_projector" else f"config.json has {changed} = True"
    )
    with pytest.raises(ValueError, match=says):
        build(small / "served", None, None, tmp_path / "new", like=small / "old")
    assert not list(tmp_path.iterdir())


def test_half_precision_leaves_the_projector_alone(small, tmp_path):
    report = build(small / "served", None, None, tmp_path / "new", like=small / "old", dtype="bfloat16")
    model, old = AutoModel.from_pretrained(tmp_path / "new"), AutoModel.from_pretrained(small / "old")
    assert report.dtype == "bfloat16" and model.dtype == torch.bfloat16
    for name, value in old.seg_projector.state_dict().items():
        assert torch.equal(model.seg_projector.state_dict()[name], value)


def test_loaded_models_in_python(small):
    old, processor = AutoModel.from_pretrained(small / "old"), AutoProcessor.from_pretrained(small / "old")
    stock = InternVLForConditionalGeneration.from_pretrained(small / "served")
    stock.name_or_path = stock.config.name_or_path = ""  # so that no tokenizer is found
    reader = PerceptioProcessor.from_components(small / "served", like=processor)
    assert reader.spatial_token_ids() == processor.spatial_token_ids() and reader.mask_threshold == 0.5
    for options in ({}, {"processor": reader}):
        model = PerceptioForConditionalGeneration.from_components(stock, like=old, **options)
        assert model.config.picture_mark_token_ids == old.config.picture_mark_token_ids
        assert model.config.mask_padding_points == 1
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in old.state_dict().items())
    assert model.seg_projector is not old.seg_projector
    assert model.seg_projector.linear_in.weight.data_ptr() == old.seg_projector.linear_in.weight.data_ptr()


def with_turned_tokens(folder: Path, target: Path) -> Path:
    """The stock InternVL with the spatial tokens in another order behind its own."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(spatial_tokens(16)[::-1])
    tokenizer.save_pretrained(target)
    stock_internvl(
        len(tokenizer), tie=False, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    ).save_pretrained(target)
    return target


def test_what_contradicts_is_refused(small, tmp_path):
    old, out = small / "old", tmp_path / "out"
    turned = with_turned_tokens(small / "internvl", tmp_path / "turned")
    words = len(stock_tokenizer())
    for arguments, says in (
        ((small / "served", "sam2", None, old), "Both like and a mask decoder are given"),
        ((small / "served", "sam2", "codec", old), "Both like and a mask decoder and a depth codec are given"),
        ((small / "served", None, None, None), "No mask decoder is given; name both"),
        ((small / "served", "sam2", None, None), "No depth codec is given; name both"),
        (
            (small / "internvl", None, None, old),
            r"tokenizer lacks 19 of the spatial tokens of .*old, so it was not exp",
        ),
        ((turned, None, None, old), rf"tokenizer has seg_token_id = {words + 18}, but .*old has {words}"),
        ((small / "served", None, None, tiny_checkpoint()), "tokenizer has 16 depth tokens, but the codebook has 128"),
        (
            (small / "served", None, None, small / "served"),
            "is not a Perceptio: model_type in config.json is 'internvl'",
        ),
        ((small / "served", None, None, tmp_path / "nothing"), "There is no file or folder"),
    ):
        internvl, sam2, depth, like = arguments
        with pytest.raises(ValueError, match=says):
            build(internvl, sam2, depth, out, like=like)
    assert [path.name for path in tmp_path.iterdir()] == ["turned"]
    with pytest.raises(ValueError, match="old is to be read"):
        build(small / "served", None, None, old, like=old, overwrite=True)


def test_an_internvl_of_another_size_is_refused(small):
    old = AutoModel.from_pretrained(small / "old")
    join = PerceptioForConditionalGeneration.from_components
    wide = stock_internvl(500)
    wide.config.text_config.hidden_size = 96
    with pytest.raises(ValueError, match=r"hidden_size = 96, but the \[SEG\] projector of .* reads states of 48"):
        join(wide, like=old)
    with pytest.raises(ValueError, match=r"rows for 401 tokens, but .* has spatial tokens up to id 418"):
        join(stock_internvl(401), like=old)
    with pytest.raises(ValueError, match="like is a Sam2Model; expected a PerceptioForConditionalGeneration"):
        join(stock_internvl(500), like=mask_model())
    with pytest.raises(ValueError, match="like is a Sam2Model; expected a PerceptioProcessor"):
        PerceptioProcessor.from_components(small / "served", like=mask_model())
