"""What takes the place of a span's codes, where true codes come from, and what the test concludes."""

from dataclasses import replace

import benchmark_helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from perceptio_hf.data.depth_maps import write_depth_png
from perceptio_hf.evaluation.replacement.oracle import encode_oracle, open_oracle
from perceptio_hf.evaluation.replacement.token_replacement import REPLACEMENTS, check_replacements, replaced_codes
from perceptio_hf.evaluation.run.summary import summarise_replacements

RNG = np.random.default_rng(0)
OWN = RNG.choice(16, (40, 9), p=np.arange(1, 17) / 136)
PICTURES = [f"picture {index // 3}" for index in range(40)]


def test_every_replacement_is_what_its_definition_says():
    found = replaced_codes(list(REPLACEMENTS), OWN, PICTURES, seed=3)
    assert list(found) == [name for name in REPLACEMENTS if name != "oracle"]
    assert all(table.shape == OWN.shape and table.dtype.kind == "i" for table in found.values())
    assert (found["identity"] == OWN).all()
    assert (found["first-repeat"] == OWN[:, :1]).all()
    counts = np.bincount(OWN.ravel(), minlength=16)
    assert (found["constant"] == counts.argmax()).all()
    assert (np.sort(found["random-matched"]) == np.sort(OWN)).all() and (found["random-matched"] != OWN).any(1).all()
    drawn = np.bincount(found["random"].ravel(), minlength=16)
    assert np.abs(drawn - counts).sum() < 0.35 * counts.sum(), "drawn as often as in the own spans"
    assert (found["random"] == OWN).mean() < 0.25


def test_another_pictures_span_is_never_of_the_same_picture_and_each_serves_once():
    for pictures in (PICTURES, [f"{index % 5}" for index in range(40)], ["a"] * 20 + ["b"] * 20, list(range(40))):
        own = np.arange(40)[:, None] * np.ones(2, int)  # every span tells its sample
        giver = replaced_codes(["other-image"], own, pictures)["other-image"][:, 0]
        assert sorted(giver) == list(range(40))
        assert all(pictures[index] != pictures[other] for index, other in enumerate(giver))
    with pytest.raises(ValueError, match="21 of 40"):
        replaced_codes(["other-image"], OWN, ["a"] * 21 + ["b"] * 19)


def test_what_is_drawn_hangs_on_seed_and_place_only():
    first = replaced_codes(["random", "random-matched"], OWN, PICTURES, seed=1)
    again = replaced_codes(["random-matched", "random"], OWN, PICTURES, seed=1)
    other = replaced_codes(["random", "random-matched"], OWN, PICTURES, seed=2)
    for name in ("random", "random-matched"):
        assert (first[name] == again[name]).all() and (first[name] != other[name]).any()


def test_identity_always_comes_first():
    assert check_replacements(["random", "oracle", "random"]) == ("identity", "random", "oracle")
    with pytest.raises(ValueError, match=r"'zero'.*first-repeat"):
        check_replacements(["zero"])


@pytest.fixture
def samples(tmp_path):
    """Two sets of pictures with the same names, as HardBLINK has them."""
    made = []
    for index, sample in enumerate(benchmark_helpers.points(4).samples):
        picture = replace(sample.picture, name=f"set{index // 2}/{index % 2}.jpg")
        made.append(replace(sample, picture=picture, depth=None))
    return made


def test_true_depth_from_a_folder_of_maps(tmp_path, samples, model):
    maps = [benchmark_helpers.true_depth(index + 1) for index in range(4)]
    for index in range(4):
        (tmp_path / f"set{index // 2}").mkdir(exist_ok=True)
        write_depth_png(tmp_path / f"set{index // 2}" / f"{index % 2}.png", maps[index].relative)
    depth_of = open_oracle(str(tmp_path), "relative", samples, "cpu")
    for sample, expected in zip(samples, maps, strict=True):
        assert np.abs(depth_of(sample).relative - expected.relative).max() < 1e-4
    codes = encode_oracle(model.depth_model, depth_of(samples[0]))
    with torch.no_grad():
        assert codes == model.depth_model.encode(torch.from_numpy(depth_of(samples[0]).relative)).flatten().tolist()
    assert len(codes) == model.config.num_depth_tokens


def test_maps_without_their_set_serve_only_names_that_are_not_shared(tmp_path, samples):
    for name in ("0", "1"):
        write_depth_png(tmp_path / f"{name}.png", benchmark_helpers.true_depth(1).relative)
    with pytest.raises(ValueError, match=r"no depth map of points 0.*set0"):
        open_oracle(str(tmp_path), "relative", samples, "cpu")
    assert open_oracle(str(tmp_path), "relative", samples[:2], "cpu")(samples[1]).valid.all()


def test_true_depth_from_the_benchmark_or_none(samples):
    own = benchmark_helpers.points(2).samples
    assert (open_oracle(None, None, own, "cpu")(own[1]).relative == benchmark_helpers.true_depth(1).relative).all()
    with pytest.raises(ValueError, match=r"no true depth of points 0.*--oracle"):
        open_oracle(None, None, samples, "cpu")


@pytest.mark.parametrize("kind", ["relative", "metric"])
def test_true_depth_from_a_teacher(tmp_path, kind):
    """Distances of a metric teacher are turned into inverse depth."""
    from transformers import (
        AutoImageProcessor,
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=[f"stage{index}" for index in range(1, 5)],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20,
    )
    torch.manual_seed(0)
    teacher = DepthAnythingForDepthEstimation(config).eval()
    for parameter in teacher.parameters():  # so that more than rounding tells pixels apart
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    teacher.head.conv3.bias.data.fill_(1.0)  # inverse depth is not negative
    teacher.save_pretrained(tmp_path)
    processor = DPTImageProcessor(size={"height": 28, "width": 42}, ensure_multiple_of=14)
    processor.save_pretrained(tmp_path)
    try:
        AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError:
        pytest.skip("this release of transformers needs torchvision for AutoImageProcessor")
    sample = benchmark_helpers.points(1).samples[0]
    found, picture = open_oracle(str(tmp_path), None, [sample], "cpu")(sample), sample.picture.open()
    with torch.no_grad():
        seen = teacher(**processor(images=picture, return_tensors="pt"))
    sizes = [(picture.height, picture.width)]
    values = processor.post_process_depth_estimation(seen, target_sizes=sizes)[0]["predicted_depth"].numpy()
    inverse = 1 / values if kind == "metric" else values
    expected = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    assert np.abs(found.relative - expected).max() < 1e-4 and (found.metric is None) == (kind == "relative")
    with pytest.raises(ValueError, match=r"--oracle-unit mm, but .* gives"):
        open_oracle(str(tmp_path), "mm", [sample], "cpu")
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "head" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"--oracle .* lacks weights such as head"):
        open_oracle(str(tmp_path), None, [sample], "cpu")


def test_what_is_no_place_for_depth_is_refused(tmp_path, samples, tiny_folder):
    with pytest.raises(ValueError, match="--oracle-unit"):
        open_oracle(str(tmp_path), None, samples, "cpu")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        open_oracle(str(tmp_path / "file"), "mm", samples, "cpu")
    with pytest.raises(ValueError, match=r"--oracle .* is a 'perceptio' model, which says no depth"):
        open_oracle(str(tiny_folder), None, samples, "cpu")


def test_maps_that_were_not_turned_with_their_pictures_are_refused(tmp_path, samples):
    picture = Image.new("RGB", (40, 30))
    picture.getexif()[0x0112] = 6  # shown, it stands
    turned = tmp_path / "0.jpg"
    picture.save(turned, exif=picture.getexif())
    write_depth_png(tmp_path / "0.png", np.linspace(0, 1, 40 * 30, dtype=np.float32).reshape(30, 40))
    sample = replace(samples[0], picture=replace(samples[0].picture, name="0.jpg", content=turned), id="turned")
    with pytest.raises(ValueError, match=r"depth map is 40 x 30 and its picture, shown upright, 30 x 40"):
        open_oracle(str(tmp_path), "relative", [sample], "cpu")(sample)


def record(index: int | str, score: int, read: str | None = "A") -> dict:
    return {"id": str(index), "score": float(score), "read": read, "target": {"answer": "A", "choices": ["A", "B"]}}


def test_the_conclusion_is_counted_from_the_same_samples():
    own = [record(index, index < 8) for index in range(10)]
    replaced = [
        {
            "id": str(index),
            "identity": {"score": float(index < 8), "read": "A" if index < 8 else "B"},
            "random": {"score": float(index % 2), "read": "A" if index % 2 else None},
        }
        for index in range(10)
    ]
    told = summarise_replacements("relative_depth", own, replaced)
    assert told["own"] == 0.8 and told["chance"] == 0.5
    random = told["replacements"]["random"]
    assert random["accuracy"] == 0.5 and random["points"] == pytest.approx(-30)
    assert random["changed"] == pytest.approx(np.mean([index % 2 != (index < 8) or index == 8 for index in range(10)]))
    # One of ten gained, four lost: Bonett and Price's 2/12 - 5/12 -+ 1.96 sqrt((7/12 - (3/12)^2) / 12).
    spread = 1.959964 * ((7 / 12 - 9 / 144) / 12) ** 0.5
    assert random["points_interval"] == pytest.approx([100 * (-0.25 - spread), 100 * (-0.25 + spread)], abs=1e-3)
    assert told["replacements"]["identity"]["points_interval"] == [0, 0]
    assert told["content_points"] == pytest.approx(30)
    assert told["content_share"] is None, "8 of 10 may still be chance"
    many = [row | {"id": f"{row['id']} {copy}"} for copy in range(10) for row in replaced]
    answers = [record(f"{row['id']} {copy}", row["id"] < "8") for copy in range(10) for row in replaced]
    assert summarise_replacements("relative_depth", answers, many)["content_share"] == pytest.approx(1.0)
    half = [{name: row[name] for name in ("id", "identity")} for row in replaced[8:]]
    told = summarise_replacements("relative_depth", own, half)
    assert (told["content_points"], told["content_share"], told["without_span"]) == (None, None, 8)
