"""perceptio build's function: every source it reads, what it verifies, and what it refuses."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from component_helpers import TEMPLATE, codec, mask_model, save_internvl, stock_tokenizer
from helpers import assert_trained_alike, chat, encode, picture
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from perceptio_hf.build import checkpoint as building
from perceptio_hf.build.checkpoint import STEPS, build
from perceptio_hf.build.verification import added_digests, check_against, rounding_bound, take_reference
from perceptio_hf.tokens import spatial_tokens

WORDS, NEW = len(stock_tokenizer()), 19


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Saved parts: internvl, sam2, codec."""
    folder = tmp_path_factory.mktemp("sources")
    save_internvl(folder / "internvl", tie=False)
    mask_model().save_pretrained(folder / "sam2")
    codec().save_pretrained(folder / "codec")
    return folder


def run(sources: Path, out: Path, internvl: Path | None = None, **options):
    return build(internvl or sources / "internvl", sources / "sam2", sources / "codec", out, **options)


def plain_inputs(processor) -> dict:
    inputs = encode(processor, chat(picture()), chat(picture(90, 33), text="What is left of the red ball?"))
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize(
    ("family", "tie", "padding", "dtype"),
    [
        ("qwen2", True, 0, torch.float32),
        ("qwen2", False, 64, torch.bfloat16),
        ("qwen2", True, 7, torch.bfloat16),
        ("qwen3", True, 64, torch.float32),
        ("qwen3", False, 7, torch.float32),
        ("llama", True, 7, torch.float32),
        ("llama", False, 0, torch.bfloat16),
    ],
    ids=str,
)
def test_every_kind_of_stock_internvl(sources, tmp_path, family, tie, padding, dtype):
    source = save_internvl(tmp_path / "stock", family=family, tie=tie, padding=padding, dtype=dtype)
    report = run(sources, tmp_path / "out", source)
    assert report.check.prompts == 6 and not report.check.sampled and report.check.spatial_probability < 0.3
    assert report.check.tokens == WORDS + max(0, padding - NEW)
    assert (report.rows_before, report.rows) == (WORDS + padding, max(WORDS + padding, WORDS + NEW))
    assert (report.text_model, report.tied, report.dtype) == (family, tie, str(dtype).removeprefix("torch."))
    stock = InternVLForConditionalGeneration.from_pretrained(source)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = plain_inputs(processor)
    with torch.no_grad():
        found, expected = (asked(**inputs).logits[..., :WORDS].float() for asked in (model, stock))
    bound = rounding_bound(stock.config, stock.dtype, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)
    assert report.check.largest_difference <= report.check.largest_allowed < 0.2 * float(expected.abs().max())
    options = {"do_sample": False, "max_new_tokens": 9}
    unused = list(range(WORDS, WORDS + padding)) or None
    mine = model.generate(**inputs, spatial="none", suppress_tokens=unused, **options)
    others = [processor.image_token_id, *(unused or [])]  # Perceptio bans the placeholder of pictures
    assert torch.equal(mine, stock.generate(**inputs, suppress_tokens=others, **options))


def test_shards_in_shards_out(sources, tmp_path):
    source = save_internvl(tmp_path / "stock", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    run(sources, tmp_path / "out", source, max_shard_size="300KB")
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    AutoModel.from_pretrained(tmp_path / "out")


def test_what_is_carried_over(sources, tmp_path):
    run(sources, tmp_path / "out", dtype="bfloat16", seed=3)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.mask_model.dtype == torch.float32
    assert model.generation_config.max_new_tokens == 77
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.chat_template == TEMPLATE and processor.image_processor.max_patches == 5
    assert processor.spatial_token_ids()["seg_token_id"] == model.config.seg_token_id == WORDS
    assert model.config.picture_mark_token_ids == processor.picture_mark_token_ids() != {}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"  # the stock one says right
    before = AutoTokenizer.from_pretrained(sources / "internvl")
    assert before.padding_side == "right"
    text = "Which is closer?\n <img> äß 漢字 <DEPTH <|im_end|>"
    assert before(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    for name, value in mask_model().state_dict().items():
        assert torch.equal(model.mask_model.state_dict()[name], value)
    assert torch.equal(model.depth_model.codebook, codec().codebook)
    for file in ("modeling_perceptio.py", "processing_perceptio.py", "configuration_perceptio.py"):
        assert (tmp_path / "out" / file).is_file()


def test_steps_come_in_order_and_unverified_ones_are_left_out(sources, tmp_path):
    seen: list[str] = []
    report = run(sources, tmp_path / "a", on_step=seen.append)
    assert seen == list(STEPS) and report.as_dict()["check"]["positions"] > 300
    seen.clear()
    report = run(sources, tmp_path / "b", on_step=seen.append, verify=False)
    assert seen == [step for step, to_verify in STEPS.items() if not to_verify] and report.check is None
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert_trained_alike(other, one)  # new rows are products


def test_the_codec_of_a_perceptio(sources, tmp_path):
    run(sources, tmp_path / "first")
    report = build(sources / "internvl", sources / "sam2", tmp_path / "first", tmp_path / "second")
    assert report.depth_codes == 16
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "second").depth_model.codebook, codec().codebook)


def test_large_models_are_checked_by_a_sample(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("perceptio_hf.build.verification.SMALL", 1000)
    check = run(sources, tmp_path / "out").check
    assert check.sampled and (check.prompts, check.positions) == (2, 8)


@pytest.fixture(scope="module")
def joined(sources, tmp_path_factory):
    """(the reference of the sources, what was added, the folder built from them)."""
    out = tmp_path_factory.mktemp("joined") / "out"
    run(sources, out, verify=False)
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    stock = InternVLForConditionalGeneration.from_pretrained(sources / "internvl")
    reference = take_reference(stock, mask_model(), codec(), processor)
    return reference, added_digests(reference, model), out


def test_digests_know_every_tensor(joined):
    reference, added, out = joined
    names = set(AutoModel.from_pretrained(out).state_dict())
    assert reference.digests.keys() | added.keys() == names
    both = {"model.language_model.embed_tokens.weight", "lm_head.weight"}  # old rows, and then all
    assert reference.digests.keys() & added.keys() == both
    assert {name for name in added if name not in both} == {name for name in names if name.startswith("seg_projector.")}


@pytest.mark.parametrize(
    "damaged",
    [
        "model.language_model.layers.1.self_attn.o_proj.weight",
        "model.vision_tower.encoder.layer.0.mlp.fc1.weight",
        "model.multi_modal_projector.linear_1.weight",
        "lm_head.weight",
        "mask_model.mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
        "mask_model.shared_image_embedding.positional_embedding",
        "depth_model.depth_codebook.vectors",
        "depth_model.depth_decoder.out.weight",
        "seg_projector.linear_in.weight",
    ],
)
def test_verification_sees_a_weight_that_changed(joined, damaged):
    """By a millionth, which no comparison of logits could tell from rounding."""
    reference, added, out = joined
    model = AutoModel.from_pretrained(out)
    check_against(reference, model, added)
    with torch.no_grad():
        model.state_dict()[damaged].mul_(1 + 1e-6)
    with pytest.raises(ValueError, match=rf"does not have the weights of its parts: {damaged} differs \(1 of"):
        check_against(reference, model, added)


def test_verification_sees_new_rows_that_changed_and_swapped_layers(joined):
    reference, added, out = joined
    model = AutoModel.from_pretrained(out)
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS + 3] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"embed_tokens.weight differs \(1 of"):
        check_against(reference, model, added)
    model = AutoModel.from_pretrained(out)
    layers = model.model.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight differs"):
        check_against(reference, model, added)


def test_verification_sees_another_computation_of_the_same_weights(joined):
    reference, added, out = joined
    model = AutoModel.from_pretrained(out)
    with torch.no_grad():  # no weight, no setting: it is made of theta
        model.model.language_model.rotary_emb.inv_freq *= 1.01
    with pytest.raises(ValueError, match="does not compute what its InternVL computes: logits differ by up to"):
        check_against(reference, model, added)
    model = AutoModel.from_pretrained(out)
    model.config.text_config.rms_norm_eps = 2e-6
    with pytest.raises(ValueError, match=r"text_config.rms_norm_eps = 2e-06 instead of 1e-06"):
        check_against(reference, model, added)


def test_rounding_is_no_difference(joined):
    """Against logits summed in float64, which no order of summing in float32 gives."""
    reference, added, out = joined
    exact = InternVLForConditionalGeneration.from_pretrained(out, dtype=torch.float64)
    logits = []
    for prompt in reference.inputs:
        prompt = {name: value.double() if value.is_floating_point() else value for name, value in prompt.items()}
        with torch.no_grad():
            logits.append(exact(**prompt).logits[0, :, :WORDS].float())
    check = check_against(replace(reference, logits=logits), AutoModel.from_pretrained(out), added)
    assert 0 < check.largest_difference < check.largest_allowed < 1e-3


def test_another_likeliest_token_is_a_difference(joined):
    """Where the best two logits of a bfloat16 model are close, both moved by less than the bound."""
    reference, _, out = joined
    model = AutoModel.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = [model(**prompt).logits[0, :, :WORDS].float() for prompt in reference.inputs]
    reference = replace(reference, digests={}, logits=logits)
    assert check_against(reference, model).largest_difference < 0.1
    best = logits[0].topk(2).values
    row = logits[0][int((best[:, 0] - best[:, 1]).argmin())]  # a view
    first = int(row.argmax())  # of two that are equal, the one argmax takes
    second = int(row.index_fill(0, torch.tensor(first), -torch.inf).argmax())
    bound = rounding_bound(model.config, model.dtype, float(logits[0].abs().max()))
    row[[first, second]] += torch.tensor([-0.8, 0.8]) * bound
    with pytest.raises(ValueError, match="another token is the likeliest one"):
        check_against(reference, model)


@pytest.mark.parametrize("sampled", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("part", ["model.language_model", "mask_model.vision_encoder", "depth_model.depth_encoder"])
def test_nothing_is_written_where_verification_fails(sources, tmp_path, monkeypatch, part, sampled):
    def damaging(*arguments, **options):
        model = assemble(*arguments, **options)
        weight = next(weight for weight in model.get_submodule(part).parameters() if weight.ndim > 1 and weight.any())
        weight.data = weight.data * (1 + 1e-6)  # not in place: the sources share its memory
        return model

    assemble = building.assemble
    monkeypatch.setattr(building, "assemble", damaging)
    monkeypatch.setattr("perceptio_hf.build.verification.SMALL", 1000 if sampled else 10**8)
    with pytest.raises(ValueError, match=rf"weights of its parts: {part}\.\S+ differs"):
        run(sources, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edited(folder: Path, target: Path, file: str = "config.json", **changes) -> Path:
    """A copy with other values in a JSON file; a__b is b in section a."""
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (values[section] if section else values)[key] = value
    (target / file).write_text(json.dumps(values))
    return target


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config__hidden_size": 96}, "mismatch|contradict"),
        ({"text_config__num_hidden_layers": 3, "text_config__layer_types": None}, "missing keys"),
        ({"text_config__num_hidden_layers": 1, "text_config__layer_types": None}, "unexpected keys"),
        ({"vision_config__image_size": [48, 48], "image_seq_length": 36}, "mismatch|contradict"),
        ({"vision_config__patch_size": [8, 8], "image_seq_length": 4}, "mismatch|contradict"),
        ({"image_seq_length": 64}, "image_seq_length in config.json is 64, but a tile of .* makes 16 tokens"),
        ({"image_token_id": 7}, "processor has image_token_id"),
        ({"model_type": "llava"}, "is not an InternVL: model_type in config.json is 'llava'"),
        ({"text_config__vocab_size": 500}, "mismatch|contradict"),
    ],
    ids=str,
)
def test_an_internvl_that_contradicts_its_config(sources, tmp_path, changes, says):
    source = edited(sources / "internvl", tmp_path / "bad", **changes)
    with pytest.raises(ValueError, match=says):
        run(sources, tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_keys_of_other_programs_are_left_out(sources, tmp_path):
    """As Unsloth writes one into each config.json; a section of its own is one too."""
    foreign = {"unsloth_fixed": True, "tool": {"version": 3, "deep": {"a": 1}}}
    source = edited(sources / "internvl", tmp_path / "stock", **foreign)
    assert run(sources, tmp_path / "out", source).check.weights > 100
    assert not foreign.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_a_published_internvl_may_name_code(sources, tmp_path):
    source = edited(sources / "internvl", tmp_path / "stock", auto_map={"AutoConfig": "x.Y"})
    assert run(sources, tmp_path / "out", source).check.weights > 100


def test_no_place_on_the_disk_is_written_down(sources, tmp_path):
    source = Path(shutil.copytree(sources / "internvl", tmp_path / "stock"))
    values = json.loads((source / "config.json").read_text())
    values["text_config"]["_name_or_path"] = "/home/me/secret"
    (source / "config.json").write_text(json.dumps(values))
    run(sources, tmp_path / "out", source)
    text = (tmp_path / "out" / "config.json").read_text()
    assert "/home/me" not in text and str(sources) not in text and "name_or_path" not in text


def test_rounding_is_said(sources, tmp_path):
    """Weights in float32 of which config.json says that they are in bfloat16."""
    source = edited(sources / "internvl", tmp_path / "stock", dtype="bfloat16")
    (note,) = run(sources, tmp_path / "out", source).notes
    assert "tensors of the InternVL were rounded from torch.float32 to torch.bfloat16" in note
    assert run(sources, tmp_path / "kept", source, dtype="float32").notes == ()


@pytest.mark.parametrize(
    ("file", "says"),
    [("generation_config.json", "generation_config.json"), ("adapter_config.json", "holds an adapter")],
)
def test_what_transformers_would_pass_over(sources, tmp_path, file, says):
    """It takes a damaged generation_config.json for none, and puts an adapter beside whole weights into them."""
    source = Path(shutil.copytree(sources / "internvl", tmp_path / "stock"))
    (source / file).write_text("{bad")
    with pytest.raises(ValueError, match=says):
        run(sources, tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["internvl", "sam2", "codec"])
@pytest.mark.parametrize("damage", ["truncated", "header", "nan", "lost tensor", "no weights", "no config", "absent"])
def test_damaged_parts(sources, tmp_path, part, damage):
    places = {name: sources / name for name in ("internvl", "sam2", "codec")}
    places[part] = bad = tmp_path / "bad"
    if damage != "absent":
        shutil.copytree(sources / part, bad)
        _harm(bad / "model.safetensors", damage)
    with pytest.raises(ValueError, match="bad") as error:
        build(*places.values(), tmp_path / "out")
    assert len(str(error.value)) < 700 and not (tmp_path / "out").exists()


def _harm(weights: Path, damage: str) -> None:
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "header":  # a flipped bit where the names of tensors stand
        weights.write_bytes(content[:60] + bytes([content[60] ^ 0x80]) + content[61:])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        (weights.parent / "config.json").unlink()
    else:
        tensors = load_file(weights)
        name = sorted(name for name, value in tensors.items() if value.ndim > 1)[3]
        if damage == "nan":  # a flipped bit in an exponent
            tensors[name].flatten()[2] = torch.inf
        else:
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})


def test_an_index_that_names_a_missing_shard(sources, tmp_path):
    source = save_internvl(tmp_path / "stock", max_shard_size="60KB")
    lost = sorted(source.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"cannot be loaded as an InternVL: .*{lost.name}"):
        run(sources, tmp_path / "out", source)


def test_a_tokenizer_for_another_codebook(sources, tmp_path):
    shutil.copytree(sources / "internvl", tmp_path / "aurora")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "aurora")
    tokenizer.add_tokens(spatial_tokens(128))
    tokenizer.save_pretrained(tmp_path / "aurora")
    with pytest.raises(ValueError, match="aurora: The tokenizer has 128 depth tokens, but the codebook has 16"):
        run(sources, tmp_path / "out", tmp_path / "aurora")


def test_an_internvl_whose_tokenizer_has_spatial_tokens(sources, tmp_path):
    source = save_internvl(tmp_path / "stock", padding=30)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["[SEG]", *spatial_tokens(16)[2:-1]])
    tokenizer.save_pretrained(source)
    report = run(sources, tmp_path / "out", source)
    assert (report.new_tokens, report.first_new_id) == (2, WORDS + 17)
    assert report.check.tokens == WORDS + 30 - 2 and report.rows == WORDS + 30


def test_a_folder_without_a_tokenizer(sources, tmp_path):
    shutil.copytree(sources / "internvl", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(ValueError, match=r"bare"):
        run(sources, tmp_path / "out", tmp_path / "bare")


def test_a_folder_in_use_is_looked_at_before_anything_is_read(sources, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        build("no/such", "thing", "here", tmp_path / "out")
    run(sources, tmp_path / "model", verify=False)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    run(sources, tmp_path / "model", verify=False, overwrite=True, seed=1)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before


def test_a_part_is_never_overwritten(sources, tmp_path):
    before = (sources / "internvl" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="internvl is to be read"):
        run(sources, sources / "sam2" / ".." / "internvl", overwrite=True)
    assert (sources / "internvl" / "model.safetensors").read_bytes() == before
    out = shutil.copytree(sources / "internvl", tmp_path / "model")
    within = shutil.copytree(sources / "codec", out / "parts" / "codec")
    with pytest.raises(ValueError, match=r"model holds \S+codec, which is to be read"):
        build(sources / "internvl", sources / "sam2", within, out, overwrite=True)
    assert (within / "model.safetensors").is_file()


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "new"])
def test_a_full_disk_leaves_no_half_folder(sources, tmp_path, old):
    """No file may grow beyond a limit, which is what a writer sees of a full disk."""
    out = tmp_path / "out"
    if old:
        run(sources, out, verify=False, seed=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if old else {}
    for limit in (30_000, 1_000_000):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError):
                run(sources, out, overwrite=old)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * old
        assert ({path.name: path.read_bytes() for path in out.iterdir()} if old else {}) == before


@pytest.mark.parametrize("step", ["Reading InternVL", "Writing", "Verifying"])
def test_ctrl_c_leaves_nothing(sources, tmp_path, step):
    def interrupt(name):
        if name == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sources, tmp_path / "out", on_step=interrupt)
    assert not list(tmp_path.iterdir())
