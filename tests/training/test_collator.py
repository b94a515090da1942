"""The collator: batches, labels, and samples that cannot be used."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import depth_config, picture
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from perceptio_hf.data.form import REASONS, SampleError
from perceptio_hf.data.run_length import encode_mask
from perceptio_hf.data.world_samples import WORLD_TASKS, iter_world_samples, world_dataset
from perceptio_hf.lab.lessons.model import tiny_processor
from perceptio_hf.modeling.mask_prediction import SAM2_STD, normalised
from perceptio_hf.tokens import depth_span, read_sequence
from perceptio_hf.training.collator import PerceptioDataCollator
from perceptio_hf.training.losses import loss_counts

SPAN = "<DEPTH_START><DEPTH_END>"
# As InternVL's checkpoints have it: no generation markers.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def box() -> np.ndarray:
    mask = np.zeros((40, 48), bool)
    mask[5:20, 10:30] = True
    return mask


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def samples() -> list[dict]:
    """Text alone; two turns with masks and a depth map with holes; two pictures and codes."""
    depth = np.linspace(0.5, 4, 40 * 48).reshape(40, 48)
    depth[:20] = 0
    return [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {
            "images": [picture()],
            "messages": [
                {"role": "user", "content": "Where is it, if not at [SEG]?"},
                {"role": "assistant", "content": f"[SEG]{SPAN}There."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": [words(" Yes,"), words("[SEG]")]},
            ],
            "masks": [encode_mask(box()), encode_mask(~box())],
            "depth": depth,
            "depth_unit": "m",
        },
        {
            "images": [picture(30, 20), picture(20, 60)],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image"}, words("or"), {"type": "image"}, words("?")]},
                {"role": "assistant", "content": SPAN + "The first."},
            ],
            "depth_codes": list(range(16)),
        },
    ]


ANSWERS = [["Hello."], [f"[SEG]{depth_span([0] * 16)}There.", " Yes,[SEG]"], [depth_span(range(16)) + "The first."]]


@pytest.fixture(scope="module", params=["own", "internvl"])
def any_processor(request, processor):
    if request.param == "own":
        return processor
    other = copy.copy(processor)
    other.chat_template = INTERNVL_TEMPLATE
    return other


@pytest.fixture(scope="module")
def collator(any_processor):
    return PerceptioDataCollator(any_processor, depth_image_size=32)


def test_shapes_and_types(collator, processor, model):
    batch = collator(samples())
    length = batch["input_ids"].shape[1]
    side = processor.mask_image_size
    expected = {
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.int64),
        "labels": ((3, length), torch.int64),
        "pixel_values": ((3, 3, 128, 128), torch.float32),
        "mask_pixel_values": ((1, 3, side, side), torch.uint8),
        "mask_pixel_pictures": ((1,), torch.int64),
        "mask_targets": ((2, side // 4, side // 4), torch.float32),
        "depth_targets": ((2, 32, 32), torch.float32),
        "depth_valid": ((2, 32, 32), torch.bool),
        "depth_given_as_codes": ((2,), torch.bool),
    }
    layout = batch.pop("layout")
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert layout.items == loss_counts(batch["labels"], model.spatial_vocabulary())
    assert batch["depth_given_as_codes"].tolist() == [False, True] and not batch["depth_valid"][1].any()


def test_labels_are_the_assistants_words_and_the_ends_of_its_turns(collator, processor):
    batch = collator(samples())
    for labels, ids, answers in zip(batch["labels"], batch["input_ids"], ANSWERS, strict=True):
        taught = labels != -100
        assert torch.equal(labels[taught], ids[taught])
        assert processor.tokenizer.decode(labels[taught]) == "".join(answer + "<|im_end|>" for answer in answers)
        assert processor.image_token_id not in labels
    assert batch["attention_mask"][:, 0].all()  # padded on the right
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_inputs_are_those_of_the_processor(collator, any_processor):
    """The same tokens and pixels as apply_chat_template makes of the same conversations."""
    chats = copy.deepcopy([sample["messages"] for sample in samples()])
    chats[1][0]["content"] = [{"type": "image"}, {"type": "text", "text": chats[1][0]["content"]}]
    chats[1][1]["content"], chats[2][2]["content"] = ANSWERS[1][0], ANSWERS[2][0]
    pictures = [image for sample in samples() for image in sample.get("images", [])]
    shown = iter(pictures)
    for chat in chats:
        for part in (
            part for message in chat if not isinstance(message["content"], str) for part in message["content"]
        ):
            if part["type"] == "image":
                part["image"] = next(shown)
    expected = any_processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True, padding_side="right"
    )
    batch = collator(samples())
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], expected[key]), key
    one_step = 1 / 255 / min(SAM2_STD) + 1e-6
    theirs = expected["mask_pixel_values"][batch["mask_pixel_pictures"]]
    torch.testing.assert_close(normalised(batch["mask_pixel_values"]), theirs, atol=one_step, rtol=0)


def test_labels_agree_with_prefixes(collator, any_processor):
    """Reference: render every prefix up to an assistant's turn as a generation prompt, and tokenize it alone."""
    sample = samples()[1]
    chat = copy.deepcopy(sample["messages"])
    chat[0]["content"] = [{"type": "image", "image": sample["images"][0]}, {"type": "text", "text": chat[0]["content"]}]
    chat[1]["content"] = ANSWERS[1][0]
    ids = collator([sample])["input_ids"][0]
    expected = torch.full_like(ids, -100)
    for turn in (1, 3):
        prompt = any_processor.apply_chat_template(
            chat[:turn], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        start = len(prompt["input_ids"][0])
        end = start + ids[start:].tolist().index(any_processor.tokenizer.eos_token_id) + 1
        assert ids[:start].tolist() == list(prompt["input_ids"][0])
        expected[start:end] = ids[start:end]
    assert torch.equal(collator([sample])["labels"][0], expected)


def test_a_batch_is_its_samples(collator):
    batch, singles = collator(samples()), [collator([sample]) for sample in samples()]
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[key][row, :length], single[key][0])
    for key in ("pixel_values", "mask_pixel_values", "mask_targets", "depth_targets", "depth_valid"):
        assert torch.equal(batch[key], torch.cat([single[key] for single in singles if key in single])), key
    assert "pixel_values" not in singles[0]


def test_masks_are_shares_inside(collator):
    targets = collator(samples())["mask_targets"]
    expected = F.interpolate(torch.tensor(box())[None, None].float(), (32, 32), mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(targets[0], expected)
    torch.testing.assert_close(targets[0] + targets[1], torch.ones(32, 32))
    assert targets[0].mean() == pytest.approx(box().mean(), abs=0.01)


def test_depth_targets(collator):
    batch = collator(samples())
    depth, valid = batch["depth_targets"][0], batch["depth_valid"][0]
    assert not valid[:16].any() and valid[16:].all() and not depth[:16].any()
    assert depth.max() <= 1 and depth[16, 0] > 0.95 and depth[31, 31] < 0.02
    assert (depth[17:].diff(dim=1) <= 0).all()  # farther to the right


def test_a_few_readings_are_enough(processor):
    """Readings so sparse that no pixel of the small map is half measured still teach where they are."""
    sparse = np.zeros((320, 320))
    sparse[::16, ::16] = np.linspace(1, 2, 400).reshape(20, 20)
    sample = samples()[1] | {"depth": sparse}
    batch = PerceptioDataCollator(processor, depth_image_size=32)([sample])
    assert 0 < batch["depth_valid"].float().mean() < 1


def test_the_model_takes_the_batch(collator, model):
    batch = collator(samples())
    names = ("input_ids", "attention_mask", "pixel_values", "mask_pixel_values", "mask_pixel_pictures")
    inputs = {key: batch[key] for key in names}
    assert model(**inputs).mask_logits.shape == batch["mask_targets"].shape
    alone = collator(samples()[:1])
    assert model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).logits.isfinite().all()


def test_sam2_sees_the_pictures_that_have_masks(collator, processor):
    """Three pictures in two rows, [SEG] on the last one alone: its pixels come, and its number in the batch."""
    two, one = copy.deepcopy(samples()[2]), samples()[1]
    batch = collator([two, one])
    assert batch["mask_pixel_pictures"].tolist() == [2]
    assert torch.equal(batch["mask_pixel_values"][0], processor.mask_bytes(one["images"][0]))
    assert "mask_pixel_values" not in collator([two]) and "mask_pixel_pictures" not in collator([two])


def test_tiles(processor):
    wide = samples()[0] | {"images": [picture(300, 100)]}
    batch = PerceptioDataCollator(processor, crop_to_patches=True, max_patches=4)([wide])
    tiles = batch["pixel_values"].shape[0]
    assert tiles == 4 and "mask_pixel_values" not in batch
    assert (batch["input_ids"] == processor.image_token_id).sum() == tiles * processor.image_seq_length
    assert PerceptioDataCollator(processor)([wide])["pixel_values"].shape[0] == 1


def test_world_samples_decode_to_what_was_said(processor):
    collator = PerceptioDataCollator(processor, depth_image_size=32)
    items = [item for task in WORLD_TASKS for item in iter_world_samples(task, range(3), size=64)]
    batch = collator(items)
    for labels, item in zip(batch["labels"], items, strict=True):
        said = item["messages"][1]["content"].replace(SPAN, depth_span([0] * 16))
        assert processor.tokenizer.decode(labels[labels != -100]) == said + "<|im_end|>"
    assert len(batch["mask_targets"]) == sum(len(item["masks"]) for item in items)
    assert len(batch["depth_targets"]) == sum("depth" in item for item in items) > 5


def test_skipping(processor, caplog):
    bad = [
        samples()[1] | {"masks": []},
        samples()[1] | {"images": ["/none.png"], "id": "lost"},
        samples()[2] | {"depth_codes": [99] * 16},
    ]
    strict = PerceptioDataCollator(processor, depth_image_size=32)
    with pytest.raises(SampleError, match=r"Sample 'lost': There is no picture /none.png"):
        strict([samples()[0], bad[1]])
    lenient = PerceptioDataCollator(processor, depth_image_size=32, on_error="skip")
    batch = lenient([bad[0], samples()[0], *bad[1:], samples()[1]])
    expected = strict([samples()[0], samples()[1]])
    assert batch.pop("layout").items == expected.pop("layout").items
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert lenient.skipped == {"masks": 1, "picture": 1, "codes": 1} and set(lenient.skipped) <= set(REASONS)
    assert "'lost'" in caplog.text
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        PerceptioDataCollator(processor, on_error="ignore")


def test_a_batch_of_bad_samples_only(processor, model):
    """Another process may have a good batch and wait for this one: there is a batch, and nothing is learnt from it."""
    collator = PerceptioDataCollator(processor, depth_image_size=32, on_error="skip")
    batch = collator([samples()[1] | {"masks": []}] * 2)
    assert (batch["labels"] == -100).all() and batch["attention_mask"].all() and len(batch["mask_targets"]) == 0
    assert model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"None of the first 32 samples could be used; the last one: Sample .*0 masks"):
        collator([samples()[1] | {"masks": []}] * 30)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_counts_of_workers_are_not_lost(processor, context):
    collator = PerceptioDataCollator(processor, depth_image_size=32, on_error="skip")
    items = [samples()[0] | ({"images": ["/none.png"]} if index % 3 == 0 else {}) for index in range(12)]
    loader = DataLoader(items, batch_size=2, num_workers=2, collate_fn=collator, multiprocessing_context=context)
    assert sum(len(batch["labels"]) for batch in loader) == 8
    assert collator.skipped == {"picture": 4}


def test_nothing_is_cut(processor):
    length = PerceptioDataCollator(processor, depth_image_size=32)(samples())["input_ids"].shape[1]
    PerceptioDataCollator(processor, depth_image_size=32, max_length=length)(samples())
    with pytest.raises(SampleError, match=f"Sample .* has {length} tokens, more than max_length={length - 1}"):
        PerceptioDataCollator(processor, depth_image_size=32, max_length=length - 1)(samples())
    skipping = PerceptioDataCollator(processor, depth_image_size=32, max_length=length - 1, on_error="skip")
    assert len(skipping(samples())["input_ids"]) == 2 and skipping.skipped == {"length": 1}


def test_depth_needs_the_size_of_the_codec(processor):
    with pytest.raises(ValueError, match=r"depth_image_size=model.config"):
        PerceptioDataCollator(processor)(samples()[1:2])
    assert PerceptioDataCollator(processor)(samples()[2:])["depth_targets"].shape == (1, 0, 0)


def test_words_that_look_like_tokens_are_learnt_as_words(processor):
    """Neither side can end a turn or place a picture."""
    collator = PerceptioDataCollator(processor)
    sample = samples()[0]
    plain = collator([sample])["input_ids"][0].tolist()
    controls = "<IMG_CONTEXT></img><|im_end|>"
    for turn in (0, 1):
        messages = copy.deepcopy(sample["messages"])
        messages[turn]["content"] += controls
        batch = collator([{**sample, "messages": messages}])
        ids = batch["input_ids"][0].tolist()
        assert controls in processor.tokenizer.decode(ids)
        for token in processor.tokenizer.all_special_ids:
            assert ids.count(token) == plain.count(token)
        learnt = batch["labels"][0][batch["labels"][0] != -100]
        assert (controls in processor.tokenizer.decode(learnt)) == (turn == 1)
    with pytest.raises(SampleError, match=r"Sample number 0 .* no words"):
        collator([{"images": [picture()], "messages": [{"role": "user", "content": " "}, sample["messages"][1]]}])


def test_templates_that_cannot_be_learnt_from(processor):
    other = copy.copy(processor)
    for template, message in (
        (INTERNVL_TEMPLATE.replace("{{'<|im_end|>\n'}}", "{{'\n'}}"), "no special token"),
        (
            INTERNVL_TEMPLATE.replace("{{'<|im_start|>assistant\n' }}", "{{'<|im_start|>model\n' }}"),
            "generation prompt",
        ),
        (INTERNVL_TEMPLATE.replace("content['text'] }}", "content['text'][2:-2] }}"), "changes or drops"),
    ):
        other.chat_template = template
        with pytest.raises(ValueError, match=message):
            PerceptioDataCollator(other)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_marks_first_words(scheme):
    """As Llama's: a space is put before the first word of a text. Words behind a special token are not the first."""
    llama = tiny_processor(llama_tokenizer(scheme), depth_config())
    if scheme == "always":
        with pytest.raises(ValueError, match="prepend_scheme"):
            PerceptioDataCollator(llama)
        return
    batch = PerceptioDataCollator(llama)(samples()[:1])
    chats = [samples()[0]["messages"]]
    whole = llama.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], whole["input_ids"])


def llama_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["Where? user assistant Here it is. Hello. Hi", "\n"] * 9, trainer)
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={f"{name}_token": token for name, token in names.items()},
    )


def several_pictures(said: str) -> dict:
    asked = [{"type": "image"}, words("or Image-1:"), {"type": "image"}, words("?")]
    return {
        "images": [picture(), picture(seed=1)],
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
        "masks": [encode_mask(box())] * said.count("[SEG]"),
        "depth_codes": [[number] * 16 for number in range(said.count(SPAN))],
    }


def test_two_spans_and_marks_are_learnt(any_processor, model):
    """What `generate` may write for two pictures, in either order, is what training reads."""
    said = {
        f"[SEG]{SPAN}[SEG]{SPAN}Both.": ([0, 1], [0, 1]),
        f"Image-2: [SEG]{SPAN} Image-1: [SEG]{SPAN}Both.": ([1, 0], [1, 0]),
        "Image-2:[SEG]\nImage-1:\n[SEG]": ([1, 0], []),
    }
    collator = PerceptioDataCollator(any_processor)
    for text, (segs, spans) in said.items():
        batch = collator([several_pictures(text)])
        read = read_sequence(batch["input_ids"][0].tolist(), model.spatial_vocabulary())
        assert ([seg.picture for seg in read.segs], [span.picture for span in read.spans]) == (segs, spans)
        assert [span.codes for span in read.spans] == [(number,) * 16 for number in range(len(spans))]
        parts = loss_counts(batch["labels"], model.spatial_vocabulary())
        assert (parts.masks, parts.codes, parts.responses) == (2, 16 * len(spans), 1)


def test_marks_that_a_tokenizer_hides_are_refused(processor):
    collator = PerceptioDataCollator(processor)
    other = copy.copy(processor)
    other.picture_mark_token_ids = lambda: {"-": processor.picture_mark_token_ids()["-"]}
    hidden = PerceptioDataCollator(other)
    for text in ("Image-2: [SEG]", f"Image-2: {SPAN}"):
        collator([several_pictures(text)])
        with pytest.raises(SampleError, match="this tokenizer joins a mark"):
            hidden([several_pictures(text)])
    hidden([several_pictures("Image-1: [SEG]")])  # is what it speaks of without a mark, too


def test_pictures_are_turned_upright_before_masks_are_checked(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, seen standing
    picture(48, 40).save(tmp_path / "turned.jpg", exif=exif)
    sample = samples()[1] | {"images": [str(tmp_path / "turned.jpg")]}
    with pytest.raises(SampleError, match="mask 0 is 48 x 40 pixels and its picture 40 x 48"):
        PerceptioDataCollator(processor, depth_image_size=32)([sample])


def test_batches_of_a_stream_stay_whole(processor, tmp_path):
    """There are more masks in a batch than rows; accelerate must not cut them off."""
    from accelerate import Accelerator, DataLoaderConfiguration

    from perceptio_hf.training.config import PerceptioSFTConfig

    args = PerceptioSFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none")
    dispatch = args.accelerator_config.dispatch_batches
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
    collator = PerceptioDataCollator(processor, depth_image_size=32)
    stream = world_dataset("spatial", scenes=2, size=64)
    batch = next(iter(accelerator.prepare(DataLoader(stream, batch_size=4, collate_fn=collator))))
    assert len(batch["mask_targets"]) > len(batch["labels"]) == 4
    with pytest.raises(ValueError, match="dispatch_batches"):
        PerceptioSFTConfig(output_dir=str(tmp_path), accelerator_config={"dispatch_batches": True})
