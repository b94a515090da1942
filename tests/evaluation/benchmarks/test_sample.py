"""Sources of pictures and depth, and what the data hash tells apart."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from perceptio_hf.data.depth_maps import DepthMap
from perceptio_hf.evaluation.benchmarks import Benchmark, DepthSource, PictureSource, Sample

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, format="PNG", **options)
    return file.getvalue()


def sources(folder) -> list[PictureSource]:
    (folder / "a.png").write_bytes(encoded())
    contents = [folder / "a.png", encoded(), lambda: PIXELS, lambda: encoded(), lambda: Image.fromarray(PIXELS)]
    return [PictureSource("a", content) for content in contents]


def test_every_source_gives_the_same_picture(tmp_path):
    for source in sources(tmp_path):
        assert source.open().mode == "RGB" and (np.asarray(source.open()) == PIXELS).all()


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    (tmp_path / "a.png").write_bytes(encoded(exif=exif))
    for content in (tmp_path / "a.png", encoded(exif=exif)):
        source = PictureSource("a", content)
        assert source.size() == source.open().size == (20, 30) and source.header() == ((20, 30), 6)
    assert PictureSource("a", encoded()).size() == (30, 20)


@pytest.mark.parametrize("content", [b"", b"no picture", encoded()[:60]])
def test_broken_pictures_are_named(content):
    with pytest.raises(ValueError, match="row 7"):
        PictureSource("row 7", content).open()


def test_a_missing_file_is_named(tmp_path):
    for use in (PictureSource.open, PictureSource.size):
        with pytest.raises(ValueError, match=r"row 7"):
            use(PictureSource("row 7", tmp_path / "gone.png"))


def benchmark(samples: list[Sample]) -> Benchmark:
    return Benchmark("depth", "depth", "depth", "?", "all", samples)


def test_the_hash_changes_with_what_is_asked_and_what_is_right(tmp_path):
    first = sources(tmp_path)[0]
    sample = Sample("1", first, "which?", {"answer": "A", "choices": ["A", "B"]})
    (tmp_path / "longer.png").write_bytes(encoded() + b"\0")
    others = [
        replace(sample, id="2"),
        replace(sample, question="Which?"),
        replace(sample, target={"answer": "B", "choices": ["A", "B"]}),
        replace(sample, picture=PictureSource("b", first.content)),
        replace(sample, picture=PictureSource("a", tmp_path / "longer.png")),
        replace(sample, depth=DepthSource("a", lambda: DepthMap.from_metric(np.ones((2, 2))))),
    ]
    hashes = {benchmark([item]).data_hash for item in (sample, *others)} | {benchmark([sample, others[0]]).data_hash}
    assert len(hashes) == len(others) + 2
    again = Sample("1", PictureSource("a", tmp_path / "a.png"), "which?", {"choices": ["A", "B"], "answer": "A"})
    assert benchmark([again]).data_hash == benchmark([sample]).data_hash


def test_pictures_in_memory_count_by_content():
    one, two = (PictureSource("a", encoded() + bytes([k])) for k in (1, 2))
    assert one.signature() != two.signature()


def test_depth_of_a_file(tmp_path):
    np.save(tmp_path / "d.npy", np.array([[1.0, 2.0], [0.0, 4.0]], np.float32))
    depth = DepthSource("d", tmp_path / "d.npy", "m").open()
    assert depth.metric.tolist() == [[1.0, 2.0], [0.0, 4.0]] and depth.relative[0, 0] == 1.0
    np.save(tmp_path / "d.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"d\.npy: no pixel holds a valid depth"):
        DepthSource("d", tmp_path / "d.npy", "m").open()
