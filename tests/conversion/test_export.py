"""What stock transformers makes of an exported folder, and what Perceptio reads off its answers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_alike, chat, encode, picture, random_model
from transformers import AutoModel, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

import perceptio_hf
from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio_hf.conversion.export import export_internvl
from perceptio_hf.lab.held_out import encode_items, held_out_items
from perceptio_hf.tokens import depth_span, spatial_tokens

STOCK = """
import sys, torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration
folder, inputs, out = sys.argv[1:]
model, info = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
tokenizer, inputs = AutoTokenizer.from_pretrained(folder), torch.load(inputs)
with torch.no_grad():
    logits = model.eval()(**inputs).logits
sequences = model.generate(**inputs, do_sample=False)
texts = tokenizer.batch_decode(sequences, skip_special_tokens=False)
assert not any(name.startswith("perceptio_hf") for name in sys.modules)
torch.save({"logits": logits, "sequences": sequences, "texts": texts}, out)
"""


@pytest.fixture(scope="module")
def tiny():
    folder = perceptio_hf.tiny_checkpoint()
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_export(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "internvl"
    export_internvl(*tiny, folder)
    return folder


@pytest.fixture(scope="module")
def pair(tiny, tiny_export, tmp_path_factory) -> tuple:
    """A batch of questions about rendered scenes, and what a process without this package made of it."""
    processor, folder = tiny[1], tmp_path_factory.mktemp("stock")
    items = {item.question.kind: item for item in held_out_items(2)}
    inputs = encode_items(processor, [items["refer"], items["depth"]])
    seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    torch.save(seen, folder / "inputs.pt")
    command = [sys.executable, "-c", STOCK, str(tiny_export), str(folder / "inputs.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return inputs, torch.load(folder / "out.pt")


def test_stock_transformers_loads_it_with_the_same_logits(tiny, pair):
    inputs, stock = pair
    with torch.no_grad():
        logits = tiny[0](**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    assert_alike(stock["logits"], logits, width=1024)


def test_masks_and_depth_of_what_the_stock_model_wrote(tiny, pair):
    model, _ = tiny
    inputs, stock = pair
    ours = model.generate(**inputs, do_sample=False, spatial="auto", return_dict_in_generate=True)
    assert torch.equal(stock["sequences"], ours.sequences)
    read = model.decode_spatial(stock["sequences"], **inputs)
    assert read.well_formed == ours.well_formed == [True] * 2
    assert any(map(len, read.mask_logits)) and any(map(len, read.depth_maps)), "the questions ask for both"
    for name in ("mask_logits", "mask_scores", "depth_maps", "depth_codes", "depth_confidence"):
        for mine, theirs in zip(getattr(ours, name), getattr(read, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_text_of_an_engine_gives_its_tokens_back(tiny_export, pair):
    _, stock = pair
    tokenizer = AutoTokenizer.from_pretrained(tiny_export)
    spans = [text[text.index("<DEPTH_START>") :] for text in stock["texts"] if "<DEPTH_START>" in text]
    assert spans
    for text in spans:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert any(ids == row[-len(ids) :] for row in stock["sequences"].tolist())


def test_an_answer_that_was_begun_for_the_engine(tiny, tiny_export):
    """Without a grammar a span is asked for by its start marker."""
    model, processor = tiny
    inputs = encode_items(processor, [item for item in held_out_items(1) if item.question.kind == "count"][:1])
    start = torch.full((1, 1), model.config.depth_start_token_id)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], start], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    stock = InternVLForConditionalGeneration.from_pretrained(tiny_export).eval()
    seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    answer = processor.post_process_spatial(model.decode_spatial(stock.generate(**seen, do_sample=False), **inputs))[0]
    assert answer.well_formed and answer.depth.shape == (128, 128) and answer.text


@pytest.mark.parametrize("tie", [True, False])
def test_random_weights_tied_and_untied(processor, tmp_path, tie):
    model = random_model(processor, tie=tie)
    model.generation_config.update(temperature=0.3, do_sample=True, max_new_tokens=77)
    files = export_internvl(model, processor, tmp_path / "out")
    assert "model.safetensors" in files and not any(name.endswith(".py") for name in files)
    stock, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    inputs = encode(processor, chat(picture(), text="[SEG] what?"), chat(picture(9, 90), text="Longer, is it not?"))
    seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert_alike(stock.eval()(**seen).logits, model(**seen).logits)
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())
    kept = model.generation_config.to_dict()
    assert {name: value for name, value in stock.generation_config.to_dict().items() if value != kept[name]} == {}
    assert type(stock.config).__name__ == "InternVLConfig" and stock.config.model_type == "internvl"
    assert not {"mask_config", "depth_config", "seg_token_id", "auto_map"} & set(stock.config.to_dict())


def test_half_precision_stays(processor, tmp_path):
    model = random_model(processor).to(torch.bfloat16)
    export_internvl(model, processor, tmp_path / "out")
    assert InternVLForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_export_of_a_model_leaves_it_usable(processor, tmp_path):
    model = random_model(processor)
    inputs = encode(processor, chat(picture()))
    before = model.generate(**inputs, spatial="seg+depth", do_sample=False)
    export_internvl(model, processor, tmp_path / "out")
    assert torch.equal(model.generate(**inputs, spatial="seg+depth", do_sample=False), before)
    assert model.config.model_type == "perceptio" and model.config.has_spatial_tokens


def with_tiles(processor, crop: bool) -> PerceptioProcessor:
    parts = {name: getattr(processor, name) for name in ("image_processor", "tokenizer", "chat_template")}
    return PerceptioProcessor(
        **parts,
        image_seq_length=processor.image_seq_length,
        num_depth_tokens=processor.num_depth_tokens,
        num_depth_codes=processor.num_depth_codes,
        mask_image_size=processor.mask_image_size,
        crop_to_patches=crop,
    )


CHATS = [
    chat(picture(300, 40), text="What is near?"),
    chat(picture(33, 90), picture(64, 64), text="Ünïcode, 物体 and\nlines"),
    [
        *chat(picture(), text="Where?"),
        {"role": "assistant", "content": f"[SEG]{depth_span([3, 1])} here"},
        *chat(text="And?"),
    ],
]


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("turns", CHATS)
def test_prompts_have_the_same_ids_and_pixels(model, processor, tmp_path, crop, turns):
    """A processor made of the exported files, as stock InternVL uses them: it asks for tiles whatever they say."""
    ours = with_tiles(processor, crop)
    export_internvl(model, ours, tmp_path / "out")
    options = {"num_depth_codes": ours.num_depth_codes, "crop_to_patches": True}
    stock = PerceptioProcessor.from_pretrained(tmp_path / "out", **options)
    assert stock.crop_to_patches and stock.chat_template == ours.chat_template
    expected, inputs = encode(ours, turns), encode(stock, turns)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    tiles = expected["pixel_values"].shape[0]
    assert tiles > 2 if crop and turns is CHATS[0] else tiles >= 1


def test_the_files_are_those_of_stock_repositories(model, processor, tmp_path):
    files = export_internvl(model, processor, tmp_path / "out")
    written = {name: json.loads((tmp_path / "out" / name).read_text()) for name in files if name.endswith(".json")}
    assert written["processor_config.json"] == {
        "image_seq_length": processor.image_seq_length,
        "processor_class": "InternVLProcessor",
    }
    loaded = PerceptioProcessor.from_pretrained(tmp_path / "out", num_depth_codes=processor.num_depth_codes)
    settings = json.loads(loaded.image_processor.to_json_string())
    assert written["preprocessor_config.json"] == settings | {"processor_class": "InternVLProcessor"}
    shared = {"size", "image_mean", "image_std", "resample", "do_resize", "do_rescale", "rescale_factor"}
    videos = written["video_preprocessor_config.json"]
    assert {name: videos[name] for name in shared} == {name: settings[name] for name in shared}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert tokenizer.get_chat_template() == processor.chat_template
    assert not (set(spatial_tokens(processor.num_depth_codes)) - set(tokenizer.get_vocab()))
    assert written["tokenizer_config.json"]["processor_class"] == "InternVLProcessor"


def test_the_stock_processor_where_torchvision_is(model, processor, tmp_path):
    pytest.importorskip("torchvision", exc_type=ImportError)
    from transformers import InternVLProcessor, InternVLVideoProcessor

    for crop in (True, False):
        ours = with_tiles(processor, crop)
        export_internvl(model, ours, tmp_path / str(crop))
        stock = AutoProcessor.from_pretrained(tmp_path / str(crop))
        assert type(stock) is InternVLProcessor
        videos = json.loads((tmp_path / str(crop) / "video_preprocessor_config.json").read_text())
        del videos["processor_class"]
        for videos_of in (stock.video_processor, InternVLVideoProcessor(**videos)):
            assert json.loads(videos_of.to_json_string()) == videos
        for turns in CHATS:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            theirs, expected = stock.apply_chat_template(turns, **options), encode(ours, turns)
            assert torch.equal(theirs["input_ids"], expected["input_ids"])
            # Two steps of 8 bits apart at most, on pictures of noise: the backends round after resizing.
            torch.testing.assert_close(theirs["pixel_values"], expected["pixel_values"], atol=4e-2, rtol=0)


def test_several_chat_templates_go_along(model, processor, tmp_path):
    processor.save_pretrained(tmp_path / "own")
    processor, plain = PerceptioProcessor.from_pretrained(tmp_path / "own"), processor.chat_template
    processor.chat_template = {"default": plain, "tool_use": plain + "{# tools #}"}
    export_internvl(model, processor, tmp_path / "stock")
    assert AutoTokenizer.from_pretrained(tmp_path / "stock").chat_template == processor.chat_template
    assert (tmp_path / "stock" / "chat_template.jinja").read_text() == plain


def test_another_model_is_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="expected a PerceptioForConditionalGeneration"):
        export_internvl(torch.nn.Linear(1, 1), processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_unless_told(model, processor, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="overwrite"):
        export_internvl(model, processor, tmp_path / "out")
    export_internvl(model, processor, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "internvl"


def test_the_folder_a_model_was_loaded_from_is_never_replaced(tiny_folder, processor, tmp_path):
    saved = shutil.copytree(tiny_folder, tmp_path / "runs" / "saved")
    loaded = PerceptioForConditionalGeneration.from_pretrained(saved)
    (tmp_path / "runs" / "config.json").write_text("{}")
    for place in (saved, tmp_path / "runs"):
        with pytest.raises(ValueError, match="to be read; name another folder"):
            export_internvl(loaded, processor, place, overwrite=True)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "perceptio"


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    assert names["answer"].depth.shape == (128, 128) and names["answer"].well_formed
    response = names["sequences"][:, names["inputs"]["input_ids"].shape[1] :]
    names |= {"torch": torch, "output": SimpleNamespace(outputs=[SimpleNamespace(token_ids=response[0].tolist())])}
    exec(re.search(r"```\n(response = .*?)```", guide, re.DOTALL)[1], names)
    assert torch.equal(names["spatial"].sequences, names["sequences"])
