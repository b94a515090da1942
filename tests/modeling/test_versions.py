"""What Perceptio leans on inside transformers, whatever release is installed; each message says what changed there.

Registration has the same in `tests/test_registration.py`.
"""

import inspect
import logging
import warnings

import pytest
import torch
import transformers
from helpers import chat, encode, picture
from transformers import GenerationMixin, InternVLForConditionalGeneration, Sam2Model
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.utils import PushToHubMixin

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.modeling.modeling_perceptio import CACHE, picture_features

VERSION = f"transformers {transformers.__version__}"
INPUTS = {
    "words alone": lambda: [{"role": "user", "content": [{"type": "text", "text": "Where is the red ball?"}]}],
    "a picture": lambda: chat(picture()),
}


@pytest.fixture(params=INPUTS.values(), ids=INPUTS)
def inputs(request, processor):
    encoded = encode(processor, request.param())
    return {name: encoded[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in encoded}


@pytest.fixture
def no_deprecations(caplog):
    """Fails where transformers warns, by either of its two ways, that a name of ours has a newer one."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("error", FutureWarning)
        transformers.utils.logging.get_logger().warning_once.__func__.cache_clear()  # it says everything once only
        yield
    log.removeHandler(caplog.handler)
    assert not [said for said in map(str, caplog.get_records("call")) if "deprecated" in said]


def test_everything_that_internvl_returns_is_returned(model, inputs):
    """A new or renamed field of transformers' output arrives under its own name, with the values it has there."""
    asked = {"output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        ours = model(**inputs, **asked)
        theirs = InternVLForConditionalGeneration.forward(model, **inputs, **asked)
    lost = set(theirs.keys()) - set(ours.keys())
    assert not lost, f"{VERSION}: InternVL's output has {lost}, which Perceptio's lacks"
    assert isinstance(ours, type(theirs))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.hidden_states, theirs.hidden_states)
    torch.testing.assert_close(ours.last_hidden_state, theirs.hidden_states[-1])
    features = picture_features(ours)
    if "pixel_values" in inputs:
        torch.testing.assert_close(features, picture_features(theirs))
        assert features.shape == (1, model.config.image_seq_length, model.config.text_config.hidden_size)
    else:
        assert features is None
    assert len(model(**inputs, return_dict=False)) == len(ours.to_tuple()) - 1  # hidden_states were not asked for


def test_every_input_that_internvl_names_is_named():
    """`generate` and trainers read the signature; an input that it lacks is refused or dropped."""
    theirs = set(inspect.signature(InternVLForConditionalGeneration.forward).parameters)
    missing = theirs - set(inspect.signature(PerceptioForConditionalGeneration.forward).parameters)
    assert not missing, f"{VERSION}: InternVL's forward takes {missing}, which Perceptio's does not name"
    assert CACHE in theirs, f"{VERSION}: keys and values are no longer called {CACHE} in InternVL's forward"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_both_names(model, inputs, name, no_deprecations):
    with torch.no_grad():
        whole = model(**inputs).logits
        first = {key: value[:, :-1] if value.ndim == 2 else value for key, value in inputs.items()}
        past = model(**first, use_cache=True)[CACHE]
        last = model(input_ids=inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], **{name: past})
    torch.testing.assert_close(last.logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    assert last[CACHE].get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generation_uses_no_name_that_is_going_away(model, inputs, options, no_deprecations):
    out = model.generate(**inputs, **options, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape[1] > inputs["input_ids"].shape[1]


# What is not documented, or documented for authors of models only: (owner, name, what Perceptio does with it).
PRIVATE = [
    (PushToHubMixin, "_upload_modified_files", "overridden: puts the model card into an upload by push_to_hub"),
    (GenerationMixin, "_expand_inputs_for_generation", "overridden: repeats the tiles of pictures row by row"),
    (InternVLForConditionalGeneration, "_no_split_modules", "extended: what one device must hold whole"),
    (InternVLProcessor, "replace_image_token", "called by InternVLProcessor for each place of a picture"),
    (Sam2Model, "get_image_wide_positional_embeddings", "called: positions of SAM2's picture"),
]


@pytest.mark.parametrize(("owner", "name", "use"), PRIVATE, ids=[name for _, name, _ in PRIVATE])
def test_what_is_used_beyond_the_documentation_is_there(owner, name, use):
    assert hasattr(owner, name), f"{VERSION}: {owner.__name__}.{name} is gone. It is {use}; find what took its place"


def test_the_parts_of_sam2_that_masks_are_made_of(model):
    """`encode_mask_pixels` and `decode_masks` call SAM2's parts one by one, since `Sam2Model` cuts gradients."""
    decoder, encoder = model.mask_model.mask_decoder, model.mask_model.prompt_encoder
    needed = {
        decoder: {
            "image_embeddings",
            "image_positional_embeddings",
            "sparse_prompt_embeddings",
            "dense_prompt_embeddings",
            "multimask_output",
            "high_resolution_features",
        },
        encoder: {"input_points", "input_labels", "input_boxes", "input_masks"},
    }
    for part, names in needed.items():
        missing = names - set(inspect.signature(part.forward).parameters)
        assert not missing, f"{VERSION}: {type(part).__name__}.forward no longer takes {missing}"
    for owner, name in (
        (decoder, "conv_s0"),
        (decoder, "conv_s1"),
        (encoder, "not_a_point_embed"),
        (encoder, "image_embedding_size"),
        (model.mask_model, "no_memory_embedding"),
    ):
        assert hasattr(owner, name), f"{VERSION}: {type(owner).__name__} has no {name} any more"
