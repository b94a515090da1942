"""Maps that a training of the codec reads as it goes: order, workers, going on, several processes, a teacher's view."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from component_helpers import save_teacher
from helpers import assert_trained_alike, picture
from PIL import Image

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.bulk.items import list_items
from perceptio_hf.commands.codebook import train as command
from perceptio_hf.commands.main import run
from perceptio_hf.data.depth_maps import DepthMap, write_depth_png
from perceptio_hf.evaluation.metrics.depth import codec_metrics
from perceptio_hf.labelling.teacher import Teacher, teacher_info
from perceptio_hf.training.codec import CodebookOptions, DepthBank, FileMaps, TeacherMaps, WorldMaps, train_codebook
from perceptio_hf.training.codec.loop import Saving
from perceptio_hf.training.codec.maps import Order, batches, some_maps, spread

CONFIG = DepthVQVAEConfig(image_size=32, downsample=8, num_codes=16, code_dim=8, base_channels=4, activation="silu")
PLAIN = CodebookOptions(batch_size=4, precision="float32", learning_rate=1e-3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> FileMaps:
    """Twenty-six maps with two levels each, by which they are told apart."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    for index in range(26):
        values = np.clip(np.linspace(0, 1, 40)[:, None] * rng.uniform(0.4, 1) + rng.uniform(0, 0.3, 40), 0, 1)
        write_depth_png(folder / f"{index:02}.png", values.astype(np.float32))
    return FileMaps(sorted(folder.glob("*.png")), "relative", 32)


def taken(order: Order, steps: int) -> list[list[int]]:
    return [numbers for numbers, _ in zip(order, range(steps), strict=False)]


def test_every_epoch_goes_through_all_in_another_order():
    numbers = list(chain(*taken(Order(10, 4, seed=1), 10)))
    epochs = [numbers[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert numbers != list(chain(*taken(Order(10, 4, seed=2), 10)))


def test_processes_share_out_an_order_and_a_later_step_is_the_same():
    whole = taken(Order(10, 6, seed=1), 8)
    parts = [taken(Order(10, 3, seed=1, part=part, parts=2), 8) for part in (0, 1)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert taken(Order(10, 6, seed=1, first=5), 3) == whole[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(files, workers):
    bank = DepthBank.gather(map(files.read, range(len(files))), CONFIG)
    expected, found = batches(bank, Order(26, 4, seed=3)), batches(files, Order(26, 4, seed=3), workers=workers)
    for _ in range(9):
        for one, other in zip(next(expected), next(found), strict=True):
            assert torch.equal(one, other) and one.shape == (4, 32, 32)
    resumed = batches(files, Order(26, 4, seed=3, first=9))
    assert torch.equal(next(resumed)[0], next(expected)[0])


def test_half_of_the_maps_are_mirrored(files):
    bank = DepthBank.gather([files.read(0)], CONFIG)
    seen = Counter()
    for _, (relative, _) in zip(range(20), batches(bank, Order(1, 4, seed=0)), strict=False):
        for item in relative:
            seen["as it is" if torch.equal(item, bank.relative[0]) else "mirrored"] += 1
            assert torch.equal(item, bank.relative[0]) or torch.equal(item, bank.relative[0].flip(-1))
    assert min(seen.values()) > 20


def test_samples_are_spread_over_all(files):
    assert spread(100, 4) == [0, 25, 50, 75] and spread(3, 9) == [0, 1, 2]
    assert sum(len(relative) for relative, _ in some_maps(files, 7, batch_size=3)) == 7


def test_a_stream_trains_as_maps_in_memory_do(files):
    bank = DepthBank.gather(map(files.read, range(len(files))), CONFIG)
    options = CodebookOptions(batch_size=4, precision="float32", learning_rate=1e-3, kmeans_start=False)
    streamed, kept = (train_codebook(CONFIG, source, steps=12, options=options) for source in (files, bank))
    assert_trained_alike(streamed.state_dict(), kept.state_dict(), tolerance=2e-3)


class Stop(Exception):
    pass


def test_a_training_that_was_stopped_goes_on(files, tmp_path, monkeypatch):
    def saving(**claim) -> Saving:
        return Saving(tmp_path / "state.pt", {"data": "files", **claim}, minutes=0.0)

    def stop(share: float, error: float) -> None:
        if share > 0.5:
            raise Stop

    with pytest.raises(Stop):
        train_codebook(CONFIG, files, steps=300, options=PLAIN, saving=saving(), progress=lambda *_: stop(1.0, 0.0))
    with pytest.raises(ValueError, match="codes were not begun with, and the steps or minutes"):
        train_codebook(CONFIG, files, steps=1, options=PLAIN, saving=saving())
    (tmp_path / "state.pt").unlink()
    late = replace(PLAIN, continuous_share=0.99)  # of thirty steps the last begins at .967
    with pytest.raises(ValueError, match="trained for 30 steps, its codes were not begun with"):
        train_codebook(CONFIG, files, steps=30, options=late, saving=saving())
    train_codebook(CONFIG, files, steps=200, options=late, saving=saving())  # goes on
    (tmp_path / "state.pt").unlink()
    straight = train_codebook(CONFIG, files, steps=30, options=PLAIN)
    with pytest.raises(Stop):
        train_codebook(CONFIG, files, steps=30, options=PLAIN, saving=saving(), progress=stop)
    step = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    assert 10 <= step < 30
    for changed, says in (({"data": "others"}, "another data"), ({}, "another seed")):
        with pytest.raises(ValueError, match=says):
            train_codebook(CONFIG, files, steps=30, options=PLAIN, seed=int(not changed), saving=saving(**changed))
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9.9")  # upgraded in between
    seen = []
    resumed = train_codebook(
        CONFIG, files, steps=30, options=PLAIN, saving=saving(), progress=lambda share, _: seen.append(share)
    )
    assert seen and min(seen) > 0.5
    assert_trained_alike(resumed.state_dict(), straight.state_dict(), tolerance=2e-3)
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        train_codebook(CONFIG, files, steps=30, options=PLAIN, saving=saving())


def test_a_full_disk_is_one_line_that_says_what_to_do(files, tmp_path):
    """torch says it by a RuntimeError about positions in a file."""
    saving = Saving(tmp_path / "state.pt", {}, minutes=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # no file may become larger
    try:
        with pytest.raises(OSError, match=rf"{saving.path} could not be written .*; make room there and give the same"):
            train_codebook(CONFIG, files, steps=30, options=PLAIN, saving=saving)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_looks_while_the_codec_trains(tmp_path):
    save_teacher(tmp_path / "teacher")
    (tmp_path / "photos").mkdir()
    for index in range(6):
        picture(*((60, 40), (40, 60))[index % 2], seed=index).save(tmp_path / "photos" / f"{index}.png")
    teacher = Teacher(teacher_info(str(tmp_path / "teacher")), "cpu")
    source = TeacherMaps(list_items([str(tmp_path / "photos")]), teacher, 32)
    relative, weight = source.batch([source.prepare(index) for index in (0, 1, 2)])
    assert relative.shape == weight.shape == (3, 32, 32)
    for place in range(3):
        alone = DepthBank.gather([source.read(place)], CONFIG)
        torch.testing.assert_close(relative[place], alone.relative[0], atol=1e-4, rtol=0)
    train_codebook(CONFIG, source, steps=3, options=PLAIN, workers=1)
    picture(1, 1).save(tmp_path / "photos" / "1.png")
    relative, weight = source.batch([source.prepare(index) for index in (0, 1, 2)])
    assert len(relative) == 2
    (left_out,) = source.left_out
    assert re.search(r"photos/1\.png: the teacher's depth cannot be used: every valid pixel", left_out)


@pytest.fixture
def damaged(files, tmp_path) -> Path:
    """The maps, of which two are none."""
    folder = tmp_path / "damaged"
    shutil.copytree(files.paths[0].parent, folder)
    (folder / "03.png").write_bytes(b"no picture")
    write_depth_png(folder / "11.png", np.zeros((8, 8), np.float32))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_left_out_and_named(damaged, workers, caplog):
    maps = FileMaps(sorted(damaged.glob("*.png")), "relative", 32)
    train_codebook(CONFIG, maps, steps=14, options=PLAIN, workers=workers)  # two times through all
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == 2 and re.search(r"left out: .*03\.png", said[0]) and re.search(r"11\.png.*same depth", said[1])
    seen = [len(relative) for _, (relative, _) in zip(range(13), batches(maps, Order(26, 4, seed=3)), strict=False)]
    assert sum(seen) == 2 * 24
    assert [index for index, _ in maps.read_each(range(5))] == [0, 1, 2, 4]


def test_too_many_that_cannot_be_used_end_it(files):
    """With another unit than theirs, for example, nothing of all that would be what it should be."""
    maps = FileMaps([*files.paths, *[files.paths[0].with_name(f"no-{place}.png") for place in range(11)]], "mm", 32)
    with pytest.raises(ValueError, match=r"11 of 37 depth maps cannot be used, such as .*no-0\.png"):
        list(maps.read_each(range(37)))
    alone = FileMaps([files.paths[0].with_name("none.png")], "mm", 32)
    with pytest.raises(ValueError, match=r"no depth map can be used, of a whole batch or of all: .*none\.png"):
        next(batches(alone, Order(1, 4, seed=0)))
    with pytest.raises(ValueError, match=r"no depth map can be used, of a whole batch or of all: .*none\.png"):
        list(alone.read_each([0]))


def test_the_world_is_rendered_as_it_is_needed():
    from perceptio_hf.world import render_scene

    maps = WorldMaps(7, 3, 32)
    assert len(maps) == 3
    np.testing.assert_array_equal(maps.read(2).metric, render_scene(9, size=32).depth.astype(np.float32))


@pytest.fixture
def recipe(files, tmp_path) -> Path:
    document = {"data": str(files.paths[0].parent), "unit": "relative", "steps": 12, "codec": {}}
    fields = ("image_size", "downsample", "num_codes", "code_dim", "base_channels", "activation")
    document["codec"] = {name: getattr(CONFIG, name) for name in fields}
    document["options"] = {"batch_size": 4}
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_command_says_what_it_left_out(recipe, damaged, tmp_path, monkeypatch, capsys, in_memory):
    if not in_memory:
        monkeypatch.setattr(command, "_IN_MEMORY", 0)
    arguments = ["codebook", "train", "--config", str(recipe), "--data", str(damaged), "--device", "cpu", "--json"]
    assert run([*arguments, "--out", str(tmp_path / "codec")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["on_training_maps"]["maps"] == 24
    assert [re.search(r"(03|11)\.png", line)[1] for line in sorted(record["left_out"])] == ["03", "11"]


def test_the_command_streams_what_does_not_fit(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_IN_MEMORY", 0)
    monkeypatch.setattr(DepthBank, "gather", None)
    arguments = ["codebook", "train", "--config", str(recipe), "--workers", "1", "--device", "cpu", "--json"]
    assert run([*arguments, "--out", str(tmp_path / "codec")]) == 0
    assert json.loads(capsys.readouterr().out)["on_training_maps"]["maps"] == 26
    with Image.open(tmp_path / "codec" / "maps.png") as drawn:
        assert drawn.width > 2000 and drawn.height > 2000  # four of the best and of the worst, two in a row
    assert not (tmp_path / "codec.training").exists()


def test_the_command_trains_on_labels_and_on_pictures(recipe, tmp_path, capsys):
    save_teacher(tmp_path / "teacher")
    DepthVQVAE(CONFIG).save_pretrained(tmp_path / "first")
    (tmp_path / "photos").mkdir()
    for index in range(5):
        picture(60, 40, seed=index).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    words = [str(tmp_path / "photos"), "--teacher", str(tmp_path / "teacher"), "--depth-codec", str(tmp_path / "first")]
    assert run(["label", *words, "--maps", "--out", str(tmp_path / "labels")]) == 0
    document = json.loads(recipe.read_text())
    document.pop("unit"), document.pop("data")
    recipe.write_text(json.dumps(document))
    train = ["codebook", "train", "--config", str(recipe), "--steps", "4", "--json"]
    capsys.readouterr()
    assert run([*train, "--data", str(tmp_path / "labels"), "--out", str(tmp_path / "a")]) == 0
    from_labels = json.loads(capsys.readouterr().out)["on_training_maps"]
    assert from_labels["maps"] == 5
    given = ["--data", str(tmp_path / "photos"), "--teacher", str(tmp_path / "teacher")]
    assert run([*train, *given, "--out", str(tmp_path / "b")]) == 2
    assert "1 of 6 pictures cannot be read, such as bad.png" in capsys.readouterr().err  # before it begins
    (tmp_path / "photos" / "bad.png").unlink()
    picture(3000, 3).save(tmp_path / "photos" / "banner.png")
    assert run([*train, *given, "--out", str(tmp_path / "b")]) == 2
    narrow = capsys.readouterr().err
    assert "banner.png: the teacher's image processor cannot take a picture of 3000 x 3" in narrow
    (tmp_path / "photos" / "banner.png").unlink()
    earlier = tmp_path / "photos" / "b"  # beside the pictures lies what an earlier run drew
    earlier.mkdir()
    (earlier / "maps.png").write_text("no picture")
    (earlier / "config.json").touch()
    assert run([*train, *given, "--overwrite", "--out", str(earlier)]) == 0
    seen = json.loads(capsys.readouterr().out)["on_training_maps"]
    assert abs(seen["relative_mae"] - from_labels["relative_mae"]) < 0.02, "the same maps, but for 16 bits"
    for words, says in (
        (["--data", str(tmp_path / "labels"), "--unit", "mm"], "--unit and --pattern are for folders"),
        (["--teacher-unit", "m"], "is for a --teacher"),
        (["--data", str(tmp_path / "photos"), "--teacher", str(tmp_path / "first")], "says no depth"),
    ):
        assert run([*train, *words, "--out", str(tmp_path / "c")]) == 2
        assert says in capsys.readouterr().err


def test_what_a_teacher_s_numbers_are_is_part_of_a_training(files, tmp_path, monkeypatch):
    """One that was stopped with disparities does not go on with metres."""
    claims = []

    def note(*args, saving: Saving, **kwargs) -> None:
        claims.append(saving.claim)

    monkeypatch.setattr("perceptio_hf.training.codec.train_codebook", note)
    settings = dict.fromkeys(("data", "unit", "pattern", "maps", "teacher", "steps", "minutes", "seed"))
    for unit in ("m", "disparity"):
        command._trained(CONFIG, files, settings | {"teacher_unit": unit}, PLAIN, 0, Accelerator(cpu=True), tmp_path)
    assert claims[0] != claims[1]


@pytest.mark.slow
def test_two_processes_train_as_one(recipe, files, tmp_path):
    """By accelerate's own launcher, whose precision does not count; what they save is what one process makes, but for
    rounding."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    document = json.loads(recipe.read_text())
    document["options"] |= {"precision": "float32", "learning_rate": 1e-3, "kmeans_start": False}
    recipe.write_text(json.dumps(document))
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=bf16", "--dynamo_backend=no"]
    options += [f"--main_process_port={port}", "--num_cpu_threads_per_process=1", "-m", "perceptio_hf"]
    words = ["codebook", "train", "--config", str(recipe), "--device", "cpu"]
    launched = [sys.executable, "-m", "accelerate.commands.launch", *options, *words, "--out", str(tmp_path / "two")]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("26 depth maps") == 1, "one of them reports"
    assert run([*words, "--out", str(tmp_path / "one")]) == 0
    two, one = (DepthVQVAE.from_pretrained(tmp_path / name).eval() for name in ("two", "one"))
    shown = [files.read(index) for index in range(26)]
    errors = [codec_metrics(codec, shown)["relative_mae"] for codec in (two, one)]
    assert abs(errors[0] - errors[1]) < 0.01
    for name, value in one.depth_encoder.state_dict().items():
        assert (two.depth_encoder.state_dict()[name] - value).abs().mean() < 1e-3, name
    assert isinstance(shown[0], DepthMap)
