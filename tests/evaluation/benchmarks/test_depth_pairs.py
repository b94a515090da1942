"""A folder of pictures with depth maps beside them."""

import numpy as np
import pytest
from evaluation.published_formats import scenes_of, write_depth_pairs

from perceptio_hf.data.depth_maps import relative_from_metric
from perceptio_hf.evaluation.benchmarks import open_benchmark


@pytest.fixture(scope="module")
def scenes():
    return scenes_of(range(3))


@pytest.fixture
def folder(tmp_path, scenes):
    write_depth_pairs(tmp_path, scenes)
    return tmp_path


def test_pairs(folder, scenes):
    read = open_benchmark("depth", folder, unit="mm")
    assert [sample.id for sample in read.samples] == [f"frame-{k:03d}" for k in range(len(scenes))]
    for sample, scene in zip(read.samples, scenes, strict=True):
        depth = sample.depth.open()
        assert np.abs(depth.metric - scene.depth).max() <= 0.0006
        assert np.abs(depth.relative - relative_from_metric(scene.depth)).max() < 0.01
        assert sample.picture.open().size == (64, 64) and sample.target == {"depth": f"{sample.id}.depth.png"}


def test_other_names(folder, scenes):
    for file in folder.glob("*.depth.png"):
        file.rename(folder / file.name.replace(".depth", "_d"))
    options = {"unit": "mm", "pictures": "frame-*.color.jpg", "depths": "frame-*_d.png"}
    assert len(open_benchmark("depth", folder, **options).samples) == len(scenes)


def test_real_frames(shared):
    read = open_benchmark("depth", shared / "rgbd", unit="mm", limit=3)
    assert len(read.samples) == 3
    depth = read.samples[1].depth.open()
    assert depth.metric.shape == (480, 640) and 0.3 < np.median(depth.metric[depth.valid]) < 5
    assert not depth.valid.all()  # holes stay holes


def test_readings_beyond_a_distance_do_not_count(folder, scenes):
    whole = open_benchmark("depth", folder, unit="mm")
    most = float(np.median(scenes[0].depth))
    capped = open_benchmark("depth", folder, unit="mm", max_depth=most)
    depth, all_of_it = capped.samples[0].depth.open(), whole.samples[0].depth.open()
    assert (depth.valid == (all_of_it.metric <= most)).all() and 0.3 < depth.valid.mean() < 0.7
    assert depth.metric.max() <= most and depth.relative[depth.valid].min() == 0, "the range is that of what counts"
    assert capped.data_hash != whole.data_hash
    with pytest.raises(ValueError, match=r"frame-000.depth.png, up to 0.001 m: no pixel"):
        open_benchmark("depth", folder, unit="mm", max_depth=0.001).samples[0].depth.open()
    with pytest.raises(ValueError, match="max_depth is -1"):
        open_benchmark("depth", folder, unit="mm", max_depth=-1)
    with pytest.raises(ValueError, match="--max-depth is in metres, and --unit relative has no distances"):
        open_benchmark("depth", folder, unit="relative", max_depth=80)
    with pytest.raises(ValueError, match="are for the benchmark `depth` only"):
        open_benchmark("world-depth", max_depth=80)


def test_bad_input(folder):
    with pytest.raises(ValueError, match=r"--unit says .*: mm, m, m/256, disparity, relative; not None"):
        open_benchmark("depth", folder)
    with pytest.raises(ValueError, match=r"a\.jpg is a file; name the folder"):
        (folder / "a.jpg").touch()
        open_benchmark("depth", folder / "a.jpg", unit="mm")
    with pytest.raises(ValueError, match=r"must hold one \*"):
        open_benchmark("depth", folder, unit="mm", depths="depth.png")


@pytest.mark.parametrize("pattern", ["frame-000.color.jpg", "frame-001.depth.png"])
def test_a_file_without_its_partner(folder, pattern):
    (folder / pattern).unlink()
    with pytest.raises(ValueError, match=rf"every picture needs its depth map. Without partner: .*{pattern[6:9]}"):
        open_benchmark("depth", folder, unit="mm")
