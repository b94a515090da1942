"""from_components: a Perceptio out of loaded or saved parts, and the processor that goes with it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from component_helpers import codec, mask_model, save_internvl, stock_internvl, stock_tokenizer
from helpers import assert_alike, chat, encode, picture
from transformers import (
    AutoModel,
    GotOcr2ImageProcessorPil,
    InternVLForConditionalGeneration,
    InternVLModel,
    PreTrainedTokenizerFast,
)

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio_hf.tokens import spatial_tokens

NEW = 19  # [SEG], two markers and 16 codes
GUIDE = Path(__file__).parents[2] / "docs" / "build.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock InternVL on the disk, with 7 unused rows."""
    return save_internvl(tmp_path_factory.mktemp("stock") / "internvl", padding=7, family="qwen3", tie=False)


@pytest.fixture(scope="module")
def parts():
    return mask_model(), codec()


@pytest.fixture(scope="module")
def built(folder, parts):
    model = PerceptioForConditionalGeneration.from_components(folder, *parts)
    return model, PerceptioProcessor.from_components(folder, *parts)


def prompt_ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(5, 300, (rows, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loaded_models_are_joined_and_stay_as_they_are(parts, tie, attention):
    stock = stock_internvl(400, tie=tie)
    stock.set_attn_implementation(attention)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    with torch.no_grad():
        expected = stock(input_ids=prompt_ids()).logits
        model = PerceptioForConditionalGeneration.from_components(stock, *parts)
        assert_alike(model(input_ids=prompt_ids()).logits[..., :400], expected)
        assert_alike(stock(input_ids=prompt_ids()).logits, expected)
    assert model.config.text_config._attn_implementation == attention
    assert stock.config.text_config.vocab_size == 400 == stock.lm_head.out_features
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 400 + NEW
    assert (model.config.seg_token_id, model.config.depth_end_token_id) == (400, 400 + NEW - 1)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert stock.model.language_model.layers[0].mlp.up_proj.weight.data_ptr() == (
        model.model.language_model.layers[0].mlp.up_proj.weight.data_ptr()
    )


def test_frozen_parts_and_nobody_else_s(parts):
    model = PerceptioForConditionalGeneration.from_components(stock_internvl(400), *parts)
    learning = {name.split(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert learning == {"model", "seg_projector", "mask_model"}  # the head is the embedding
    assert not any(p.requires_grad for p in model.mask_model.vision_encoder.parameters())
    assert not model.training and all(p.requires_grad for part in parts for p in part.parameters())


def test_unused_rows_are_taken_first(folder, built):
    model, processor = built
    words = len(stock_tokenizer())
    assert list(processor.added_token_ids) == list(range(words, words + NEW))
    assert model.config.seg_token_id == words
    assert model.config.text_config.vocab_size == words + NEW == len(processor.tokenizer)
    assert model.config.depth_token_ids == processor.spatial_token_ids()["depth_token_ids"]
    stock = InternVLForConditionalGeneration.from_pretrained(folder)
    for own, source in (
        (model.get_input_embeddings(), stock.get_input_embeddings()),
        (model.lm_head, stock.lm_head),
    ):
        assert torch.equal(own.weight[:words], source.weight[:words])
        assert own.weight[words:].abs().sum(1).min() > 0
        assert not (own.weight[words : words + 7] == source.weight[words:]).any()


def test_rows_that_are_enough_are_not_grown(tmp_path, parts):
    roomy = save_internvl(tmp_path / "roomy", padding=64)
    model = PerceptioForConditionalGeneration.from_components(roomy, *parts)
    assert model.config.text_config.vocab_size == len(stock_tokenizer()) + 64


def test_the_processor_has_the_source_s_settings(built):
    processor = built[1]
    pictures = processor.image_processor
    assert (pictures.size["height"], pictures.max_patches) == (32, 5) and processor.crop_to_patches
    assert tuple(pictures.image_mean) == (0.485, 0.456, 0.406)
    assert (processor.image_seq_length, processor.mask_image_size) == (16, 128)
    assert (processor.num_depth_tokens, processor.num_depth_codes) == (16, 16)
    text = processor.apply_chat_template(chat(picture()), add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>user\n<IMG_CONTEXT>\n") and text.endswith("<|im_start|>assistant\n")


def test_the_pair_writes_masks_and_depth_and_survives_saving(built, tmp_path):
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    inputs = encode(PerceptioProcessor.from_pretrained(tmp_path), chat(picture()), chat(picture(seed=1)))
    out = again.generate(**inputs, spatial="seg+depth", return_dict_in_generate=True, max_new_tokens=30)
    answers = processor.post_process_spatial(out)
    assert [answer.masks.shape for answer in answers] == [(1, 40, 48)] * 2
    assert [len(answer.depth_codes) for answer in answers] == [16, 16]
    assert again.generation_config.max_new_tokens == 77


def test_equal_seeds_give_equal_models_and_leave_torch_s_generator_alone(parts):
    stock = stock_internvl(400)

    def build(seed):
        return PerceptioForConditionalGeneration.from_components(stock, *parts, seed=seed).state_dict()

    torch.manual_seed(9)
    following = torch.rand(1)
    torch.manual_seed(9)
    first, second = build(4), build(4)
    assert torch.equal(following, torch.rand(1))
    for name, value in first.items():
        if "embed_tokens" in name or name == "lm_head.weight":  # new rows are products of what is drawn
            assert torch.equal(value[:400], second[name][:400])
            assert_alike(second[name], value, depth=2, width=400)
        else:
            assert torch.equal(value, second[name])
    other = build(5)
    changed = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert changed >= {"model.language_model.embed_tokens.weight", "seg_projector.linear_in.weight"}
    assert all(name.startswith(("seg_projector", "lm_head")) or "embed_tokens" in name for name in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_the_internvl_part_is_in_half_precision(parts, dtype):
    model = PerceptioForConditionalGeneration.from_components(
        stock_internvl(400, dtype=dtype), parts[0].to(torch.float32), parts[1]
    )
    kinds = {name.split(".")[0]: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert kinds == {
        "model": dtype,
        "lm_head": dtype,
        "seg_projector": torch.float32,
        "mask_model": torch.float32,
        "depth_model": torch.float32,
    }


def test_a_wanted_dtype_leaves_the_given_model_in_its_own(parts):
    stock = stock_internvl(400)
    model = PerceptioForConditionalGeneration.from_components(stock, *parts, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and stock.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is 'int8'; expected auto"):
        PerceptioForConditionalGeneration.from_components(stock, *parts, dtype="int8")


def test_a_model_loaded_from_a_folder_finds_its_tokenizer(folder, parts):
    loaded = InternVLForConditionalGeneration.from_pretrained(folder)
    model = PerceptioForConditionalGeneration.from_components(loaded, *parts)
    assert model.config.seg_token_id == len(stock_tokenizer())


class StockProcessor:
    """What is used of stock InternVLProcessor, which cannot be made without torchvision."""

    def __init__(self, tokenizer):
        self.image_processor = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
        self.tokenizer, self.image_seq_length, self.chat_template = tokenizer, 16, None


def test_a_given_processor_is_left_as_it_is(parts):
    tokenizer = stock_tokenizer()
    processor = PerceptioProcessor.from_components(StockProcessor(tokenizer), *(part.config for part in parts))
    assert len(tokenizer) + NEW == len(processor.tokenizer)
    stock = stock_internvl(len(tokenizer), image_token_id=processor.image_token_id)
    model = PerceptioForConditionalGeneration.from_components(stock, *parts, processor=processor)
    assert model.config.seg_token_id == len(tokenizer)


def test_tokens_a_tokenizer_has_keep_their_ids_and_rows(parts):
    tokenizer = stock_tokenizer()
    tokenizer.add_tokens(["[SEG]"], special_tokens=True)
    tokenizer.add_tokens([*spatial_tokens(16)[2:-1], "<other>"])
    processor = PerceptioProcessor.from_components(StockProcessor(tokenizer), *parts)
    stock = stock_internvl(len(tokenizer), image_token_id=processor.image_token_id)
    model = PerceptioForConditionalGeneration.from_components(stock, *parts, processor=processor)
    assert len(processor.added_token_ids) == 2 and model.config.text_config.vocab_size == len(tokenizer) + 2
    assert model.config.seg_token_id == tokenizer.convert_tokens_to_ids("[SEG]") == len(stock_tokenizer())
    old = stock.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(old)], old)
    assert model.get_input_embeddings().weight[len(old) :].abs().min() > 0


@pytest.mark.parametrize("held", [15, 17, 128])
def test_depth_tokens_of_another_codebook(parts, held):
    tokenizer = stock_tokenizer()
    tokenizer.add_tokens(spatial_tokens(held))
    with pytest.raises(ValueError, match=f"tokenizer has {held} depth tokens, but the codebook has 16 codes"):
        PerceptioProcessor.from_components(StockProcessor(tokenizer), *parts)


def test_a_tokenizer_that_takes_spatial_tokens_apart(parts):
    tokenizer = stock_tokenizer()
    vocabulary = tokenizer.backend_tokenizer.to_str().replace('"vocab":{', '"vocab":{"[SEG]":399,', 1)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(vocabulary)
    assert tokenizer.convert_tokens_to_ids("[SEG]") == 399
    with pytest.raises(ValueError, match=r"\[SEG\], but takes it apart into"):
        PerceptioProcessor.from_components(StockProcessor(tokenizer), *parts)


def test_a_tokenizer_without_picture_tokens(parts):
    plain = PreTrainedTokenizerFast(tokenizer_object=stock_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"no start_image_token, end_image_token.*not InternVL's"):
        PerceptioProcessor.from_components(StockProcessor(plain), *parts)


def test_parts_of_other_kinds(parts, built):
    sam, depth = parts
    stock, build = stock_internvl(400), PerceptioForConditionalGeneration.from_components
    for arguments, says in (
        ((built[0], sam, depth), "InternVL is a PerceptioForConditionalGeneration; expected a stock"),
        ((InternVLModel(stock.config), sam, depth), "InternVL is a InternVLModel"),
        ((stock, depth, depth), "mask decoder is a DepthVQVAE"),
        ((stock, sam, sam), "depth codec is a Sam2Model"),
    ):
        with pytest.raises(ValueError, match=says):
            build(*arguments)


def test_a_processor_of_other_parts(folder, parts, built):
    build = PerceptioForConditionalGeneration.from_components
    with pytest.raises(ValueError, match=r"processor has num_depth_tokens = 16, but the models need 4"):
        build(folder, parts[0], codec(image_size=16), processor=built[1])
    with pytest.raises(ValueError, match="image_token_id"):
        build(stock_internvl(400, image_token_id=3), *parts, processor=built[1])
    other = copy.deepcopy(built[1])
    other.image_processor.size = {"height": 64, "width": 64}
    with pytest.raises(ValueError, match="makes tiles of 64 x 64 pixels, but the vision tower takes 32 x 32"):
        build(folder, *parts, processor=other)


def test_without_the_package_the_error_says_so(parts, monkeypatch):
    """A copy of the files that travel with a checkpoint stands where the package is not installed."""
    monkeypatch.setattr("perceptio_hf.modeling.attachments._loaders", {})
    with pytest.raises(ImportError, match="from_components needs the package perceptio-hf"):
        PerceptioForConditionalGeneration.from_components(stock_internvl(400), *parts)
    with pytest.raises(ImportError, match="from_components needs the package perceptio-hf"):
        PerceptioProcessor.from_components("anything", *parts)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_internvl(tmp_path / "InternVL3-1B-hf")
    mask_model().save_pretrained("sam2.1-hiera-large")
    codec().save_pretrained("depth-codec")
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(block, {})
    assert type(AutoModel.from_pretrained("perceptio-1b")) is PerceptioForConditionalGeneration
