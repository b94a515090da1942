"""What transformers asks of every model, asked of a Perceptio whose configuration has the spatial tokens."""

import copy
import math

import pytest
import torch
from helpers import chat, encode, picture, random_model, small_config
from safetensors.torch import load_file
from torch import nn
from transformers import initialization as init
from transformers import set_seed
from transformers.quantizers.quantizers_utils import should_convert_module

from perceptio_hf import DepthVQVAE, PerceptioForConditionalGeneration


@pytest.fixture(scope="module")
def inputs(processor) -> dict[str, torch.Tensor]:
    """Two prompts of different length, each with a picture, padded on the left; nothing that only `generate` takes."""
    batch = encode(processor, chat(picture()), chat(picture(seed=1), text="Segment the red ball, and the blue box."))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture(scope="module")
def with_spans(processor, inputs) -> dict[str, torch.Tensor]:
    """The same with a response of a [SEG] and a depth span behind each, and labels."""
    ids = processor.spatial_token_ids()
    span = [ids["depth_start_token_id"], *ids["depth_token_ids"][:16], ids["depth_end_token_id"]]
    response = torch.tensor([[ids["seg_token_id"], *span]] * 2)
    tokens = torch.cat([inputs["input_ids"], response], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), response], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(response)], 1)
    return {**inputs, "input_ids": tokens, "attention_mask": mask, "labels": labels}


def own(model: nn.Module) -> nn.Module:
    """A copy that a test may change."""
    return copy.deepcopy(model)


def logits(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """As far apart as another order of additions makes them in two layers of float32."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_saved_is_loaded(model, with_spans, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PerceptioForConditionalGeneration.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    close(logits(loaded, with_spans), logits(model, with_spans))
    again = PerceptioForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())


def test_equal_calls_give_equal_results_and_dropout_has_no_part(model, with_spans):
    assert torch.equal(logits(model, with_spans), logits(model, with_spans))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_one_and_saved_once(processor, tie, tmp_path):
    model = random_model(processor, tie)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tie
    model.save_pretrained(tmp_path)
    saved = [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name or "embed_tokens" in name]
    assert len(saved) == (1 if tie else 2)
    loaded = PerceptioForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    assert torch.equal(loaded.lm_head.weight, head.weight)


def test_embeddings_can_be_replaced_and_grow(processor, with_spans):
    model = random_model(processor)
    before, rows = logits(model, with_spans), model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 10, mean_resizing=False)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == rows + 10
    assert model.lm_head.weight is model.get_input_embeddings().weight
    close(logits(model, with_spans)[..., :rows], before)
    model.resize_token_embeddings(rows)
    close(logits(model, with_spans), before)
    other = nn.Embedding(rows, model.config.text_config.hidden_size)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other


def test_embedded_tokens_are_tokens(model, with_spans):
    embeds = model.get_input_embeddings()(with_spans["input_ids"])
    rest = {name: value for name, value in with_spans.items() if name not in ("input_ids", "labels")}
    wanted = logits(model, rest | {"input_ids": with_spans["input_ids"]})
    close(logits(model, rest | {"inputs_embeds": embeds}), wanted)


def test_hidden_states_and_attentions_come_when_asked_for(model, inputs):
    eager = own(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        plain = eager(**inputs)
        out = eager(**inputs, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    text, (rows, length) = eager.config.text_config, inputs["input_ids"].shape
    assert [tuple(state.shape) for state in out.hidden_states] == [(rows, length, text.hidden_size)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [
        (rows, text.num_attention_heads, length, length)
    ] * 2
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    seen = out.attentions[0][:, :, -1].sum(-1)
    torch.testing.assert_close(seen, torch.ones_like(seen))


def test_gradients_reach_hidden_states_and_attentions(model, inputs):
    eager = own(model)
    eager.set_attn_implementation("eager")
    out = eager(**inputs, output_hidden_states=True, output_attentions=True)
    kept = [*out.hidden_states, *out.attentions]
    for value in kept:
        value.retain_grad()
    out.logits[..., 0].sum().backward()
    assert all(value.grad is not None for value in kept)


@pytest.mark.parametrize("asked", ["argument", "configuration"])
def test_a_plain_tuple_holds_the_same(model, with_spans, asked):
    other = own(model)
    whole = other(**with_spans)
    if asked == "configuration":
        other.config.return_dict = False
    found = other(**with_spans) if asked == "configuration" else other(**with_spans, return_dict=False)
    assert type(found) is tuple
    assert torch.equal(found[0], whole.loss) and torch.equal(found[1], whole.logits)
    assert len(found) == len(whole.to_tuple())


def test_a_batch_is_its_rows(model, with_spans):
    together = logits(model, with_spans)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in with_spans.items()}
        close(logits(model, alone), together[row : row + 1])


def test_padding_on_the_left_does_not_matter(model, with_spans):
    longer = dict(with_spans)
    for name, value in (("input_ids", model.generation_config.pad_token_id), ("attention_mask", 0), ("labels", -100)):
        longer[name] = nn.functional.pad(with_spans[name], (5, 0), value=value)
    mask = longer["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, longer, position_ids=places)[:, 5:]
    mask = with_spans["attention_mask"]
    wanted = logits(model, with_spans, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    real = mask.bool()
    close(found[real], wanted[real])


def test_eager_is_sdpa(model, with_spans):
    found = {}
    for kind in ("eager", "sdpa"):
        other = own(model)
        other.set_attn_implementation(kind)
        assert other.config.text_config._attn_implementation == kind
        found[kind] = logits(other, with_spans)
    real = with_spans["attention_mask"].bool()
    close(found["eager"][real], found["sdpa"][real])


def test_a_cached_step_is_a_step_of_the_whole(model, with_spans):
    whole = logits(model, with_spans)
    ids, mask = with_spans["input_ids"], with_spans["attention_mask"]
    with torch.no_grad():
        first = model(
            input_ids=ids[:, :-3],
            attention_mask=mask[:, :-3],
            pixel_values=with_spans["pixel_values"],
            use_cache=True,
        )
        rest = model(input_ids=ids[:, -3:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    close(torch.cat([first.logits, rest.logits], 1)[:, -6:], whole[:, -6:])


def test_only_the_logits_asked_for(model, with_spans):
    rest = {name: value for name, value in with_spans.items() if name != "labels"}
    whole = logits(model, rest)
    close(logits(model, rest, logits_to_keep=3), whole[:, -3:])
    close(logits(model, rest, logits_to_keep=torch.tensor([0, 5])), whole[:, [0, 5]])


def test_too_few_and_too_many_pictures_are_refused(model, inputs):
    for pixels in (inputs["pixel_values"][:1], inputs["pixel_values"].repeat(2, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"[Ii]mage"):
            model(**inputs | {"pixel_values": pixels})


def train_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.train()
    loss = model(**batch).loss
    loss.backward()
    return float(loss)


def test_one_step_of_training_moves_what_learns(model, with_spans):
    learning = own(model)
    before = {name: value.clone() for name, value in learning.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in learning.parameters() if p.requires_grad], lr=0.1)
    first = train_step(learning, with_spans)
    optimizer.step()
    optimizer.zero_grad()
    assert train_step(learning, with_spans) < first
    moved = {name for name, value in learning.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in moved) and any("multi_modal_projector" in name for name in moved)
    assert not any(name.startswith(("mask_model", "depth_model", "seg_projector")) for name in moved)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, with_spans, reentrant):
    plain, saving = own(model), own(model)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    assert all(part.gradient_checkpointing for part in saving.modules() if hasattr(part, "gradient_checkpointing"))
    losses = [train_step(plain, with_spans), train_step(saving, with_spans)]
    assert math.isclose(*losses, rel_tol=1e-5)
    gradients = dict(plain.named_parameters())
    compared = 0
    for name, parameter in saving.named_parameters():
        if parameter.grad is not None and gradients[name].grad is not None:
            close(parameter.grad, gradients[name].grad)
            compared += 1
    assert compared > 30
    saving.gradient_checkpointing_disable()
    assert not any(getattr(part, "gradient_checkpointing", False) for part in saving.modules())


def test_what_is_missing_is_initialised_as_a_new_model_is(processor):
    """Every weight and buffer, by `_init_weights` alone, on a model that was made without memory."""
    config = small_config(processor)
    config.mask_config.prompt_encoder_config.scale = 0  # of SAM2's random positions, which are a buffer
    with torch.device("meta"):
        empty = PerceptioForConditionalGeneration(copy.deepcopy(config))
    empty.to_empty(device="cpu")
    for value in empty.state_dict().values():
        value.fill_(math.nan)
    empty.init_weights()
    assert all(value.isfinite().all() for value in empty.state_dict().values())
    fresh = PerceptioForConditionalGeneration(copy.deepcopy(config))
    other = dict(fresh.named_buffers())
    assert all(torch.equal(value, other[name]) for name, value in empty.named_buffers())
    for (name, value), (_, new) in zip(empty.named_parameters(), fresh.named_parameters(), strict=True):
        if value.numel() > 200:
            assert math.isclose(float(value.std()), float(new.std()), rel_tol=0.5, abs_tol=1e-3), name


@pytest.mark.parametrize("part", ["model", "codec"])
def test_buffers_need_no_luck(processor, part):
    """What `__init__` puts into buffers is what `_init_weights` does (as above, without SAM2's random positions)."""
    config = small_config(processor)
    config.mask_config.prompt_encoder_config.scale = 0
    kind, config = (PerceptioForConditionalGeneration, config) if part == "model" else (DepthVQVAE, config.depth_config)
    with init.no_init_weights():
        bare = kind(copy.deepcopy(config))
    set_seed(1)
    whole = kind(copy.deepcopy(config))
    assert len(dict(bare.named_buffers())) >= 3
    for name, value in bare.named_buffers():
        assert torch.equal(value, dict(whole.named_buffers())[name]), name


def test_what_stays_float32_does_so_at_loading(tiny_folder):
    half = PerceptioForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float16)
    assert not half._keep_in_fp32_modules & half._keep_in_fp32_modules_strict
    ours = ("mask_model.", "depth_model.", "seg_projector.")
    for dtype, model in (
        (torch.float16, half),
        (torch.bfloat16, PerceptioForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16)),
    ):
        for name, value in model.state_dict().items():
            assert value.dtype == (torch.float32 if name.startswith(ours) else dtype), name
    layers = [name for name, part in half.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    kept = [name for name in layers if not should_convert_module(name, list(half._keep_in_fp32_modules))]
    assert kept == [name for name in layers if name.startswith(ours)]  # by quantisation


def test_parameters_are_on_the_model_and_nowhere_else(processor, with_spans):
    """A tensor that is neither a parameter nor a buffer would stay behind without memory."""
    with torch.device("meta"):
        model = PerceptioForConditionalGeneration(small_config(processor)).eval()
    model.to_empty(device="cpu")
    model.init_weights()
    assert logits(model, with_spans).isfinite().all()


def test_a_forward_pass_is_one_graph(model, with_spans):
    torch._dynamo.reset()
    batch = {name: value for name, value in with_spans.items() if name != "labels"}
    found = torch.compile(own(model), backend="eager")(**batch, use_cache=False).logits
    close(found, logits(model, batch, use_cache=False))
