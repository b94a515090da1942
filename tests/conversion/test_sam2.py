"""Meta's SAM2 -> transformers: names, sizes, refusals; and Meta's own code as the judge where it is installed."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

from perceptio_hf.conversion.keys import ConversionReport
from perceptio_hf.conversion.sam2 import infer_config, load_sam2, sam2_from_tensors
from perceptio_hf.lab.lessons.model import tiny_mask_config

# What distinguishes the published sizes, from Meta's configuration files.
PUBLISHED = {
    "tiny": (96, 1, [1, 2, 7, 2], [5, 7, 9], [7, 7], [8, 4, 14, 7]),
    "small": (96, 1, [1, 2, 11, 2], [7, 10, 13], [7, 7], [8, 4, 14, 7]),
    "base-plus": (112, 2, [2, 3, 16, 3], [12, 16, 20], [14, 14], [8, 4, 14, 7]),
    "large": (144, 2, [2, 6, 36, 4], [23, 33, 43], [7, 7], [8, 4, 16, 8]),
}
# Layers of perceptrons with three, here and at Meta.
MLP = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}


def meta_name(name: str) -> str:
    """The name Meta gives a tensor of `Sam2Model`; written from Meta's code, the other way round than the converter."""
    parts = name.split(".")
    if parts[0] == "no_memory_embedding":
        return "no_mem_embed"
    if parts[:2] == ["vision_encoder", "neck"]:
        return f"image_encoder.neck.convs.{parts[3]}.conv.{parts[4]}"
    if parts[:2] == ["vision_encoder", "backbone"]:
        end = ".".join(parts[2:]).replace("layer_norm", "norm").replace("projection", "proj")
        return "image_encoder.trunk." + end.replace("mlp.proj_in", "mlp.layers.0").replace(
            "mlp.proj_out", "mlp.layers.1"
        )
    if parts[0] == "prompt_encoder":
        end = ".".join(parts[1:]).replace(
            "shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"
        )
        for here, there in {"conv1": 0, "layer_norm1": 1, "conv2": 3, "layer_norm2": 4, "conv3": 6}.items():
            end = end.replace(f"mask_embed.{here}.", f"mask_downscaling.{there}.")
        return f"sam_prompt_encoder.{end}"
    end = ".".join(parts[1:])
    for here, there in {"upscale_conv1": 0, "upscale_layer_norm": 1, "upscale_conv2": 3}.items():
        end = end.replace(f"{here}.", f"output_upscaling.{there}.")
    if "transformer" in end:
        end = end.replace("o_proj", "out_proj").replace("layer_norm_final_attn", "norm_final_attn")
        end = (
            end.replace("layer_norm", "norm")
            .replace("mlp.proj_in", "mlp.layers.0")
            .replace("mlp.proj_out", "mlp.layers.1")
        )
    elif "head" in end or "hypernetworks" in end:
        first = next(part for part in ("proj_in", "proj_out", "layers.0") if part in end)
        end = end.replace(first, MLP[first])
    return f"sam_mask_decoder.{end}"


def meta_tensors(model: Sam2Model) -> dict[str, torch.Tensor]:
    """The state dict Meta's code would have for `model`, with a few tensors that only videos need."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "prompt_encoder.point_embed.weight":
            rows = {f"sam_prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in enumerate(tensor)}
            tensors.update(rows)
        elif not name.startswith("shared_image_embedding"):
            tensors[meta_name(name)] = tensor
    video = ("maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "memory_attention.layers.0.linear1.weight")
    return {
        **tensors,
        **{name: torch.ones(1) for name in (*video, "mask_downsample.weight", "obj_ptr_proj.layers.0.bias")},
    }


@pytest.fixture(scope="module")
def config() -> Sam2Config:
    return tiny_mask_config()


@pytest.fixture(scope="module")
def original(config) -> Sam2Model:
    torch.manual_seed(0)
    model = Sam2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    # Two copies of one matrix in everything trained.
    model.shared_image_embedding.load_state_dict(model.prompt_encoder.shared_embedding.state_dict())
    return model


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["wrapped.pt", "bare.pt", "module.pt", "x.safetensors"])
def test_every_tensor_arrives(tmp_path, original, config, kind):
    tensors, path = meta_tensors(original), tmp_path / kind
    if kind == "x.safetensors":
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    elif kind == "module.pt":
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    else:
        torch.save({"model": tensors, "epoch": 1} if kind == "wrapped.pt" else tensors, path)
    report = ConversionReport(str(path))
    model = load_sam2(path, config=config, report=report)
    assert equal(model, original) and not model.training
    assert report.num_read == len(tensors) and len(report.mapped) == len(tensors) - 6
    assert set(report.mapped.values()) | set(report.added) == set(original.state_dict())
    assert [len(names) for names in report.ignored.values()] == [6]


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("image_size", [1024, 512])
def test_the_architecture_is_read_off_the_tensors(size, image_size):
    channels, heads, blocks, global_blocks, tile, windows = PUBLISHED[size]
    with torch.device("meta"):
        tensors = {
            "image_encoder.trunk.patch_embed.proj.weight": torch.empty(channels, 3, 7, 7),
            "image_encoder.trunk.pos_embed": torch.empty(1, channels, *tile),
        }
        for block in range(sum(blocks)):
            tensors[f"image_encoder.trunk.blocks.{block}.attn.qkv.weight"] = torch.empty(1)
        for block in (blocks[0], sum(blocks[:2]), sum(blocks[:3])):
            tensors[f"image_encoder.trunk.blocks.{block}.proj.weight"] = torch.empty(1)
    config, name = infer_config(tensors, image_size, "x.pt")
    trunk = config.vision_config.backbone_config
    assert name == size
    assert (trunk.hidden_size, trunk.blocks_per_stage, trunk.global_attention_blocks) == (
        channels,
        blocks,
        global_blocks,
    )
    assert trunk.num_attention_heads_per_stage == [heads, 2 * heads, 4 * heads, 8 * heads]
    assert trunk.embed_dim_per_stage == config.vision_config.backbone_channel_list[::-1]
    assert (trunk.window_size_per_stage, trunk.window_positional_embedding_background_size) == (windows, tile)
    assert config.vision_config.backbone_feature_sizes == [[image_size // k] * 2 for k in (4, 8, 16)]
    assert config.prompt_encoder_config.image_size == image_size and trunk.image_size == [image_size] * 2


def test_another_size_is_refused_with_the_known_ones(original):
    with pytest.raises(ValueError, match=r"x\.pt is no published size of SAM2.*tiny 96 and \(1, 2, 7, 2\).*`config`"):
        sam2_from_tensors(meta_tensors(original), report=ConversionReport("x.pt"))


def test_a_side_that_the_strides_do_not_divide_is_refused(original):
    with pytest.raises(ValueError, match="side of the picture is 1000; it must be a multiple of 32"):
        sam2_from_tensors(meta_tensors(original), image_size=1000, report=ConversionReport("x.pt"))


def test_something_else_is_refused_by_its_first_names(tmp_path):
    torch.save({"image_encoder.blocks.0.weight": torch.ones(1), "z": torch.ones(1)}, tmp_path / "sam1.pt")
    with pytest.raises(
        ValueError,
        match=r"sam1\.pt is not a SAM2 checkpoint: unexpected image_encoder\.blocks\.0\.weight "
        r"\(and 1 more\); missing image_encoder\.trunk\.pos_embed \(and 4 more\)",
    ):
        load_sam2(tmp_path / "sam1.pt")


@pytest.mark.parametrize("lost", ["sam_mask_decoder.iou_token.weight", "sam_prompt_encoder.point_embeddings.2.weight"])
def test_an_incomplete_checkpoint_is_refused(original, config, lost):
    tensors = meta_tensors(original)
    del tensors[lost]
    with pytest.raises(
        ValueError, match=r"is not a SAM2 checkpoint: (missing mask_decoder\.iou_token|wrong .*point_emb)"
    ):
        sam2_from_tensors(tensors, config=config, report=ConversionReport("x.pt"))


def test_a_surplus_tensor_is_refused(original, config):
    tensors = {**meta_tensors(original), "sam_mask_decoder.adapter.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"unexpected sam_mask_decoder\.adapter\.weight"):
        sam2_from_tensors(tensors, config=config, report=ConversionReport("x.pt"))


def test_a_config_of_another_hidden_size_is_refused(original, config):
    other = Sam2Config(
        **{**config.to_dict(), "mask_decoder_config": {**config.mask_decoder_config.to_dict(), "mlp_dim": 8}}
    )
    with pytest.raises(
        ValueError,
        match=r"sam_mask_decoder\.transformer\.layers\.0\.mlp\.layers\.0\.weight is \(\d+, \d+\), "
        r"expected \(8, \d+\)",
    ):
        sam2_from_tensors(meta_tensors(original), config=other, report=ConversionReport("x.pt"))


def test_a_folder_of_transformers(tmp_path, original):
    original.save_pretrained(tmp_path)
    report = ConversionReport("x")
    assert equal(load_sam2(tmp_path, report=report), original)
    assert len(report.mapped) == len(original.state_dict()) and not report.ignored and not report.added


def test_a_folder_of_transformers_video_model(tmp_path, config):
    """Meta's repositories on the Hub are of this kind."""
    parts = {name: getattr(config, name).to_dict() for name in ("vision_config", "prompt_encoder_config")}
    parts["mask_decoder_config"] = config.mask_decoder_config.to_dict()
    video = Sam2VideoModel(Sam2VideoConfig(**parts, image_size=config.prompt_encoder_config.image_size))
    video.save_pretrained(tmp_path)
    report = ConversionReport("x")
    model = load_sam2(tmp_path, report=report)
    assert model.config.model_type == "sam2"
    expected = video.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    ignored = {name for names in report.ignored.values() for name in names}
    assert ignored == set(expected) - set(model.state_dict())


def test_folders_that_are_no_sam2(tmp_path, original, tiny_folder):
    with pytest.raises(ValueError, match=r"its config\.json says 'perceptio'"):
        load_sam2(tiny_folder)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_sam2(tmp_path)
    original.save_pretrained(tmp_path / "sam")
    with pytest.raises(ValueError, match=r"config\.json says its architecture"):
        load_sam2(tmp_path / "sam", image_size=512)
    shutil.copy(tmp_path / "sam" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_sam2(tmp_path)


def parity():
    """benchmarks/sam2_parity.py, which compares with Meta's code at full size."""
    path = Path(__file__).parents[2] / "benchmarks" / "sam2_parity.py"
    spec = importlib.util.spec_from_file_location("sam2_parity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["2", "2.1"])
def test_metas_own_code_gives_the_same_features_prompts_and_masks(version):
    """The tiny size on 256 pixels, where windows and global blocks still differ."""
    pytest.importorskip("sam2", reason="the extra `sam2` is not installed")
    record = parity().compare(version, "tiny", 256)
    assert record["recognised"] == f"SAM{version} tiny, Meta's layout"
    assert {"features, stride 16", "masks", "scores", "sparse (box)"} <= record["differences"].keys()
    for name, part in record["differences"].items():
        assert part["largest"] <= 1e-5 * max(part["of"], 1.0), name
