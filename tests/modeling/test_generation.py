"""The span grammar under every decoding strategy, and masks and depth made during generation."""

import copy

import pytest
import torch
from helpers import assert_alike, chat, encode, picture
from transformers import GenerationConfig

from perceptio_hf.modeling.span_grammar import required_new_tokens
from perceptio_hf.tokens import depth_span, read_sequence

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 8.0, "top_k": 0},
    "several samples": {"do_sample": True, "temperature": 8.0, "top_k": 0, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "temperature": 5.0},
    "no cache": {"use_cache": False},
    "no repeats": {"no_repeat_ngram_size": 1},
}
EXPECTED = {"seg": (True, 0), "depth": (False, 1), "seg+depth": (True, 1), "none": (False, 0)}


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 40, "return_dict_in_generate": True, **options})


def read_rows(model, out):
    words = model.spatial_vocabulary()
    return [read_sequence(ids, words, out.prompt_length) for ids in out.sequences.tolist()]


@pytest.mark.parametrize("spatial", ["auto", "none", "seg", "depth", "seg+depth"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_obeys_the_grammar(model, processor, strategy, spatial):
    inputs = encode(processor, chat(picture(), text="Where is it?"), chat(picture(30, 60), text="What is red here?"))
    out = generate(model, inputs, spatial=spatial, **STRATEGIES[strategy])
    rows = read_rows(model, out)
    assert all(row.well_formed for row in rows) and all(out.well_formed)
    if spatial in EXPECTED:
        has_seg, spans = EXPECTED[spatial]
        assert all(bool(row.segs) == has_seg and len(row.spans) == spans for row in rows)
    assert [len(masks) for masks in out.mask_logits] == [len(row.segs) for row in rows]
    assert [len(maps) for maps in out.depth_maps] == [len(row.spans) for row in rows]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_and_depth_need_no_second_pass(model, processor, strategy, monkeypatch):
    """They equal those of one pass over the finished sequence, which is how a foreign engine's output is read."""
    inputs = encode(processor, chat(picture()), chat(picture(30, 60), text="What is red here, and what is blue?"))
    replays = []
    replay = model._replay
    monkeypatch.setattr(model, "_replay", lambda *args: replays.append(1) or replay(*args))
    out = generate(model, inputs, spatial="seg+depth", **STRATEGIES[strategy])
    assert not replays
    again = model.decode_spatial(out.sequences, **inputs)
    assert replays == [1]
    spread = torch.cat(again.mask_logits).std()
    assert spread > 1e-2  # or the comparison below would say nothing
    for ours, theirs in zip(out.mask_logits, again.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(out.depth_confidence, again.depth_confidence, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    for ours, theirs in zip(out.depth_maps, again.depth_maps, strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize("config", [None, GenerationConfig(max_new_tokens=40, return_dict_in_generate=True)], ids=bool)
def test_amid_training_with_gradient_checkpointing(model, processor, config):
    """As a callback has it that forgets `model.eval()`: layers then keep no cache, so that each pass reads all."""
    inputs = encode(processor, chat(picture()), chat(picture(30, 60), text="What is red here?"))
    expected = generate(model, inputs, spatial="seg+depth")
    busy = copy.deepcopy(model).train()
    busy.gradient_checkpointing_enable()
    options = (
        {"max_new_tokens": 40, "return_dict_in_generate": True} if config is None else {"generation_config": config}
    )
    out = busy.generate(**inputs, spatial="seg+depth", **options)
    assert torch.equal(out.sequences, expected.sequences) and busy.training
    for ours, theirs in zip(out.mask_logits, expected.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_ten_thousand_samples_at_high_temperature_are_well_formed(model, processor):
    inputs = encode(processor, chat(picture()))
    options = {"do_sample": True, "temperature": 50.0, "top_k": 0, "num_return_sequences": 1000, "max_new_tokens": 28}
    words, spans = model.spatial_vocabulary(), 0
    for seed in range(10):
        torch.manual_seed(seed)
        rows = model.generate(**inputs, **options)
        read = [read_sequence(ids, words, inputs.input_ids.shape[1]) for ids in rows.tolist()]
        assert all(row.well_formed for row in read)
        spans += sum(len(row.spans) for row in read)
    assert spans > 100  # the model did open spans, so the grammar had work to do


def test_without_the_grammar_the_same_samples_are_malformed(model, processor):
    inputs = encode(processor, chat(picture()))
    plain = super(type(model).__mro__[1], model).generate
    torch.manual_seed(0)
    rows = plain(
        input_ids=inputs.input_ids.repeat(200, 1),
        pixel_values=inputs.pixel_values.repeat(200, 1, 1, 1),
        do_sample=True,
        temperature=50.0,
        top_k=0,
        max_new_tokens=28,
    )
    words = model.spatial_vocabulary()
    read = [read_sequence(ids, words, inputs.input_ids.shape[1]) for ids in rows.tolist()]
    assert sum(not row.well_formed for row in read) > 100


def test_plain_ids_without_return_dict(model, processor):
    inputs = encode(processor, chat(picture()))
    ids = model.generate(**inputs, spatial="depth", max_new_tokens=30)
    assert isinstance(ids, torch.Tensor) and ids.shape[0] == 1


def test_a_batch_equals_its_rows(model, processor):
    chats = [chat(picture(seed=1), text="Where?"), chat(picture(70, 20, seed=2), text="What is near, what is far?")]
    together = generate(model, encode(processor, *chats), spatial="seg+depth")
    for row, single in enumerate(chats):
        alone = generate(model, encode(processor, single), spatial="seg+depth")
        ours = together.sequences[row, together.prompt_length :].tolist()
        theirs = alone.sequences[0, alone.prompt_length :].tolist()
        assert ours[: len(theirs)] == theirs
        torch.testing.assert_close(together.mask_logits[row], alone.mask_logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["greedy", "beams", "several samples"])
def test_several_pictures_have_a_span_each(model, processor, strategy):
    inputs = encode(processor, chat(picture(seed=1), picture(20, 30, seed=2)), chat(picture(seed=3)))
    out = generate(model, inputs, spatial="seg+depth", max_new_tokens=60, **STRATEGIES[strategy])
    copies = out.sequences.shape[0] // 2
    assert out.depth_pictures == [[0, 1]] * copies + [[0]] * copies
    assert all(set(pictures) == {0, 1} for pictures in out.mask_pictures[:copies])
    answers = processor.post_process_spatial(out)
    assert [len(answer.pictures) for answer in answers] == [2] * copies + [1] * copies
    assert answers[0].pictures[1].depth.shape == (30, 20) and answers[0].pictures[1].masks.shape[1:] == (30, 20)
    again = model.decode_spatial(out.sequences, **inputs)
    for ours, theirs in zip(out.mask_logits, again.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_several_turns(model, processor):
    codes = [1] * model.config.num_depth_tokens
    first = [*chat(picture(), text="Where?"), {"role": "assistant", "content": "[SEG]" + depth_span(codes) + "There."}]
    inputs = encode(processor, [*first, {"role": "user", "content": "And the box?"}])
    out = generate(model, inputs, spatial="seg+depth")
    assert out.well_formed == [True] and len(out.depth_maps[0]) == 1
    assert all(seg.position >= out.prompt_length for seg in read_rows(model, out)[0].segs)


def test_a_span_begun_in_the_prompt_is_finished(model, processor):
    inputs = encode(processor, chat(picture()))
    words = model.spatial_vocabulary()
    given = torch.tensor([[words.depth_start, words.codes[3], words.codes[5]]])
    inputs["input_ids"] = torch.cat([inputs.input_ids, given], 1)
    inputs["attention_mask"] = torch.ones_like(inputs.input_ids)
    out = generate(model, inputs, spatial="none")
    assert out.depth_codes[0][0, :2].tolist() == [3, 5] and out.well_formed == [True]
    confidence = out.depth_confidence[0][0].flatten()
    assert confidence[:2].isnan().all()  # nobody chose these
    assert not confidence[2:].isnan().any()


def test_seg_as_the_very_last_token_still_gets_its_mask(model, processor):
    inputs = encode(processor, chat(picture()))
    out = generate(model, inputs, spatial="seg", max_new_tokens=1)
    again = model.decode_spatial(out.sequences, **inputs)
    assert_alike(out.mask_logits[0], again.mask_logits[0], depth=30)
    assert out.mask_logits[0].shape[0] == 1


@pytest.mark.parametrize("options", [{}, {"spatial_decoding": "sequential"}])
def test_seg_may_end_a_response_that_goes_on_from_a_cache(model, processor, options, monkeypatch):
    """Its state is then read with the cache: a pass over the sequence would see no picture."""
    inputs = encode(processor, chat(picture(seed=1), text="Where?"), chat(picture(30, 60), text="What is red here?"))
    first = generate(model, inputs, spatial="none", max_new_tokens=3)
    ids = torch.cat([first.sequences, inputs.input_ids[:, -4:]], 1)
    mask = torch.cat([inputs.attention_mask, torch.ones_like(ids[:, inputs.input_ids.shape[1] :])], 1)
    given = {"input_ids": ids, "attention_mask": mask, "mask_pixel_values": inputs.mask_pixel_values}
    ends = {"spatial": "seg", "eos_token_id": model.config.seg_token_id, **options}
    fresh = {**given, "pixel_values": inputs.pixel_values}
    out = generate(model, fresh, **ends)
    expected = model.decode_spatial(out.sequences, **{**fresh, "input_ids": ids})
    monkeypatch.setattr(model, "_replay", lambda *args: pytest.fail("a second pass"))
    cache = {name: first[name] for name in ("cache", "past_key_values") if name in first}
    again = generate(model, {**given, **dict(list(cache.items())[:1])}, **ends)
    for found in (out, again):
        assert torch.equal(found.sequences, out.sequences) and (found.sequences[:, -1] == ends["eos_token_id"]).all()
        assert int((found.get("cache") or found["past_key_values"]).get_seq_length()) == found.sequences.shape[1] - 1
        for ours, theirs in zip(found.mask_logits, expected.mask_logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_padding_is_known_without_an_attention_mask(model, processor):
    """As `generate` knows it, of which sequences are read the same."""
    inputs = encode(processor, chat(picture()), chat(picture(30, 60), text="What is red here, and what is blue?"))
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    out = generate(model, bare, spatial="seg+depth")
    assert torch.equal(out.sequences, generate(model, inputs, spatial="seg+depth").sequences)
    again = model.decode_spatial(out.sequences, **bare)
    for ours, theirs in zip(out.mask_logits, again.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sequences_that_show_pictures_are_not_read_without_them(model, processor):
    inputs = encode(processor, chat(picture()))
    blind = {key: value for key, value in inputs.items() if key != "pixel_values"}
    said = torch.tensor([[model.config.seg_token_id, 5]])
    with pytest.raises(ValueError, match="no pixel_values came"):
        model.decode_spatial(torch.cat([inputs.input_ids, said], 1), **blind)
    plain = model.decode_spatial(torch.cat([inputs.input_ids, said[:, 1:]], 1), **blind)
    assert plain.well_formed == [True] and len(plain.mask_logits[0]) == 0, "nothing is to be read"


def test_each_picture_is_encoded_once_and_only_for_seg(model, processor, monkeypatch):
    seen, decoded = [], []
    encoder, decoder = model.mask_model.vision_encoder, model.mask_model.mask_decoder
    encode_once, decode_once = encoder.forward, decoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels, **kw: seen.append(len(pixels)) or encode_once(pixels, **kw))
    monkeypatch.setattr(
        decoder, "forward", lambda **kw: decoded.append(len(kw["image_embeddings"])) or decode_once(**kw)
    )
    inputs = encode(processor, chat(picture(seed=1)), chat(picture(seed=2)))
    generate(model, inputs, spatial="depth")
    assert seen == [] and decoded == []
    out = generate(model, inputs, spatial="seg", do_sample=True, num_return_sequences=3)
    assert seen == [2] and decoded == [sum(len(masks) for masks in out.mask_logits)]


def test_foreign_sequences_may_be_broken(model, processor):
    inputs = encode(processor, chat(picture()), chat(picture(seed=2)))
    words = model.spatial_vocabulary()
    broken = torch.tensor([words.seg, words.depth_start, words.codes[0], words.depth_end, words.codes[1]])
    out = model.decode_spatial(torch.cat([inputs.input_ids, broken.repeat(2, 1)], 1), **inputs)
    answers = processor.post_process_spatial(out)
    assert [answer.well_formed for answer in answers] == [False, False]
    assert answers[0].depth is None and answers[0].depth_codes is None and len(answers[0].masks) == 1


def test_text_only_prompts_work_and_cannot_hold_spans(model, processor):
    inputs = encode(processor, [{"role": "user", "content": "What is two and two?"}])
    out = generate(model, inputs, do_sample=True, temperature=50.0, num_return_sequences=20)
    assert all(len(maps) == 0 for maps in out.depth_maps)
    with pytest.raises(ValueError, match="needs a picture"):
        generate(model, inputs, spatial="depth")


def test_errors_come_before_generation(model, processor, monkeypatch):
    inputs = encode(processor, chat(picture()))
    monkeypatch.setattr(model, "forward", lambda **kwargs: pytest.fail("generation had begun"))
    span = model.config.num_depth_tokens + 2
    with pytest.raises(ValueError, match=f"needs {span} for its spans"):
        generate(model, inputs, spatial="depth", max_new_tokens=span - 1)
    with pytest.raises(ValueError, match="'seg\\+depth'"):
        generate(model, inputs, spatial="both")
    with pytest.raises(ValueError, match="mask_pixel_values"):
        generate(model, {**inputs, "mask_pixel_values": None}, spatial="seg")
    too_long = [model.config.depth_start_token_id, *[model.config.depth_token_ids[0]] * span]
    ids = torch.cat([inputs.input_ids, torch.tensor([too_long])], 1)
    with pytest.raises(ValueError, match="ends in a depth span"):
        generate(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="do not begin with input_ids"):
        model.decode_spatial(inputs.input_ids[:, 1:], **inputs)
    with pytest.raises(ValueError, match=r"max_length counts the prompt's \d+ too"):
        generate(model, inputs, spatial="none", max_new_tokens=None, max_length=5)
    for name in ("mask_pixel_values", "original_sizes"):
        more = {**inputs, name: torch.cat([inputs[name], inputs[name]])}
        with pytest.raises(ValueError, match=f"{name} has 2 rows, but the prompts show 1 pictures"):
            generate(model, more, spatial="seg")
        with pytest.raises(ValueError, match=f"{name} has 2 rows, but the prompts show 1 pictures"):
            model.decode_spatial(inputs.input_ids, **more)


def test_the_shortest_forced_response_fits_exactly(model, processor):
    inputs = encode(processor, chat(picture(), picture(seed=1)))
    for spatial in ("seg", "depth", "seg+depth"):
        needed = required_new_tokens(spatial, 2, model.config.num_depth_tokens + 2)
        out = generate(model, inputs, spatial=spatial, max_new_tokens=needed)
        assert out.well_formed == [True], spatial
        assert out.sequences.shape[1] - out.prompt_length == needed


def test_the_default_length_holds_a_span(model, processor):
    inputs = encode(processor, chat(picture()))
    torch.manual_seed(0)
    out = model.generate(**inputs, spatial="seg+depth", return_dict_in_generate=True)
    assert out.well_formed == [True] and len(out.depth_maps[0]) == 1


TEXT_ONLY = [{"role": "user", "content": "What is two and two?"}]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("spatial", ["auto", "none", "seg", "depth", "seg+depth"])
def test_rows_with_and_without_pictures_share_a_batch(model, processor, spatial, order):
    """A row without a picture has neither masks nor depth, and the other one's are its own."""
    chats = [chat(picture(seed=1), text="Give me the mask of the ball."), TEXT_ONLY][::order]
    inputs = encode(processor, *chats)
    out = generate(model, inputs, spatial=spatial, do_sample=True, temperature=8.0, top_k=0, num_return_sequences=5)
    rows = read_rows(model, out)
    shown = [order == 1] * 5 + [order == -1] * 5
    for row, has_picture in zip(rows, shown, strict=True):
        if not has_picture:
            assert not row.segs and not row.spans
        elif spatial in EXPECTED:
            assert (bool(row.segs), len(row.spans)) == EXPECTED[spatial]
    assert [len(masks) for masks in out.mask_logits] == [len(row.segs) for row in rows]
    again = model.decode_spatial(out.sequences, **inputs)
    for ours, theirs in zip(out.mask_logits, again.mask_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_masks_lie_on_the_own_rows_picture(model, processor):
    chats = [TEXT_ONLY, chat(picture(seed=1)), TEXT_ONLY, chat(picture(20, 30, seed=2))]
    out = generate(model, encode(processor, *chats), spatial="seg")
    for row in (1, 3):
        alone = generate(model, encode(processor, chats[row]), spatial="seg")
        torch.testing.assert_close(out.mask_logits[row], alone.mask_logits[0], atol=1e-4, rtol=1e-4)
    assert [len(masks) for masks in out.mask_logits][::2] == [0, 0]
    assert [len(sizes) for sizes in out.picture_sizes] == [0, 1, 0, 1]


def test_foreign_text_without_a_picture_has_no_masks(model, processor):
    inputs = encode(processor, TEXT_ONLY, chat(picture()))
    words = model.spatial_vocabulary()
    said = torch.tensor([[words.seg, min(words.turn_ends)], [words.seg, min(words.turn_ends)]])
    out = model.decode_spatial(torch.cat([inputs.input_ids, said], 1), **inputs)
    assert [len(masks) for masks in out.mask_logits] == [0, 1] and out.well_formed == [False, True]


def test_a_second_question_encodes_no_picture_again(model, processor, monkeypatch):
    """The language model's cache and the kept features stand for the pictures; masks are those of a fresh start."""
    inputs = encode(processor, chat(picture(seed=1), picture(seed=2)))
    seen = []
    for name, part in (("tower", model.model.vision_tower), ("encoder", model.mask_model.vision_encoder)):
        forward = part.forward
        monkeypatch.setattr(part, "forward", lambda *a, n=name, f=forward, **kw: seen.append(n) or f(*a, **kw))
    with model.keep_mask_features(pictures=2):
        first = generate(model, inputs, spatial="seg")
        assert sorted(seen) == ["encoder", "tower"]
        ids = torch.cat([first.sequences, inputs.input_ids[:, -4:]], 1)
        given = {"input_ids": ids, "mask_pixel_values": inputs.mask_pixel_values.clone()}
        name = "cache" if "cache" in first else "past_key_values"  # 5.24 still has the older name beside the newer
        cached = {name: first[name]}
        second = generate(model, {**given, **cached}, spatial="seg")
        assert len(seen) == 2 and len(second.mask_logits[0])
        fresh = generate(model, {**given, "pixel_values": inputs.pixel_values}, spatial="seg")
        assert seen[2:] == ["tower"]
        other = encode(processor, chat(picture(seed=3)), chat(picture(seed=1)))
        generate(model, other, spatial="seg")
        assert seen[3:] == ["tower", "encoder"], "one of the two pictures is new"
    assert torch.equal(second.sequences, fresh.sequences)
    again = generate(model, {**given, "pixel_values": inputs.pixel_values}, spatial="seg")
    assert seen[-1] == "encoder", "behind the context nothing is kept"
    torch.testing.assert_close(second.mask_logits[0], again.mask_logits[0], atol=1e-4, rtol=1e-4)
    for wrong in (0, None, 2.5):
        with pytest.raises(ValueError, match="keep 1 or more"), model.keep_mask_features(wrong):
            pass


def test_contexts_that_overlap_leave_nothing_behind(model):
    """Two threads of a server: the first to come is the first to go."""
    one, two = model.keep_mask_features(), model.keep_mask_features(2)
    for step in (one.__enter__, two.__enter__):
        step()
    one.__exit__(None, None, None)
    assert model._mask_features[-1].pictures == 2
    two.__exit__(None, None, None)
    assert model._mask_features == ()


def test_kept_features_have_a_bound(model, processor, monkeypatch):
    """Those of the pictures that were used last; also where one call needs more than are kept."""
    encoder, seen = model.mask_model.vision_encoder, []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x, **kwargs: seen.append(len(x)) or forward(x, **kwargs))
    side = processor.mask_image_size
    states, pixels = torch.randn(4, model.config.text_config.hidden_size), torch.rand(4, 3, side, side)
    with torch.no_grad(), model.keep_mask_features(pictures=2):
        for pictures, encoded in ([0], 1), ([1], 1), ([0], 0), ([2], 1), ([0], 0), ([1], 1), ([0, 1, 2, 3], 2):
            seen.clear()
            masks, _ = model.predict_masks(states[: len(pictures)], pixels, pictures)
            assert sum(seen) == encoded, pictures
            assert len(model._mask_features[-1]._kept) <= 2
    torch.testing.assert_close(masks, model.predict_masks(states, pixels, [0, 1, 2, 3])[0])
