"""perceptio build from files that other projects wrote: OpenGVLab's InternVL and AURORA's codec."""

import pytest
import torch
from component_helpers import codec, mask_model
from helpers import chat, encode, picture
from original_formula import reference_logits
from original_layout import original_config, random_tensors, write_checkpoint
from transformers import AutoModel, AutoProcessor

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio_hf.build.checkpoint import build


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    mask_model().save_pretrained(folder / "sam2")
    codec().save_pretrained(folder / "codec")
    return folder


def original(folder, text: str) -> tuple[dict, dict]:
    config = original_config(text)
    tensors = random_tensors(config)
    write_checkpoint(folder, config, tensors, shards=2)
    return config, tensors


@pytest.mark.parametrize("text", ["Qwen2ForCausalLM", "InternLM2ForCausalLM"])
def test_opengvlab_s_layout(parts, tmp_path, text):
    config, tensors = original(tmp_path / "original", text)
    report = build(tmp_path / "original", parts / "sam2", parts / "codec", tmp_path / "out", dtype="float32")
    assert report.new_tokens == 19 and report.first_new_id <= report.rows_before and not report.check.sampled
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = encode(processor, chat(picture(16, 16)))
    expected = reference_logits(
        tensors, config, inputs.input_ids, inputs.pixel_values.float(), processor.image_token_id
    )
    with torch.no_grad():
        logits = model(inputs.input_ids, inputs.pixel_values).logits
    old = [token for token in range(expected.shape[-1]) if token not in processor.added_token_ids]
    known = [token for token in old if token < report.first_new_id]
    torch.testing.assert_close(logits[..., known], expected[..., known], atol=2e-4, rtol=2e-4)
    assert (processor.image_seq_length, processor.crop_to_patches) == (4, True)
    assert processor.image_processor.max_patches == 6


def test_from_components_reads_it_too(parts, tmp_path):
    original(tmp_path / "original", "Qwen2ForCausalLM")
    model = PerceptioForConditionalGeneration.from_components(
        tmp_path / "original", parts / "sam2", parts / "codec", dtype="bfloat16"
    )
    processor = PerceptioProcessor.from_components(tmp_path / "original", mask_model(), codec())
    assert model.dtype == torch.bfloat16
    assert model.config.depth_token_ids == processor.spatial_token_ids()["depth_token_ids"]


def aurora_file(path, model) -> str:
    """Our codec's tensors under the names the table in modeling_depth_vqvae.py gives for AURORA's."""
    stages, blocks = len(model.depth_encoder.down), len(model.depth_encoder.blocks)
    places = {"depth_encoder.project": f"encoder.{2 * stages + blocks}", "depth_decoder.project": "decoder.0"}
    places["depth_decoder.out"] = f"decoder.{2 + blocks + 2 * stages}"
    for i in range(stages):
        places[f"depth_encoder.down.{i}"] = f"encoder.{2 * i}"
        places[f"depth_decoder.up.{i}"] = f"decoder.{2 + blocks + 2 * i}"
    for j in range(blocks):
        for conv, place in ((1, 0), (2, 2), (3, 4)):
            places[f"depth_encoder.blocks.{j}.conv{conv}"] = f"encoder.{2 * stages + j}.net.{place}"
            places[f"depth_decoder.blocks.{j}.conv{conv}"] = f"decoder.{2 + j}.net.{place}"
    codebook = {"vectors": "_embedding", "ema_count": "_ema_cluster_size", "ema_sum": "_ema_w"}
    places |= {f"depth_codebook.{own}": f"_vq_vae.{there}" for own, there in codebook.items()}
    tensors = {}
    for name, value in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        tensors[places.get(name) or f"{places[layer]}.{kind}"] = value
    torch.save({f"module.{name}": value for name, value in tensors.items()}, path)
    return str(path)


def test_aurora_s_codec(parts, tmp_path):
    source = codec(image_size=320, downsample=32)
    file = aurora_file(tmp_path / "vae-final.pt", source)
    original(tmp_path / "original", "Qwen2ForCausalLM")
    report = build(tmp_path / "original", parts / "sam2", file, tmp_path / "out", verify=False)
    assert (report.depth_grid, report.depth_codes) == (10, 16)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_depth_tokens == 100
    depth = torch.rand(2, 320, 320, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.depth_model.encode(depth), source.encode(depth))
