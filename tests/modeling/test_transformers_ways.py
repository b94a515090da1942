"""The ways transformers lets one generate, load and compile, on a model with spatial tokens."""

import warnings

import pytest
import torch
from helpers import chat, encode, picture, random_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.generation import GenerateDecoderOnlyOutput

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.tokens import read_sequence

TEXT_ONLY = [{"role": "user", "content": "Where is the red ball?"}]


@pytest.fixture(scope="module")
def inputs(processor):
    return encode(processor, chat(picture()))


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 40, "return_dict_in_generate": True, **options})


def spans_of(model, ids, start):
    rows = [read_sequence(row, model.spatial_vocabulary(), start) for row in ids.tolist()]
    return [(len(row.segs) > 0, len(row.spans)) for row in rows]


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}])
def test_a_static_cache_keeps_every_state(model, inputs, strategy, monkeypatch):
    expected = generate(model, inputs, spatial="seg+depth", **strategy)
    monkeypatch.setattr(model, "_replay", lambda *args: pytest.fail("a second pass"))
    out = generate(model, inputs, spatial="seg+depth", cache_implementation="static", **strategy)
    assert torch.equal(out.sequences, expected.sequences)
    assert not out.depth_confidence[0].isnan().any()
    torch.testing.assert_close(out.depth_confidence[0], expected.depth_confidence[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(out.mask_logits[0], expected.mask_logits[0], atol=1e-4, rtol=1e-4)


def assistant(name: str, model, processor):
    config = model.config.to_dict()
    if name == "internvl":
        shared = {key: config[key] for key in ("image_token_id", "image_seq_length", "downsample_ratio")}
        internvl = InternVLConfig(vision_config=config["vision_config"], text_config=config["text_config"], **shared)
        made = InternVLForConditionalGeneration(internvl).eval()
    elif name == "text model":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
        vocabulary = config["text_config"]["vocab_size"]
        made = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, num_hidden_layers=1, **sizes)).eval()
    else:
        return model if name == "itself" else random_model(processor, seed=3)
    made.generation_config.eos_token_id = model.generation_config.eos_token_id
    return made


@pytest.mark.parametrize("returns_dict", [True, False])
@pytest.mark.parametrize("name", ["itself", "perceptio", "internvl", "text model", None])
def test_whoever_drafts_the_result_is_the_same(model, processor, inputs, name, returns_dict):
    expected = generate(model, inputs, spatial="seg+depth")
    if name == "text model" and not hasattr(GenerationMixin, "_expand_multimodal_outputs"):
        with pytest.raises(ValueError, match="reads no pictures"):
            generate(model, inputs, assistant_model=assistant(name, model, processor))
        return
    helper = {"assistant_model": assistant(name, model, processor)} if name else {"prompt_lookup_num_tokens": 3}
    out = generate(model, inputs, spatial="seg+depth", return_dict_in_generate=returns_dict, **helper)
    assert torch.equal(out.sequences if returns_dict else out, expected.sequences)
    if returns_dict:
        torch.testing.assert_close(out.mask_logits[0], expected.mask_logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.depth_confidence[0], expected.depth_confidence[0], atol=1e-4, rtol=1e-3)


def test_a_loop_of_the_callers_own(model, inputs):
    """It need not call what transformers' own loops call after every step."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, pixel_values, **kwargs):
        while input_ids.shape[1] < generation_config.max_length:
            logits = model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits[:, -1].float()
            input_ids = torch.cat([input_ids, logits_processor(input_ids, logits).argmax(-1)[:, None]], 1)
        return GenerateDecoderOnlyOutput(sequences=input_ids)

    options = {"spatial": "seg+depth", "eos_token_id": 10**6}
    expected = generate(model, inputs, **options)
    out = generate(model, inputs, custom_generate=loop, **options)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.mask_logits[0], expected.mask_logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.depth_confidence[0], expected.depth_confidence[0], atol=1e-4, rtol=1e-3)


def test_it_drafts_for_a_stock_model(model, processor, inputs):
    stock = assistant("internvl", model, processor)
    plain = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    expected = stock.generate(**plain, max_new_tokens=10)
    assert torch.equal(stock.generate(**plain, max_new_tokens=10, assistant_model=model), expected)


def test_the_generation_configuration_carries_spatial(model, processor, inputs, tmp_path):
    start = inputs.input_ids.shape[1]
    config = GenerationConfig(spatial="seg+depth", max_new_tokens=40, eos_token_id=model.generation_config.eos_token_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spans_of(model, model.generate(**inputs, generation_config=config), start) == [(True, 1)]
    out = generate(model, inputs, generation_config=config, spatial="none", max_new_tokens=None)
    assert spans_of(model, out.sequences, start) == [(False, 0)], "an argument of the call wins"

    model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = PerceptioForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.generation_config.spatial == "seg+depth"
    assert spans_of(model, loaded.generate(**inputs), start) == [(True, 1)]
    other = GenerationConfig(max_new_tokens=40)  # says nothing of spatial: the model's own setting stays
    assert spans_of(model, loaded.generate(**inputs, generation_config=other), start) == [(True, 1)]
    with pytest.raises(ValueError, match="'both' is unknown"):
        model.generate(**inputs, generation_config=GenerationConfig(spatial="both"))


def test_what_the_given_configuration_leaves_open_the_models_says(model, inputs, monkeypatch):
    """As transformers has it; what came with the call wins."""
    own, given = model.generation_config, GenerationConfig(eos_token_id=10**6)
    for name, value in {"max_new_tokens": 7, "return_dict_in_generate": True}.items():
        monkeypatch.setattr(own, name, value)
    start = inputs.input_ids.shape[1]
    out = model.generate(**inputs, generation_config=given, spatial="seg")
    assert out.sequences.shape[1] == start + 7 and len(out.mask_logits[0])
    longer = GenerationConfig(eos_token_id=10**6, max_length=start + 9, return_dict_in_generate=False)
    assert model.generate(**inputs, generation_config=longer).shape[1] == start + 9
    assert model.generate(**inputs, generation_config=longer, max_new_tokens=3).shape[1] == start + 3


def test_a_pipeline_honours_it(model, processor, monkeypatch):
    from transformers import pipeline

    def answer(**options):
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        return ask(text=chat(picture()), return_full_text=False, max_new_tokens=40, **options)[0]["generated_text"]

    assert not answer(generate_kwargs={"spatial": "none"}).startswith("<DEPTH_START>")
    monkeypatch.setattr(model.generation_config, "spatial", "depth", raising=False)
    assert answer().startswith("<DEPTH_START>")
    assert not answer(generate_kwargs={"spatial": "none"}).startswith("<DEPTH_START>")


@pytest.mark.parametrize("beams", [1, 2])
def test_from_embeddings(model, processor, beams):
    inputs = encode(processor, TEXT_ONLY)
    embeds = model.get_input_embeddings()(inputs.input_ids)
    expected = generate(model, inputs, num_beams=beams)
    out = model.generate(
        inputs_embeds=embeds, max_new_tokens=40, num_beams=beams, return_dict_in_generate=True, spatial="none"
    )
    assert torch.equal(out.sequences, expected.sequences[:, inputs.input_ids.shape[1] :])
    assert out.prompt_length == 0 and out.well_formed == [True] and len(out.depth_maps[0]) == 0
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=40, num_beams=beams), out.sequences)
    with pytest.raises(ValueError, match="needs input_ids"):
        model.generate(inputs_embeds=embeds, spatial="depth")


def test_embeddings_of_a_prompt_whose_ids_are_known(model, inputs):
    """Prompt tuning: the ids say what pictures there are, the embeddings what is read."""
    expected = generate(model, inputs, spatial="seg+depth")
    embeds = model.get_input_embeddings()(inputs.input_ids)
    tiles = model.model.get_image_features(
        pixel_values=inputs.pixel_values,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    places = (inputs.input_ids == model.config.image_token_id)[..., None].expand_as(embeds)
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}
    out = generate(model, given, inputs_embeds=embeds.masked_scatter(places, tiles), spatial="seg+depth")
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.mask_logits[0], expected.mask_logits[0], atol=1e-4, rtol=1e-4)


def test_without_any_prompt(model):
    out = model.generate(max_new_tokens=5, bos_token_id=3)
    assert out.shape == (1, 6) and spans_of(model, out, 1) == [(False, 0)]
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(max_new_tokens=5)


def test_forward_compiles_into_one_graph(model, processor, inputs):
    pixels = {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    torch._dynamo.reset()
    for given in (pixels, encode(processor, TEXT_ONLY)):
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_fast_attention_is_for_internvl_only(model, implementation, tmp_path):
    config = type(model.config)(**model.config.to_dict())
    config._attn_implementation = implementation
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == implementation
    for part in (config.mask_config, config.mask_config.vision_config, config.depth_config):
        assert part._attn_implementation != implementation


def test_masks_under_flex_attention(processor, inputs, tmp_path):
    model = random_model(processor)
    model.save_pretrained(tmp_path)
    ids = torch.cat([inputs.input_ids, torch.full((1, 1), model.config.seg_token_id)], 1)
    given = {"input_ids": ids, "pixel_values": inputs.pixel_values, "mask_pixel_values": inputs.mask_pixel_values}
    loaded = PerceptioForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention").eval()
    assert loaded.model.language_model.config._attn_implementation == "flex_attention"
    assert loaded.mask_model.mask_decoder.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(**given).mask_logits
        torch.testing.assert_close(loaded(**given).mask_logits, expected, atol=1e-4, rtol=1e-4)
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**given).mask_logits, expected, atol=1e-4, rtol=1e-4)


def test_data_parallel_is_refused(model, inputs):
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="torchrun"):
        replica(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values)


def test_spatial_rows_are_not_cut_off(processor):
    model = random_model(processor)
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(
        ValueError,
        match=rf"Keep at least {max(model.config.depth_end_token_id, *model.config.depth_token_ids) + 1} rows",
    ):
        model.resize_token_embeddings(model.config.seg_token_id)
    assert model.resize_token_embeddings(rows + 8).num_embeddings == rows + 8
