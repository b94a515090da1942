"""Marks `Image-k:` are found in token ids, however a tokenizer spells them."""

import copy

import pytest
import torch
from helpers import chat, depth_config, encode, picture
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from perceptio_hf import PerceptioConfig
from perceptio_hf.lab.lessons.model import tiny_processor
from perceptio_hf.tokens import SpatialVocabulary, picture_mark, read_sequence

CORPUS = [
    *[f"Image-{number}: the cat\nImage-{number}:\nIn Image-{number}: it is" for number in range(1, 40)],
    "user assistant: (see 10-12), no.1: a dog-2",
]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(pre_tokenizer) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 9, trainer)
    return inner


def qwen2() -> Tokenizer:
    """Joins ":" with the line end behind it, and words with the space or bracket before them; single digits."""
    parts = [pre_tokenizers.Split(Regex(QWEN2), "isolated")]
    return byte_level(pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def greedy() -> Tokenizer:
    """Joins whatever occurs together between spaces: whole marks, with digits and signs."""
    parts = [pre_tokenizers.Split(Regex(r" ?\S+|\s"), "isolated")]
    return byte_level(pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def sentencepiece() -> Tokenizer:
    """As InternLM2's and Llama's: spaces are part of words."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    inner.train_from_iterator(CORPUS * 9, trainer)
    return inner


def processor_of(inner: Tokenizer):
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={f"{name}_token": token for name, token in names.items()},
    )
    return tiny_processor(tokenizer, depth_config())


def vocabulary(processor) -> SpatialVocabulary:
    ids = processor.spatial_token_ids()
    pieces = processor.picture_mark_token_ids()
    return SpatialVocabulary(
        ids["seg_token_id"],
        ids["depth_start_token_id"],
        ids["depth_end_token_id"],
        tuple(ids["depth_token_ids"]),
        processor.num_depth_tokens,
        processor.image_token_id,
        mark_pieces={token: piece for piece, tokens in pieces.items() for token in tokens},
    )


@pytest.mark.parametrize("make", [qwen2, greedy, sentencepiece])
def test_every_tokenizer_s_marks_are_found(make):
    processor = processor_of(make())
    words, image = vocabulary(processor), processor.image_token_id
    spelt = {tuple(processor.tokenizer(picture_mark(k), add_special_tokens=False)["input_ids"]) for k in (1, 2, 31)}
    assert make is not greedy or min(map(len, spelt)) < 4  # or this tokenizer would be as easy as the others
    shown = [image, words.seg] * 99
    missed = []
    for before in ("", "\n", "In ", "It is.\n", "(", "[SEG]", "[SEG] "):
        for after in ("", " ", "\n", " the cat ", "the cat"):
            for number in range(1, 100):
                text = f"{before}{picture_mark(number)}{after}[SEG]"
                ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                read = read_sequence([*shown, *ids], words, len(shown))
                if read.segs[-1].picture != number - 1:
                    missed.append(text)
    assert not missed


def test_few_tokens_of_the_vocabulary_are_taken_for_pieces():
    pieces = processor_of(qwen2()).picture_mark_token_ids()
    assert set("0123456789:-") <= set(pieces) and sum(map(len, pieces.values())) < 30
    assert all(piece in "Image-0123456789:" or piece.isdigit() for piece in pieces)


def test_configurations_keep_them(processor, model, tmp_path):
    pieces = processor.picture_mark_token_ids()
    assert pieces and model.config.picture_mark_token_ids == pieces
    model.config.save_pretrained(tmp_path)
    again = PerceptioConfig.from_pretrained(tmp_path)
    assert again.spatial_vocabulary() == model.config.spatial_vocabulary() and again.picture_mark_token_ids == pieces
    again.picture_mark_token_ids = None
    assert again.spatial_vocabulary().mark_pieces == {}


def two_turns(answer: str = "A dog.") -> list[dict]:
    """Two pictures, shown one after the other, and a third question."""
    said = {"role": "assistant", "content": answer}
    first, second = chat(picture(seed=1), text="What is here?"), chat(picture(20, 30, seed=2), text="And here?")
    return [*first, said, *second, said, *chat(text="Where is Image-2: or Image-1: then?")]


def respond(model, processor, inputs, response: str):
    ids = processor.tokenizer([response], add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model.decode_spatial(torch.cat([inputs.input_ids, ids], 1), **inputs)


def test_an_earlier_picture_can_be_asked_about_again(model, processor):
    inputs = encode(processor, two_turns())
    for response, expected in (("[SEG]", [1]), ("Image-1: [SEG] Image-2: [SEG]", [0, 1])):
        out = respond(model, processor, inputs, response)
        assert out.mask_pictures == [expected]
        states = model.model(
            input_ids=out.sequences, pixel_values=inputs.pixel_values, use_cache=False
        ).last_hidden_state[out.sequences == processor.seg_token_id]
        masks, _ = model.predict_masks(states, inputs.mask_pixel_values, torch.tensor(expected))
        torch.testing.assert_close(out.mask_logits[0], masks, atol=1e-4, rtol=1e-4)
    sizes = [item.masks.shape for item in processor.post_process_spatial(out)[0].pictures]
    assert sizes == [(1, 40, 48), (1, 30, 20)]


def test_training_and_generation_read_the_same(model, processor):
    """`forward`, which training calls, sees whole conversations; `decode_spatial` prompt and response."""
    answer = "Image-1: [SEG] Image-2: [SEG]"
    inputs = encode(processor, two_turns())
    out = respond(model, processor, inputs, answer)
    rows = {name: inputs[name] for name in ("pixel_values", "mask_pixel_values")}
    whole = model(input_ids=out.sequences, **rows)
    torch.testing.assert_close(whole.mask_logits, out.mask_logits[0], atol=1e-4, rtol=1e-4)
    swapped = model(input_ids=out.sequences, **rows | {"mask_pixel_values": inputs.mask_pixel_values.flip(0)})
    assert not torch.allclose(whole.mask_logits, swapped.mask_logits, atol=1e-2)


def test_an_older_checkpoint_takes_marks_for_words(model, processor):
    inputs, config = encode(processor, two_turns()), model.config
    older = copy.deepcopy(config)
    older.picture_mark_token_ids = None
    try:
        model.config = older
        assert respond(model, processor, inputs, "Image-1: [SEG]").mask_pictures == [[1]]
    finally:
        model.config = config


def test_rows_without_a_picture_have_no_masks(model, processor):
    """Another engine writes [SEG] and a span into every row; a row without a picture keeps its hands off others'."""
    seen, blind = chat(picture(seed=1), text="Where is it?"), chat(text="Hello")
    span = "<DEPTH_START>" + "<DEPTH_1>" * processor.num_depth_tokens + "<DEPTH_END>"
    alone = respond(model, processor, encode(processor, seen), "[SEG]" + span)
    for order in ([seen, blind], [blind, seen], [blind]):
        inputs = encode(processor, *order)
        ids = processor.tokenizer(["[SEG]" + span] * len(order), return_tensors="pt")["input_ids"]
        out = model.decode_spatial(torch.cat([inputs.input_ids, ids], 1), **inputs)
        answers = processor.post_process_spatial(out)
        assert out.well_formed == [turn is seen for turn in order]
        for turn, answer, masks in zip(order, answers, out.mask_logits or [()], strict=True):
            assert len(answer.masks) == len(masks) == len(answer.phrases) == (turn is seen)
            assert (answer.depth is not None) == (turn is seen)
            if turn is seen:
                torch.testing.assert_close(masks, alone.mask_logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_batches_with_rows_without_a_picture_are_generated(model, processor, first):
    chats = [chat(picture(seed=1), text="Give me the mask of the ball."), chat(text="Hello")]
    inputs = encode(processor, *(chats if first else chats[::-1]))
    out = model.generate(**inputs, spatial="auto", max_new_tokens=60, return_dict_in_generate=True)
    answers = processor.post_process_spatial(out)
    blind = answers[1 if first else 0]
    assert len(blind.masks) == 0 and blind.depth is None
