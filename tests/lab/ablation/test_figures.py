"""Spans that hold together by themselves: counted in tokens as they can be counted in text."""

import copy
import re

import pytest
import torch
from transformers import AutoModel, AutoProcessor, GenerationMixin

import perceptio_hf
from perceptio_hf.lab.ablation.figures import spans_without_grammar
from perceptio_hf.lab.held_out import encode_items, held_out_items


@pytest.fixture(scope="module")
def tiny():
    folder = perceptio_hf.tiny_checkpoint()
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_spans_without_grammar(tiny):
    model, processor = tiny
    model = copy.deepcopy(model)
    model.model.language_model.norm.weight.data *= 0.7  # flatter odds: of the shipped ones hardly a span breaks
    items = held_out_items(4)
    found = spans_without_grammar(model, processor, items, 16, batch_size=16)
    asked = [item for item in items if item.question.kind == "depth"]
    inputs = encode_items(processor, [asked[index % len(asked)] for index in range(16)])
    del inputs["mask_pixel_values"], inputs["original_sizes"]
    torch.manual_seed(0)
    ids = GenerationMixin.generate(model, **inputs, do_sample=True, top_k=0, max_new_tokens=132)
    texts = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    span = re.compile(r"<DEPTH_START>(?:<DEPTH_\d+>){64}<DEPTH_END>")
    whole = [len(span.findall(text)) == 1 and "<DEPTH" not in span.sub("", text) for text in texts]
    lengths = [len(re.findall(r"<DEPTH_\d+>", text)) for text in texts]
    assert 0 < sum(whole) < 16  # both kinds are met
    assert found["malformed_rate"] == pytest.approx(1 - sum(whole) / 16)
    assert found["count_mae"] == pytest.approx(sum(abs(length - 64) for length in lengths) / 16)
