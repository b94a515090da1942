"""Training the codebook: it does not collapse, its steps do what they say, and the command around it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.commands.main import run
from perceptio_hf.data.depth_maps import DepthMap, read_depth, write_depth_png
from perceptio_hf.evaluation.metrics.depth import codebook_usage, codec_metrics
from perceptio_hf.training.codec import (
    CodebookOptions,
    DepthBank,
    code_depths,
    kmeans,
    reorder_codes_,
    restart_unused_,
    train_codebook,
    update_codebook_,
)
from perceptio_hf.training.codec.maps import Order, batches

SMALL = {"image_size": 32, "downsample": 8, "num_codes": 128, "code_dim": 8, "base_channels": 4, "activation": "silu"}


def some_depth(count: int, size: int = 32) -> list[DepthMap]:
    """Planes with a box on them, in metres."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:size, 0:size] / (size - 1)
    maps = []
    for _ in range(count):
        depth = 1.5 + rng.uniform(0, 3) * (1 - rows) + rng.uniform(-1, 1) * columns
        top, left, box = *rng.integers(0, size // 2, 2), rng.integers(size // 8, size // 2)
        depth[top : top + box, left : left + box] = rng.uniform(0.8, 1.4)
        maps.append(DepthMap.from_metric(depth))
    return maps


@pytest.fixture(scope="module")
def bank() -> DepthBank:
    return DepthBank.gather(some_depth(256), DepthVQVAEConfig(**SMALL))


def used(codec: DepthVQVAE, bank: DepthBank) -> int:
    return codebook_usage(codec.encode(bank.relative).numpy(), codec.config.num_codes)["codes_used"]


@pytest.fixture(scope="module")
def trained(bank) -> DepthVQVAE:
    return train_codebook(DepthVQVAEConfig(**SMALL), bank, steps=150)


def test_the_codebook_does_not_collapse(trained, bank):
    assert used(trained, bank) > 60
    untreated = CodebookOptions(continuous_share=0.0, kmeans_start=False, restart_every=0)
    collapsed = train_codebook(DepthVQVAEConfig(**SMALL), bank, steps=150, options=untreated)
    assert used(collapsed, bank) < 20


@pytest.mark.parametrize("treatment", [{"kmeans_start": True}, {"restart_every": 5, "decay": 0.8}])
def test_each_treatment_helps_alone(bank, treatment):
    options = CodebookOptions(**({"continuous_share": 0.0, "kmeans_start": False, "restart_every": 0} | treatment))
    assert used(train_codebook(DepthVQVAEConfig(**SMALL), bank, steps=60, options=options), bank) > 30


def test_training_learns_depth(trained, bank):
    fresh = DepthVQVAE(DepthVQVAEConfig(**SMALL)).eval()
    after, before = (codec_metrics(codec, bank.head(64))["relative_mae"] for codec in (trained, fresh))
    assert after < 0.08 < before
    assert not trained.training


def test_codes_are_numbered_by_depth(trained, bank):
    depths = code_depths(trained, bank)
    assert torch.equal(depths, depths.sort().values)


def test_the_same_seed_gives_the_same_codec(bank):
    """But for rounding, which k-means and moved codes would turn into other codes: the test goes without them."""
    config, steps = DepthVQVAEConfig(**SMALL), 5
    options = CodebookOptions(kmeans_start=False, restart_every=0)
    state = torch.random.get_rng_state()
    runs = [train_codebook(config, bank, steps=steps, seed=seed, options=options).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    farthest = steps * options.learning_rate  # where Adam takes rounding for a gradient
    for name, value in runs[0].items():
        assert (runs[1][name] - value).abs().max() <= farthest and (runs[1][name] - value).abs().mean() < 1e-4, name
    weight = "depth_encoder.project.weight"
    assert (runs[0][weight] - runs[2][weight]).abs().mean() > farthest


def test_reordering_changes_names_not_depth(trained, bank):
    codec = DepthVQVAE(trained.config).eval()
    codec.load_state_dict(trained.state_dict())
    order = torch.randperm(128)
    reorder_codes_(codec, order)
    codes, renamed = trained.encode(bank.relative[:8]), codec.encode(bank.relative[:8])
    assert torch.equal(order[renamed], codes)
    torch.testing.assert_close(codec.decode(renamed), trained.decode(codes))
    assert torch.equal(codec.depth_codebook.ema_sum, trained.depth_codebook.ema_sum[order])
    for wrong in (torch.arange(127), torch.zeros(128, dtype=torch.int64)):
        with pytest.raises(ValueError, match="permutation"):
            reorder_codes_(codec, wrong)


def test_moving_averages_equal_the_naive_loop():
    book = DepthVQVAE(DepthVQVAEConfig(**SMALL | {"num_codes": 4})).depth_codebook
    before = {k: v.clone() for k, v in book.state_dict().items()}
    latents, codes = torch.randn(3, 5, 8), torch.tensor([[0, 0, 2, 2, 2]] * 3)
    update_codebook_(book, latents, codes, decay=0.9)
    for code in range(4):
        served = latents[codes == code] * (4 / 15)
        total = 0.9 * before["ema_sum"][code] + 0.1 * served.sum(0)
        count = 0.9 * before["ema_count"][code] + 0.1 * len(served) * (4 / 15)
        torch.testing.assert_close(book.ema_sum[code], total)
        torch.testing.assert_close(book.ema_count[code], count)
        expected = total / count if len(served) else before["vectors"][code]
        torch.testing.assert_close(book.vectors[code], expected)


def test_only_unused_codes_restart():
    book = DepthVQVAE(DepthVQVAEConfig(**SMALL | {"num_codes": 4})).depth_codebook
    book.ema_count.copy_(torch.tensor([1.0, 0.01, 2.0, 0.0]))
    before, latents = book.vectors.clone(), torch.randn(40, 8)
    codes = torch.zeros(40, dtype=torch.int64)
    assert restart_unused_(book, latents, codes, generator=torch.Generator().manual_seed(0)) == 2
    assert torch.equal(book.vectors[[0, 2]], before[[0, 2]])
    for row in book.vectors[[1, 3]]:
        assert (latents == row).all(1).any()
    torch.testing.assert_close(book.ema_sum[[1, 3]] / book.ema_count[[1, 3], None], book.vectors[[1, 3]])
    assert restart_unused_(book, latents, codes, generator=torch.Generator()) == 0


def test_kmeans_finds_separate_clusters():
    truth = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = truth.repeat_interleave(25, 0) + 0.1 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        centres, counts = kmeans(points, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.cdist(truth, centres).min(1).values.max() < 0.2
        assert counts.tolist() == [25.0] * 4
    centres, counts = kmeans(points[:3], 8, generator=torch.Generator())
    assert centres.isfinite().all() and counts.sum() == 3


@pytest.mark.parametrize("limits", [{}, {"steps": 5, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}])
def test_when_to_stop_must_be_said_once(bank, limits):
    with pytest.raises(ValueError, match="either `steps` or `minutes`"):
        train_codebook(DepthVQVAEConfig(**SMALL), bank, **limits)


@pytest.mark.parametrize(
    "fields", [{"batch_size": 0}, {"decay": 1.0}, {"continuous_share": -0.1}, {"learning_rate": 0.0}]
)
def test_bad_options_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        CodebookOptions(**fields)


def test_a_diverging_loss_stops_training(bank):
    broken = DepthBank(bank.relative * torch.nan, bank.weight)
    with pytest.raises(RuntimeError, match="The loss is nan"):
        train_codebook(DepthVQVAEConfig(**SMALL), broken, steps=10)


def test_holes_stay_out_of_the_bank():
    item = some_depth(1)[0]
    valid = np.ones((32, 32), bool)
    valid[8:20, 8:20] = False
    holes = DepthMap(np.where(valid, item.relative, np.nan).astype(np.float32), valid)
    bank = DepthBank.gather([holes], DepthVQVAEConfig(**SMALL))
    assert bank.relative.isfinite().all() and torch.equal(bank.weight[0] > 0, torch.from_numpy(valid))
    relative, weight = next(batches(bank, Order(1, 4, seed=0)))
    assert relative.shape == weight.shape == (4, 32, 32)
    assert F.l1_loss(relative[weight > 0].sort().values, bank.relative.repeat(4, 1, 1)[weight > 0].sort().values) < 0.5
    with pytest.raises(ValueError, match="no depth maps"):
        DepthBank.gather([], DepthVQVAEConfig(**SMALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Depth pictures, a recipe, and a codec that the command trained on them."""
    folder = tmp_path_factory.mktemp("codebook")
    for index, item in enumerate(some_depth(12, size=40)):
        write_depth_png(folder / f"{index:02}.png", item.relative)
    recipe = {"data": str(folder), "unit": "relative", "steps": 20, "codec": SMALL, "options": {"batch_size": 4}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["codebook", "train", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "codec")]) == 0
    return folder


def test_command_train_never_replaces_what_it_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("codec", "world"):
        (tmp_path / name / "maps").mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "codec" / "mine.yaml").write_text("steps: 2")
    train = ["codebook", "train", "--overwrite", "--unit", "mm", "--out"]
    assert run([*train, "codec", "--data", "codec/maps"]) == 2
    assert run([*train, "codec", "--config", "codec/mine.yaml"]) == 2
    assert capsys.readouterr().err.count("which is to be read; name another folder") == 2
    assert run([*train, "world"]) == 2 and "--unit" in capsys.readouterr().err, "scenes are no folder"


def test_command_train_saves_a_codec_that_loads(folder, capsys):
    assert DepthVQVAE.from_pretrained(folder / "codec").config.image_size == 32
    record = json.loads((folder / "codec" / "codec.json").read_text())
    assert record["settings"]["steps"] == 20 and record["on_training_maps"]["maps"] == 12
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    arguments = ["codebook", "train", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "codec")]
    assert run(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite", "--steps", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["steps"] == 5
    assert run(["codebook", "train", "--out", str(folder), "--overwrite"]) == 2  # never replaces somebody's pictures
    assert len(list(folder.glob("*.png"))) == 12


@pytest.mark.parametrize("kind", ["world", "files"])
def test_command_train_reports_distances_where_the_maps_have_them(folder, capsys, tmp_path, kind):
    options = ["--data", "world", "--maps", "5"]
    if kind == "files":
        for index, item in enumerate(some_depth(5, size=48)):
            Image.fromarray((1000 * item.metric[:32]).astype(np.uint16)).save(tmp_path / f"{index}.png")
        options = ["--data", str(tmp_path), "--unit", "mm"]
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps({"steps": 5, "codec": SMALL}))
    arguments = ["codebook", "train", "--config", str(config), "--out", str(tmp_path / "codec"), *options, "--json"]
    assert run(arguments) == 0
    figures = json.loads(capsys.readouterr().out)["on_training_maps"]
    assert figures["maps"] == 5 and None not in figures.values()
    assert 0 < figures["absrel"] < 1 and 0 < figures["delta1"] <= 1 and figures["rmse"] > 0


def test_command_eval(folder, capsys):
    assert run(["codebook", "eval", str(folder / "codec"), "--data", str(folder), "--unit", "relative", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["maps"] == 12 and "absrel" not in figures and 0 < figures["relative_mae"] < 1
    assert None not in figures.values()
    assert run(["codebook", "eval", str(folder / "codec"), "--maps", "3"]) == 0
    assert "AbsRel" in capsys.readouterr().out


def test_command_encode(folder, capsys, tmp_path, monkeypatch):
    codec, files = DepthVQVAE.from_pretrained(folder / "codec").eval(), [str(folder / "00.png"), str(folder / "03.png")]
    arguments = ["codebook", "encode", str(folder / "codec"), *files, "--unit", "relative"]
    assert run([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / "out" / "codes.json").read_text())
    for row in rows:
        item = read_depth(row["file"], "relative")
        codes = codec.encode(torch.from_numpy(item.relative))
        assert row["codes"] == codes.tolist()
        written = read_depth(tmp_path / "out" / row["file"].split("/")[-1], "relative").relative
        np.testing.assert_allclose(written, codec.decode(codes, size=(40, 40)).detach(), atol=1e-4)
    monkeypatch.delattr(DepthVQVAE, "decode")  # what nobody writes is not decoded
    assert run(arguments) == 0 and json.loads(capsys.readouterr().out) == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "no file or folder nowhere"),
        (["eval", "CODEC", "--data", "nowhere", "--unit", "mm"], "not a folder"),
        (["eval", "CODEC", "--data", "FOLDER"], "--unit"),
        (["eval", "CODEC", "--unit", "mm"], "--unit"),
        (["eval", "CODEC", "--data", "world:x"], "world:"),
        (["eval", "CODEC", "--unit", "km"], "--unit"),
        (["encode", "CODEC", "FOLDER/00.png"], "--unit"),
        (["encode", "CODEC", "FOLDER/99.png", "--unit", "mm"], "99.png"),
        (["encode", "CODEC", "FOLDER/00.png", "other/00.png", "--unit", "mm"], "both become"),
        (["encode", "CODEC", "FOLDER/00.png", "--unit", "mm", "--out", "FOLDER/."], "is the folder of"),
        (["train", "--out", "FOLDER/new", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--out", "FOLDER/new", "--config", "FOLDER/00.png"], "not YAML"),
        (["train", "--out", "FOLDER/new", "--steps", "0"], "--steps"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(folder, capsys, arguments, message):
    arguments = [a.replace("CODEC", str(folder / "codec")).replace("FOLDER", str(folder)) for a in arguments]
    assert run(["codebook", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "kind", ["flipped.npz", "cut.npz", "claims.npy", "pickle.npy", "cut.png", "cut.tif", "huge.tif"]
)
def test_damaged_depth_files_get_one_line(folder, capsys, tmp_path, kind):
    file = tmp_path / kind
    depth = np.random.default_rng(0).random((40, 40)).astype(np.float32) + 1
    if kind.endswith("npz"):
        np.savez_compressed(file, depth)
    elif kind == "pickle.npy":
        np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    elif kind == "claims.npy":
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + "\n"
        file.write_bytes(b"\x93NUMPY\x01\x00v\x00" + header.encode() + bytes(8000))
    else:
        picture = Image.fromarray(depth) if kind.endswith("tif") else Image.fromarray((depth * 100).astype(np.uint8))
        picture.save(file)
    data = bytearray(file.read_bytes())
    if kind.startswith("cut"):
        data = data[: len(data) // 2]
    elif kind.startswith("flipped"):
        data[3000] ^= 8
    elif kind == "huge.tif":  # its header claims 65,000 rows and columns
        first = int.from_bytes(data[4:8], "little")
        for entry in range(first + 2, first + 2 + 12 * int.from_bytes(data[first : first + 2], "little"), 12):
            if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):  # width and height
                data[entry + 8 : entry + 10] = (65000).to_bytes(2, "little")
    file.write_bytes(data)
    codec = str(folder / "codec")
    given = ["--unit", "m", "--data", str(tmp_path)]
    for arguments in (
        ["encode", codec, str(file), "--unit", "m"],
        ["eval", codec, *given],
        ["train", "--out", str(tmp_path / "new"), "--steps", "1", *given],
    ):
        assert run(["codebook", *arguments]) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("perceptio: ")]
        assert len(lines) == 1 and kind in lines[0] and "Traceback" not in error


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"stepps": 3}, "stepps"),
        ({"codec": {"image_sice": 3}}, "image_sice"),
        ({"codec": {"image_size": "x"}}, "image_size"),
        ({"codec": {"image_size": 100}}, "image_size"),
        ({"options": {"batch_size": 0}}, "batch_size"),
        ([1], "keys and values"),
    ],
)
def test_bad_recipes_are_refused(folder, capsys, tmp_path, recipe, message):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    arguments = ["codebook", "train", "--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "new")]
    assert run(arguments) == 2 and message in capsys.readouterr().err


def test_damaged_codecs_are_refused(folder, capsys, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    for kind in ("weights", "config", "other", "missing"):
        copy = tmp_path / kind
        shutil.copytree(folder / "codec", copy)
        config, weights = copy / "config.json", copy / "model.safetensors"
        if kind == "weights":
            weights.write_bytes(weights.read_bytes()[:100])
        elif kind == "config":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"code_dim": 9}))
        elif kind == "other":
            config.write_text(json.dumps({"model_type": "bert"}))
        else:
            state = load_file(weights)
            state.pop("depth_codebook.vectors")
            save_file(state, weights, metadata={"format": "pt"})
        assert run(["codebook", "eval", str(copy)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_training_that_diverges_is_one_line(tmp_path, capsys):
    recipe = {"steps": 30, "maps": 4, "codec": SMALL, "options": {"learning_rate": 1e30}}  # to YAML a text
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["codebook", "train", "--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "codec")]) == 2
    error = capsys.readouterr().err
    assert "perceptio: The loss is " in error and "lower the learning rate" in error and "Traceback" not in error
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
def test_the_codec_trains_in_bfloat16_where_that_is_not_slower(bank, monkeypatch, known, precision):
    monkeypatch.setattr("perceptio_hf.training.codec.loop.multiplies_bfloat16", lambda device: known)
    seen, convolve = set(), F.conv2d

    def look(*arguments):
        seen.add(torch.is_autocast_enabled("cpu"))
        return convolve(*arguments)

    monkeypatch.setattr(F, "conv2d", look)
    options = CodebookOptions(precision=precision, kmeans_start=False)
    train_codebook(DepthVQVAEConfig(**SMALL), bank, steps=2, options=options)
    assert seen and (True in seen) is (precision == "bfloat16" or (precision == "auto" and known))
