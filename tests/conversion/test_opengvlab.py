"""OpenGVLab's InternVL -> transformers: logits as plain torch computes them, prompts, tiles, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import chat, encode, picture
from original_formula import reference_logits
from original_layout import original_config, random_tensors, write_checkpoint, write_weights

from perceptio_hf import PerceptioProcessor
from perceptio_hf.conversion.keys import ConversionReport
from perceptio_hf.conversion.opengvlab import load_opengvlab, load_opengvlab_processor

TEXTS = ["Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "InternLM2ForCausalLM"]
SIX_B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}  # what InternViT-6B has
VARIANTS = {
    "plain": {},
    "InternViT-6B, an earlier layer": {"vision": SIX_B, "select_layer": -2},
    "tiles larger than the positions": {"force_image_size": 24},
}


def largest_difference(folder: Path, config: dict, tensors: dict, tiles: int = 2) -> float:
    """Between the loaded model and the reference, over the logits of a prompt with a picture."""
    model, parts = load_opengvlab(folder)
    image = model.config.image_token_id
    ids = torch.tensor([[3, 5, *[image] * (tiles * parts.image_seq_length), 7, 9, 250]])
    pixels = torch.randn(tiles, 3, config["force_image_size"], config["force_image_size"])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    expected = reference_logits(tensors, config, ids, pixels, image)
    assert expected.std() > 0.1
    return float((logits - expected).abs().max())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_original(tmp_path, text, variant):
    config = original_config(text, **VARIANTS[variant])
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path, config, tensors, shards=1 if variant == "plain" else 3)
    assert largest_difference(folder, config, tensors) < 2e-5


def test_biases_of_internlm2_are_split_too(tmp_path):
    config = original_config("InternLM2ForCausalLM", llm={"bias": True})
    tensors = random_tensors(config)
    assert largest_difference(write_checkpoint(tmp_path, config, tensors), config, tensors) < 2e-5


def test_long_texts_turn_slower_in_internlm2(tmp_path):
    config = original_config("InternLM2ForCausalLM", llm={"max_position_embeddings": 8, "rope_theta": 10000.0})
    tensors = random_tensors(config)
    folder = write_checkpoint(tmp_path, config, tensors)
    assert largest_difference(folder, config, tensors) < 2e-5
    unscaled = {**config, "llm_config": config["llm_config"] | {"rope_scaling": None}}
    (folder / "config.json").write_text(json.dumps(unscaled))
    assert largest_difference(folder, config, tensors) > 1e-3


def test_a_head_that_is_not_stored_is_the_embedding(tmp_path):
    config = original_config("Qwen2ForCausalLM", llm={"tie_word_embeddings": True})
    tensors = random_tensors(config)
    assert "language_model.lm_head.weight" not in tensors
    folder = write_checkpoint(tmp_path, config, tensors)
    model = load_opengvlab(folder).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert largest_difference(folder, config, tensors) < 2e-5


def test_every_tensor_is_accounted_for(tmp_path):
    config = original_config("InternLM2ForCausalLM")
    tensors = random_tensors(config)
    tensors["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(3)
    report = ConversionReport("source")
    load_opengvlab(write_checkpoint(tmp_path, config, tensors), report=report)
    assert report.num_read == len(tensors) and len(report.mapped) == len(tensors) - 1
    assert "InternLM2" in report.layout


@pytest.mark.parametrize(("asked", "expected"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_weights_keep_their_precision_unless_another_is_asked_for(tmp_path, asked, expected):
    config = original_config("Qwen2ForCausalLM")
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(config).items()}
    model = load_opengvlab(write_checkpoint(tmp_path, config, tensors), dtype=asked).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert torch.equal(model.lm_head.weight.float(), tensors["language_model.lm_head.weight"].float())


def test_saved_and_loaded_by_transformers_it_is_the_same(tmp_path):
    from transformers import InternVLForConditionalGeneration

    config = original_config("InternLM2ForCausalLM", **VARIANTS["InternViT-6B, an earlier layer"])
    model = load_opengvlab(write_checkpoint(tmp_path / "original", config, random_tensors(config))).model
    model.save_pretrained(tmp_path / "stock")
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "stock")
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert again.config.vision_feature_layer == -2 and again.config.text_config.model_type == "llama"


def processor_of(folder: Path) -> PerceptioProcessor:
    parts = load_opengvlab_processor(folder)
    return PerceptioProcessor(
        parts.image_processor,
        parts.tokenizer,
        image_seq_length=parts.image_seq_length,
        chat_template=parts.chat_template,
        num_depth_tokens=16,
        num_depth_codes=16,
        mask_image_size=32,
        crop_to_patches=parts.crop_to_patches,
    )


@pytest.mark.parametrize("text", ["Qwen2ForCausalLM", "InternLM2ForCausalLM"])
@pytest.mark.parametrize(("template", "between"), [("internvl2_5", "\n"), ("Hermes-2", ""), ("internlm2-chat", "")])
def test_prompts_are_the_original_chat(tmp_path, text, template, between):
    config = original_config(text, template=template, max_dynamic_patch=4)
    processor = processor_of(write_checkpoint(tmp_path, config, random_tensors(config)))
    inputs = encode(processor, chat(picture(40, 20), text="Segment the red ball, please."))
    places = "<IMG_CONTEXT>" * (4 * len(inputs["pixel_values"]))
    said = processor.tokenizer.decode(inputs["input_ids"][0])
    begin = "<s>" if "LM2" in text else ""
    system = said.removeprefix(begin).removeprefix("<|im_start|>system\n").partition("<|im_end|>")[0]
    assert "InternVL" in system
    query = f"<|im_start|>system\n{system}<|im_end|>{between}<|im_start|>user\n<img>{places}</img>\n"
    query += f"Segment the red ball, please.<|im_end|>{between}<|im_start|>assistant\n"
    assert said == begin + query
    assert inputs["input_ids"][0].tolist() == processor.tokenizer(query)["input_ids"]


def test_a_system_turn_of_the_user_replaces_the_original_one(tmp_path):
    config = original_config("Qwen2ForCausalLM", system_message="Say it twice.")
    template = load_opengvlab_processor(write_checkpoint(tmp_path, config, random_tensors(config))).tokenizer
    asked = [{"role": "user", "content": "Hello"}]
    assert "system\nSay it twice.<|im_end|>" in template.apply_chat_template(asked, tokenize=False)
    mine = [{"role": "system", "content": "Be short."}, *asked]
    rendered = template.apply_chat_template(mine, tokenize=False)
    assert rendered == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize("size", [(16, 16), (90, 41), (33, 70), (200, 30), (15, 11)])
def test_pictures_are_cut_into_the_original_tiles(tmp_path, size):
    """InternVL's `dynamic_preprocess`: the grid of the nearest aspect ratio, scaled bicubically, then a thumbnail."""
    config = original_config("Qwen2ForCausalLM", max_dynamic_patch=5)
    processor = processor_of(write_checkpoint(tmp_path, config, random_tensors(config)))
    image, side = picture(*size), 16
    grids = sorted({(i, j) for i in range(1, 6) for j in range(1, 6) if i * j <= 5}, key=lambda grid: grid[0] * grid[1])
    best, error = (1, 1), float("inf")
    for grid in grids:
        wrong = abs(size[0] / size[1] - grid[0] / grid[1])
        if wrong < error or (wrong == error and size[0] * size[1] > 0.5 * side * side * grid[0] * grid[1]):
            best, error = grid, wrong
    large = image.resize((side * best[0], side * best[1]))
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(best[1]) for x in range(best[0])]
    tiles = [large.crop(box) for box in boxes]
    tiles += [image.resize((side, side))] if len(tiles) > 1 else []
    pixels = np.stack([np.asarray(tile, dtype=np.float32) / 255 for tile in tiles]).transpose(0, 3, 1, 2)
    expected = (pixels - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    pixel_values = encode(processor, chat(image))["pixel_values"].numpy()
    assert pixel_values.shape == expected.shape
    np.testing.assert_allclose(pixel_values, expected, atol=1e-5)


def test_generation_ends_with_the_turn(tmp_path):
    config = original_config("Qwen2ForCausalLM")
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "_from_model_config": True}))
    model, parts = load_opengvlab(folder)
    turn_end = parts.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(model.generation_config.eos_token_id) == {7, 9, turn_end}
    assert model.generation_config.pad_token_id == parts.tokenizer.pad_token_id
    settings = {"do_sample": False, "temperature": 0.2, "top_k": 3, "max_new_tokens": 9}  # not to be saved together
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model, _ = load_opengvlab(folder)
    assert model.generation_config.max_new_tokens == 9
    model.save_pretrained(tmp_path / "saved")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is \['2'\], expected whole numbers"):
        load_opengvlab(folder)


@pytest.mark.parametrize("text", [None, "InternLM2ForCausalLM"])
def test_tokens_that_are_null_are_absent(tmp_path, text):
    """Qwen's own files have `bos_token: null`."""
    config = original_config(text or "Qwen2ForCausalLM")
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    expected = load_opengvlab(folder).processor.tokenizer("Where?")["input_ids"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": None, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_opengvlab(folder).processor.tokenizer("Where?")["input_ids"] == expected


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    config = original_config("InternLM2ForCausalLM")
    return write_checkpoint(tmp_path_factory.mktemp("original"), config, random_tensors(config))


@pytest.fixture
def folder(tmp_path, good) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"architectures": ["LlavaForConditionalGeneration"]},
            "'LlavaForConditionalGeneration', expected InternVLChat",
        ),
        ({"architectures": ["InternVLForConditionalGeneration"]}, "transformers' own layout already"),
        ({"llm_config": None}, "no llm_config"),
        ({"ps_version": "v1"}, "ps_version is 'v1'"),
        ({"use_llm_lora": 16}, "use_llm_lora is 16"),
        ({"pad2square": True}, "pad2square"),
        ({"use_thumbnail": False}, "use_thumbnail"),
        ({"template": "phi3-chat"}, "template in config.json is 'phi3-chat'"),
        ({"select_layer": 9}, "select_layer is 9; the vision model has 3 layers"),
        ({"select_layer": None}, "select_layer is None"),
        ({"llm_config.initializer_range": "wide"}, "config.json: .*initializer_range"),
        ({"llm_config.architectures": ["Phi3ForCausalLM"]}, "llm_config.architectures is 'Phi3ForCausalLM'"),
        ({"vision_config.norm_type": "batch_norm"}, "norm_type is 'batch_norm'"),
        ({"vision_config.qk_normalization": True, "vision_config.layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        # The configuration is one thing, the weights are another.
        ({"llm_config.vocab_size": 401}, r"tok_embeddings.weight is \(400, 24\), expected \(401, 24\)"),
        ({"llm_config.hidden_size": 32}, r"wqkv.weight has 48 rows, expected 64"),
        ({"vision_config.hidden_size": 32}, r"attn.qkv.(weight|bias) has 48 rows, expected 96"),
        ({"vision_config.image_size": 32}, r"position_embedding is \(1, 17, 16\), expected"),
        ({"llm_config.num_hidden_layers": 3}, "missing model.language_model.layers.2"),
        ({"llm_config.num_hidden_layers": 1}, "unexpected language_model.model.layers.1"),
        ({"llm_config.architectures": ["Qwen2ForCausalLM"]}, "unexpected language_model.output.weight"),
    ],
)
def test_what_cannot_be_expressed_or_does_not_fit_is_refused(folder, changes, named):
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        (config[part] if part else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        load_opengvlab(folder)


@pytest.mark.parametrize(("name", "named"), [("vision_model.x", "unexpected vision_model.x"), (None, "missing")])
def test_tensors_too_many_or_too_few_are_named(folder, good, name, named):
    from safetensors.torch import load_file

    tensors = load_file(good / "model.safetensors")
    if name is None:
        del tensors["mlp1.0.bias"]
        named = "missing model.multi_modal_projector.layer_norm.bias"
    else:
        tensors[name] = torch.ones(1)
    write_weights(folder, tensors)
    with pytest.raises(ValueError, match=named):
        load_opengvlab(folder)


@pytest.mark.parametrize("text", ["Qwen2ForCausalLM", "InternLM2ForCausalLM"])
def test_names_under_a_prefix_are_told(tmp_path, text):
    """As they are saved out of DataParallel."""
    config = original_config(text)
    tensors = {f"module.{name}": tensor for name, tensor in random_tensors(config).items()}
    with pytest.raises(ValueError, match=r"unexpected module\.\S+ \(and \d+ more\); missing "):
        load_opengvlab(write_checkpoint(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.model", None, "no tokenizer: expected"),
        ("tokenizer.model", b"\x00\xff\x12not a model", "not a SentencePiece model"),
        ("tokenizer_config.json", b"{}", "no added token <img>"),
        ("tokenizer_config.json", b"{", "cannot be read as JSON"),
        ("config.json", None, "config.json"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_missing_and_damaged_files_are_named(folder, file, content, named):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=named):
        load_opengvlab(folder)


def test_a_complete_tokenizer_file_is_taken_as_it_is(tmp_path):
    from transformers import PreTrainedTokenizerFast

    config = original_config("InternLM2ForCausalLM")
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    expected = load_opengvlab_processor(folder).tokenizer
    expected.save_pretrained(folder)  # the original code writes such a tokenizer.json, and names a class of its own
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "InternLM2TokenizerFast", "auto_map": {"AutoTokenizer": [None, "x.InternLM2"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(b"not looked at")
    tokenizer = load_opengvlab_processor(folder).tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nthe red ball<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def test_a_damaged_qwen2_tokenizer_is_refused(tmp_path):
    config = original_config("Qwen2ForCausalLM")
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be read"):
        load_opengvlab(folder)
