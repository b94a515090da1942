"""Sa2VA -> Perceptio: the same masks as Sa2VA's own path in plain torch, its prompt and pictures, and refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import chat, depth_config, encode, picture
from original_formula import reference_logits, reference_states
from original_layout import (
    original_config,
    random_tensors,
    write_checkpoint,
    write_internlm2_tokenizer,
    write_tokenizer,
    write_weights,
)
from original_sam2 import sa2va_masks, sam2_shapes
from safetensors.torch import load_file
from transformers import LogitsProcessorList

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig, PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio_hf.conversion.keys import ConversionReport
from perceptio_hf.conversion.sa2va import convert_sa2va, load_sa2va
from perceptio_hf.lab.lessons.model import tiny_mask_config
from perceptio_hf.training.conversations import ConversationEncoder

TOKENS = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
TEXTS = ["Qwen2ForCausalLM", "InternLM2ForCausalLM"]


def sa2va_config(text: str) -> dict:
    """As Sa2VA saves it: the vocabulary has exactly the tokenizer's size."""
    rows = {"Qwen2ForCausalLM": 309, "InternLM2ForCausalLM": 323}[text]
    template = {"Qwen2ForCausalLM": "qwen_chat", "InternLM2ForCausalLM": "internlm2_chat"}[text]
    return original_config(text, llm={"vocab_size": rows}, architectures=["Sa2VAChatModel"], template=template)


def sa2va_tensors(config: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, prompt = config["llm_config"]["hidden_size"], tiny_mask_config().mask_decoder_config.hidden_size
    shapes = {f"grounding_encoder.sam2_model.{name}": shape for name, shape in sam2_shapes(tiny_mask_config()).items()}
    shapes |= {"text_hidden_fcs.0.weight": (hidden, hidden), "text_hidden_fcs.0.bias": (hidden,)}
    shapes |= {"text_hidden_fcs.2.weight": (prompt, hidden), "text_hidden_fcs.2.bias": (prompt,)}
    drawn = {name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return random_tensors(config) | {name: tensor + ("norm" in name) for name, tensor in drawn.items()}


def write_source(folder: Path, text: str) -> Path:
    config = sa2va_config(text)
    write_checkpoint(folder, config, sa2va_tensors(config), shards=2)
    (write_internlm2_tokenizer if text == "InternLM2ForCausalLM" else write_tokenizer)(folder, TOKENS)
    return folder


@pytest.fixture(scope="module", params=TEXTS)
def source(request, tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("sa2va"), request.param)


@pytest.fixture(scope="module")
def config(source) -> dict:
    return json.loads((source / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors(config) -> dict[str, torch.Tensor]:
    return sa2va_tensors(config)


@pytest.fixture(scope="module")
def codec() -> DepthVQVAE:
    return DepthVQVAE(depth_config()).eval()


@pytest.fixture(scope="module")
def loaded(source, codec) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    return load_sa2va(source, depth_codec=codec, mask_config=tiny_mask_config())


def expected_mask(tensors: dict, pixels: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sa2VA's `text_hidden_fcs` and its way through SAM2 for one [SEG] state."""
    hidden = F.linear(state, tensors["text_hidden_fcs.0.weight"], tensors["text_hidden_fcs.0.bias"]).relu()
    prompt = F.linear(hidden, tensors["text_hidden_fcs.2.weight"], tensors["text_hidden_fcs.2.bias"])
    prefix = "grounding_encoder.sam2_model."
    sam2 = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return sa2va_masks(sam2, tiny_mask_config(), pixels, prompt)


def test_masks_are_those_of_sa2va(loaded, config, tensors):
    """From token ids and a picture to masks; the language model, the projector and SAM2 all take part."""
    model, processor = loaded
    asked = encode(processor, chat(picture(40, 31), text="Segment the red ball, please."))
    said = processor.tokenizer("Sure, [SEG] [SEG]", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([asked["input_ids"], said], 1)
    pixels, tiles = asked["mask_pixel_values"], asked["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=tiles, mask_pixel_values=pixels)
        states = reference_states(tensors, config, ids, tiles, model.config.image_token_id)
        states = states[ids == processor.seg_token_id]
        expected = [expected_mask(tensors, pixels, state) for state in states]
    assert len(expected) == 2 and expected[0][0].std() > 0.1
    for mask, score, (logits, iou) in zip(out.mask_logits, out.mask_scores, expected, strict=True):
        torch.testing.assert_close(mask, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score, iou, atol=1e-4, rtol=0)


def test_each_of_its_ways_matters(loaded, tensors):
    """Two empty points and the best of three masks: with another prompt or mask the comparison above would fail."""
    model = loaded[0]
    pixels, state = torch.randn(1, 3, 128, 128), torch.randn(1, 24)
    assert (model.config.mask_padding_points, model.config.mask_multimask_output) == (2, True)
    with torch.no_grad():
        expected, _ = expected_mask(tensors, pixels, state[0])
        for change in ({"mask_padding_points": 0}, {"mask_padding_points": 1}, {"mask_multimask_output": False}):
            before = {name: getattr(model.config, name) for name in change}
            try:
                model.config.update(change)
                mask, _ = model.predict_masks(state, pixels, torch.zeros(1, dtype=torch.long))
            finally:
                model.config.update(before)
            assert (mask[0] - expected).abs().max() > 1e-2, change


def test_words_are_those_of_sa2va(loaded, config, tensors):
    model, processor = loaded
    inputs = encode(processor, chat(picture(20, 30)))
    ids, tiles, rows = inputs["input_ids"], inputs["pixel_values"], config["llm_config"]["vocab_size"]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=tiles).logits[..., :rows]
        expected = reference_logits(tensors, config, ids, tiles, model.config.image_token_id)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_the_prompt_has_no_system_message(loaded):
    processor = loaded[1]
    inputs = encode(processor, chat(picture(40, 30), text="Segment the red ball, please."))
    places = "<IMG_CONTEXT>" * (4 * len(inputs["pixel_values"]))
    query = f"<|im_start|>user\n<img>{places}</img>\nSegment the red ball, please.<|im_end|>\n<|im_start|>assistant\n"
    assert inputs["input_ids"][0].tolist() == processor.tokenizer(query)["input_ids"]
    assert len(inputs["pixel_values"]) > 6  # up to twelve tiles, whatever config.json says


def test_sam2_sees_the_picture_as_sa2va_scales_it(loaded):
    image = picture(50, 37)
    squashed = np.asarray(image.resize((128, 128)), dtype=np.float32) / 255  # Pillow's default is bicubic
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = loaded[1](images=[image], text="<IMG_CONTEXT>", return_tensors="pt")["mask_pixel_values"][0]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), (squashed - mean) / std, atol=1e-5)


def test_there_are_two_ways_to_scale(loaded):
    processor = loaded[1]
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    with pytest.raises(ValueError, match="'nearest'; it must be 'bilinear' or 'bicubic'"):
        PerceptioProcessor(**parts, num_depth_tokens=16, num_depth_codes=16, mask_resample="nearest")


def test_seg_keeps_its_id_and_depth_tokens_come_behind(loaded, config, tensors):
    model, processor = loaded
    rows = config["llm_config"]["vocab_size"]
    assert processor.seg_token_id == rows - 5
    assert min(model.config.depth_token_ids) >= rows and model.config.num_depth_tokens == 16
    name = "tok_embeddings" if "LM2" in config["llm_config"]["architectures"][0] else "embed_tokens"
    assert torch.equal(model.get_input_embeddings().weight[:rows], tensors[f"language_model.model.{name}.weight"])


def test_every_tensor_is_accounted_for(source, codec, tensors):
    report = ConversionReport("source")
    model, _ = load_sa2va(source, depth_codec=codec, mask_config=tiny_mask_config(), report=report)
    assert report.num_read == len(tensors)
    assert {name for names in report.ignored.values() for name in names} == {
        f"grounding_encoder.sam2_model.{name}"
        for name in ("maskmem_tpos_enc", "memory_encoder.fuser.layers.0.g_weight")
    } | {f"grounding_encoder.sam2_model.obj_ptr_proj.layers.0.{end}" for end in ("weight", "bias")}
    assert report.mapped["text_hidden_fcs.2.bias"] == "seg_projector.linear_out.bias"
    assert set(report.mapped.values()) > {f"seg_projector.{name}" for name in model.seg_projector.state_dict()}
    assert "depth_model" in report.added


def test_saved_and_loaded_it_is_the_same(source, loaded, codec, tmp_path):
    out = tmp_path / "converted"
    report = convert_sa2va(source, out, depth_codec=codec, mask_config=tiny_mask_config())
    assert report.source == str(source) and report.num_read > 300
    model = PerceptioForConditionalGeneration.from_pretrained(out)
    processor = PerceptioProcessor.from_pretrained(out)
    mine, theirs = loaded[0].state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert processor.mask_resample == "bicubic" and processor.chat_template == loaded[1].chat_template
    assert model.generation_config.eos_token_id == loaded[0].generation_config.eos_token_id
    inputs = encode(processor, chat(picture(30, 20)))
    out = model.generate(**inputs, spatial="seg", max_new_tokens=3, return_dict_in_generate=True)
    assert processor.post_process_spatial(out)[0].masks.shape == (1, 20, 30)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("qwen2"), "Qwen2ForCausalLM")


PHI3 = "<|user|>\n{}<|end|>\n<|assistant|>\n"  # Sa2VA's template phi3_chat, whose marks Qwen's tokenizer does not know


@pytest.fixture(scope="module")
def phi3(tmp_path_factory, qwen2) -> Path:
    """Sa2VA-4B's first generation: Qwen2.5 with Phi-3's chat format."""
    folder = Path(shutil.copytree(qwen2, tmp_path_factory.mktemp("phi3") / "source"))
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"template": "phi3_chat"})
    )
    return folder


def test_phi3_chat_is_written_as_sa2va_writes_it(phi3, codec):
    """Prompt as the template's words, whose marks are no tokens; turns that are given end with a token."""
    model, processor = load_sa2va(phi3, depth_codec=codec, mask_config=tiny_mask_config())
    assert not {"<|user|>", "<|assistant|>", "<|end|>"} & set(processor.tokenizer.get_vocab())
    inputs = encode(processor, chat(picture(40, 30), text="Segment the red ball, please."))
    places = f"<img>{'<IMG_CONTEXT>' * (4 * len(inputs['pixel_values']))}</img>\n"
    query = PHI3.format(f"{places}Segment the red ball, please.")
    assert inputs["input_ids"][0].tolist() == processor.tokenizer(query)["input_ids"]
    turns = [("user", "Which?"), ("assistant", "The red ball."), ("user", "[SEG]?")]
    chats = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    text = text.replace("\u2060\u2063", "")  # the marks inside what a user typed
    assert text == PHI3.format("Which?") + "The red ball.<|im_end|>\n" + PHI3.format("[SEG]?")
    encoder = ConversationEncoder(processor)  # training: it refuses templates whose turns end with no token
    ids, labels = encoder.encode(chats[:2], [])
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(learnt) == "The red ball.<|im_end|>"
    assert model.generation_config.eos_token_id == [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_phi3_answers_end_with_words(phi3, codec, tmp_path):
    """A processor makes the model say them."""
    out = tmp_path / "converted"
    report = convert_sa2va(phi3, out, depth_codec=codec, mask_config=tiny_mask_config())
    assert "Answers end with the words <|end|>" in report.notes[-1]
    model, processor = (kind.from_pretrained(out) for kind in (PerceptioForConditionalGeneration, PerceptioProcessor))
    tokenizer = processor.tokenizer
    (end,) = model.generation_config.end_sequences
    for answer in ("red", "Sure, [SEG].", "it is 3", "[SEG]", "(a)", "the ball "):
        ids = tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]
        assert ids[-len(end) :] == end
    said = tokenizer("Sure, the red ball.<|end|>\n<|user|>", add_special_tokens=False)["input_ids"]
    script = iter(said)
    processors = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, torch.tensor(next(script)), 1e4)])
    inputs = encode(processor, chat(picture(30, 20)))
    found = model.generate(**inputs, max_new_tokens=30, return_dict_in_generate=True, logits_processor=processors)
    assert processor.post_process_spatial(found)[0].text == "Sure, the red ball."
    new = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(new) == "Sure, the red ball.<|end|>"


def test_without_a_codec_a_new_one_is_made_and_said(qwen2):
    report = ConversionReport("source")
    model, processor = load_sa2va(qwen2, mask_config=tiny_mask_config(), report=report)
    assert model.config.depth_config.to_diff_dict() == DepthVQVAEConfig().to_diff_dict()
    assert processor.num_depth_codes == 128 and "not trained" in " ".join(report.notes)


@pytest.fixture
def folder(qwen2, tmp_path) -> Path:
    return Path(shutil.copytree(qwen2, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["Sa2VAChatModelQwen"], "vision_config": {"model_type": "qwen2_5_vl"}},
            r"is a Sa2VA on Qwen2\.5-VL \(architectures is 'Sa2VAChatModelQwen'\).*Sa2VA-InternVL3-2B.* can be conv",
        ),
        (
            {"architectures": ["Sa2VAChatModelQwen"], "vision_config": {"model_type": "qwen3_vl"}},
            "is a Sa2VA on Qwen3-VL",
        ),
        ({"architectures": ["InternVLChatModel"]}, "'InternVLChatModel', expected Sa2VAChatModel"),
        ({"template": "vicuna"}, "template in config.json is 'vicuna'; known are .*phi3_chat"),
    ],
)
def test_other_layouts_are_refused(folder, codec, changes, named):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(ValueError, match=named):
        load_sa2va(folder, depth_codec=codec, mask_config=tiny_mask_config())


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("text_hidden_fcs.2.bias", "remove", "missing linear_out.bias"),
        ("text_hidden_fcs.0.weight", "cut", r"0.weight is \(23, 24\), expected \(24, 24\)"),
        ("text_hidden_fcs.4.weight", "add", "unexpected 4.weight"),
        ("grounding_encoder.sam2_model.no_mem_embed", "remove", "missing no_memory_embedding"),
        ("grounding_encoder.text_model.weight", "add", "unexpected grounding_encoder.text_model.weight"),
        ("mlp1.3.weight", "remove", "missing model.multi_modal_projector.linear_2.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, codec, name, change, named):
    changed = sa2va_tensors(sa2va_config("Qwen2ForCausalLM"))
    if change == "add":
        changed[name] = torch.ones(2)
    else:
        tensor = changed.pop(name)
        changed |= {name: tensor[1:]} if change == "cut" else {}
    for file in folder.glob("model*"):
        file.unlink()
    write_weights(folder, changed)
    with pytest.raises(ValueError, match=named):
        load_sa2va(folder, depth_codec=codec, mask_config=tiny_mask_config())


def test_a_tokenizer_without_seg_is_refused(folder, codec):
    write_tokenizer(folder)
    with pytest.raises(ValueError, match=r"no token \[SEG\]"):
        load_sa2va(folder, depth_codec=codec, mask_config=tiny_mask_config())


def test_a_folder_in_use_is_left_alone(qwen2, codec, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_sa2va(qwen2, tmp_path, depth_codec=codec, mask_config=tiny_mask_config())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damage_leaves_nothing_behind(folder, codec, tmp_path):
    shard = next(folder.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or damaged"):
        convert_sa2va(folder, tmp_path / "out", depth_codec=codec, mask_config=tiny_mask_config())
    assert not (tmp_path / "out").exists()
    assert load_file(next(folder.glob("model-00002*")))  # the source is as it was
