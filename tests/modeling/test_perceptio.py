"""The model: what it adds to InternVL, what it leaves alone, and how it is saved and loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_alike, chat, encode, picture, random_model, small_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    pipeline,
)

from perceptio_hf import PerceptioConfig, PerceptioForConditionalGeneration, PerceptioProcessor, tiny_checkpoint


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_give_perceptio(auto, tiny_folder):
    assert type(auto.from_pretrained(tiny_folder)) is PerceptioForConditionalGeneration


def test_auto_config_and_processor(tiny_folder, model):
    config = AutoConfig.from_pretrained(tiny_folder)
    assert type(config) is PerceptioConfig and config.depth_token_ids == model.config.depth_token_ids
    assert type(AutoProcessor.from_pretrained(tiny_folder)) is PerceptioProcessor


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_equal(processor, tmp_path, tie, dtype):
    random_model(processor, tie).save_pretrained(tmp_path / "a")
    first = PerceptioForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=dtype)
    first.save_pretrained(tmp_path / "b")
    second = PerceptioForConditionalGeneration.from_pretrained(tmp_path / "b", dtype="auto")
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        spatial = name.startswith(("mask_model", "depth_model", "seg_projector"))
        assert value.dtype == (torch.float32 if spatial else dtype), name
        assert value.dtype == states[1][name].dtype and torch.equal(value, states[1][name]), name
    tied = second.lm_head.weight is second.model.language_model.embed_tokens.weight
    assert tied == tie and second.dtype == dtype


def test_bfloat16_generates_masks_and_depth(tiny_folder, processor):
    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    out = model.generate(**encode(processor, chat(picture())), spatial="seg+depth", return_dict_in_generate=True)
    assert out.mask_logits[0].dtype == out.depth_maps[0].dtype == torch.float32 and out.well_formed == [True]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_without_spatial_tokens_the_logits_are_internvl_s(processor, tie):
    model = random_model(processor, tie)
    own = small_config(processor, tie)
    config = InternVLConfig(
        **{key: getattr(own, key) for key in ("vision_config", "text_config", "image_token_id", "image_seq_length")},
        tie_word_embeddings=tie,
    )
    stock = InternVLForConditionalGeneration(config).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.split(".")[0] in _SPATIAL_PARTS for name in unexpected)
    inputs = encode(processor, chat(picture()), chat(picture(70, 30), text="What is left of the red ball?"))
    plain = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert_alike(model(**plain).logits, stock(**plain).logits)
        labels = plain["input_ids"]
        assert_alike(model(**plain, labels=labels).loss, stock(**plain, labels=labels).loss)
    options = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": _banned(model)}
    assert torch.equal(
        model.generate(**plain, spatial="none", **options),
        stock.generate(**plain, pad_token_id=processor.tokenizer.pad_token_id, **options),
    )


_SPATIAL_PARTS = {"seg_projector", "mask_model", "depth_model"}


def _banned(model) -> list[int]:
    words = model.spatial_vocabulary()
    return [words.seg, words.depth_start, words.depth_end, words.image, *words.codes, *words.turn_ends]


def test_masks_in_training_have_gradients_where_they_should(processor):
    model = random_model(processor).train()
    assert not model.mask_model.vision_encoder.training and not model.depth_model.training
    turn = {"role": "assistant", "content": "[SEG] There."}
    chats = [[*chat(picture()), turn], [*chat(picture(seed=1)), turn]]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    sizes = inputs.pop("original_sizes")
    assert sizes.tolist() == [[40, 48]] * 2
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.mask_logits.shape == (2, *model.mask_size)
    (out.loss + out.mask_logits.square().mean() + out.mask_scores.sum()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("model.language_model", "model.vision_tower", "seg_projector", "mask_model.mask_decoder.conv_s0"):
        assert any(name.startswith(part) for name in moved), part
    assert not any(name.startswith(("mask_model.vision_encoder", "depth_model")) for name in moved)


def test_masks_of_forward_are_those_of_generation(model, processor):
    inputs = encode(processor, chat(picture()), chat(picture(seed=1)))
    out = model.generate(**inputs, spatial="seg", max_new_tokens=8, return_dict_in_generate=True)
    with torch.no_grad():
        again = model(out.sequences, inputs.pixel_values, mask_pixel_values=inputs.mask_pixel_values)
    torch.testing.assert_close(torch.cat(out.mask_logits), again.mask_logits, atol=1e-4, rtol=1e-4)


def test_a_batch_without_seg_has_no_masks(model, processor):
    inputs = encode(processor, chat(picture()))
    with torch.no_grad():
        out = model(inputs.input_ids, inputs.pixel_values, mask_pixel_values=inputs.mask_pixel_values)
    assert out.mask_logits.shape == (0, *model.mask_size)


def test_pipeline(tiny_folder):
    answers = pipeline("image-text-to-text", model=str(tiny_folder))(
        text=chat(picture()), max_new_tokens=30, generate_kwargs={"spatial": "depth"}, return_full_text=False
    )
    assert answers[0]["generated_text"].startswith("<DEPTH_START><DEPTH_")


def test_pipeline_batches_answer_as_single_rows_do():
    """A pipeline pads with the tokenizer alone: rows must end where generation goes on."""
    folder = str(tiny_checkpoint())
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    ask = pipeline("image-text-to-text", model=folder)
    texts = ["How many objects are there?", "Is the ball to the left of the box, or is it to the right of it?"]
    chats = [chat(picture(128, 128, seed=seed), text=text) for seed, text in enumerate(texts)]
    options = {"return_full_text": False, "generate_kwargs": {"spatial": "none", "max_new_tokens": 12}}
    alone = [ask(text=messages, **options)[0]["generated_text"] for messages in chats]
    assert all(alone)
    assert [row[0]["generated_text"] for row in ask(text=chats, batch_size=2, **options)] == alone


REMOTE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptio_hf":
            raise ImportError("perceptio_hf is not installed here")
sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, again = sys.argv[1:]
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    sys.exit("loaded without trust")
for source in (folder, again):
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    turn = [{"role": "user", "content": [
        {"type": "image", "image": Image.new("RGB", (50, 30), "red")}, {"type": "text", "text": "Where?"}]}]
    inputs = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, spatial="seg+depth", return_dict_in_generate=True)
    answer = processor.post_process_spatial(out)[0]
    assert answer.masks.shape[1:] == answer.depth.shape == (30, 50), answer
    print(type(model).__module__, out.sequences.sum().item())
    if source == folder:
        model.save_pretrained(again)
        processor.save_pretrained(again)
"""


def test_a_saved_folder_brings_its_code(tiny_folder, tmp_path, monkeypatch):
    """In a process where the package cannot be imported; saved from there, it loads there again."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", REMOTE, str(tiny_folder), str(tmp_path / "again")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.split("\n")[:2]
    assert all(line.startswith("transformers_modules") for line in lines)
    assert lines[0].split()[1] == lines[1].split()[1]


def test_with_the_package_the_local_class_wins(tiny_folder):
    model = AutoModel.from_pretrained(tiny_folder, trust_remote_code=True)
    assert type(model) is PerceptioForConditionalGeneration


def test_a_checkpoint_without_a_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    with pytest.raises(OSError, match="model-0000"):
        AutoModel.from_pretrained(tmp_path)


def edited(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (config[section] if section else config)[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_config_that_contradicts_its_weights(tiny_folder, tmp_path):
    more = edited(tiny_folder, tmp_path / "more", text_config__num_hidden_layers=3, text_config__layer_types=None)
    with pytest.raises(ValueError, match=r"missing keys, the first is model\.language_model\.layers\.2"):
        AutoModel.from_pretrained(more)
    fewer = edited(tiny_folder, tmp_path / "fewer", text_config__num_hidden_layers=1, text_config__layer_types=None)
    with pytest.raises(ValueError, match="unexpected keys"):
        AutoModel.from_pretrained(fewer)
    wider = edited(tiny_folder, tmp_path / "wider", text_config__intermediate_size=48)
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|contradict"):
        AutoModel.from_pretrained(wider)


def test_weights_that_lack_a_tensor_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    weights.pop("seg_projector.linear_out.weight")
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, the first is seg_projector\.linear_out\.weight"):
        AutoModel.from_pretrained(tmp_path / "cut")


def test_config_fields_that_contradict_one_another(processor):
    values = small_config(processor).to_dict()
    values.pop("model_type")
    for change, message in (
        ({"num_depth_tokens": 17}, "num_depth_tokens is 17"),
        ({"depth_token_ids": [1, 2]}, "2 ids"),
        ({"seg_token_id": None}, "belong together"),
        ({"seg_token_id": values["depth_token_ids"][0]}, "differ from one another"),
        ({"depth_end_token_id": 10**6}, "lie in 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PerceptioConfig(**(values | change))


def test_a_model_without_spatial_tokens_is_an_internvl(processor):
    config = small_config(processor)
    config.seg_token_id = config.depth_start_token_id = config.depth_end_token_id = config.depth_token_ids = None
    model = PerceptioForConditionalGeneration(config).eval()
    inputs = encode(processor, chat(picture()))
    assert model.generate(**inputs, max_new_tokens=3, pad_token_id=0).shape[0] == 1
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        sizes = inputs.pop("original_sizes")
        assert torch.equal(model(**inputs).logits, model(**plain).logits) and len(sizes) == 1
    with pytest.raises(ValueError, match="mask_pixel_values came without input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 8), mask_pixel_values=inputs["mask_pixel_values"])
    with pytest.raises(ValueError, match="no spatial tokens"):
        model.generate(**inputs, spatial="depth")
