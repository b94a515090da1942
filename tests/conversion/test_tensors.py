"""Readers of foreign checkpoints: every kind of file, and files that are damaged or hostile."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from pickle_bomb import Bomb
from safetensors.torch import save_file

from perceptio_hf.conversion.local_copy import local_copy
from perceptio_hf.conversion.saved_models import load_depth_codec
from perceptio_hf.conversion.tensors import read_json, read_tensors


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "a.bias": torch.randn(5).to(torch.bfloat16),
        "b.count": torch.tensor(7),
        "c.weight": torch.randn(2, 3, 1),
    }


def same(read: dict, expected: dict) -> bool:
    return read.keys() == expected.keys() and all(
        read[name].dtype == expected[name].dtype and torch.equal(read[name], expected[name]) for name in expected
    )


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def write_shards(folder: Path, index: str = "model.safetensors.index.json") -> dict[str, torch.Tensor]:
    """Two shards and their index."""
    tensors = some_tensors()
    names, suffix = list(tensors), "safetensors" if "safetensors" in index else "bin"
    shards = {f"part-1.{suffix}": names[:2], f"part-2.{suffix}": names[2:]}
    for shard, held in shards.items():
        write({name: tensors[name] for name in held}, folder / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth", "x.bin"])
def test_a_file_of_any_kind(tmp_path, name):
    path = tmp_path / name
    write(some_tensors(), path)
    assert same(read_tensors(path), some_tensors())


def test_the_format_before_zip_archives(tmp_path):
    torch.save(some_tensors(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "x.pt"), some_tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(tmp_path, name):
    path = tmp_path / name
    write(some_tensors(), path)
    assert same(read_tensors(tmp_path), some_tensors())


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_folder_of_shards(tmp_path, index):
    tensors = write_shards(tmp_path, index)
    assert same(read_tensors(tmp_path), tensors)


def test_wrapper_and_prefix_go_only_where_asked(tmp_path):
    path = tmp_path / "x.pt"
    prefixed = {f"module.{name}": tensor for name, tensor in some_tensors().items()}
    torch.save({"weights": prefixed, "epoch": 3}, path)
    assert same(read_tensors(path, wrappers=("model", "weights"), prefix="module."), some_tensors())
    assert same(read_tensors(path, wrappers=("weights",)), prefixed)
    with pytest.raises(ValueError, match="holds 'weights', a dict"):
        read_tensors(path)


def test_a_prefix_of_some_names_stays(tmp_path):
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert same(read_tensors(tmp_path / "x.safetensors", prefix="module."), tensors)


def test_safetensors_are_mapped_not_copied(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
    read = read_tensors(tmp_path / "x.safetensors")["a"]
    with open(tmp_path / "x.safetensors", "r+b") as file:  # what is written to the file shows in the tensor
        file.seek(-4, os.SEEK_END)
        file.write(torch.tensor([3.0]).numpy().tobytes())
    assert read[3] == 3.0


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path, legacy):
    path, made = tmp_path / "x.pt", tmp_path / "made"
    torch.save({"a": torch.ones(1), "b": Bomb(made)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"x\.pt is refused.*mkdir.*run code"):
        read_tensors(path)
    assert not made.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert made.is_dir()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    write(some_tensors(), path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_tensors(path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_flipped_bits_give_an_error_of_ours_or_tensors(tmp_path, name):
    """Formats without checksums cannot tell every flip; what they can tell must not be a traceback."""
    path, refused = tmp_path / name, 0
    write(some_tensors(), path)
    whole, dice = path.read_bytes(), random.Random(0)
    for position in dice.sample(range(min(len(whole), 900)), 150):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << dice.randrange(8)]) + whole[position + 1 :])
        try:
            assert all(isinstance(value, torch.Tensor) for value in read_tensors(path).values())
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 20


def test_an_index_that_names_a_missing_shard(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "part-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names part-2\.safetensors, which is missing \(1 of 2"):
        read_tensors(tmp_path)


def test_an_index_that_places_a_tensor_wrongly(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"c.weight"', '"d.weight"'))
    with pytest.raises(ValueError, match=r"places d\.weight in part-2\.safetensors, which does not hold it"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "no `weight_map`"),
        ('{"weight_map": {"a": 3}}', "no `weight_map`"),
        ('{"weight_map": {"a": "../other.safetensors"}}', r"names \.\./other\.safetensors, outside"),
        ('{"weight_map": {}}', "holds no tensors"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder"):
        read_tensors(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"holds no weights: expected model\.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"of no known kind.*\.safetensors, \.pt"):
        read_tensors(tmp_path / "x.onnx")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_tensors(tmp_path / "list.pt")
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_tensors(tmp_path / "empty.pt")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter, not a model: merge it"):
        load_depth_codec(tmp_path)


def test_sources(tmp_path):
    assert local_copy(tmp_path) == tmp_path
    for name in (str(tmp_path / "absent"), "absent", "weights/absent.pt", "./a/b", "a/b/c"):
        with pytest.raises(ValueError, match="There is no file or folder"):
            local_copy(name)
    with pytest.raises(ValueError, match=r"There is no folder nobody/nothing, and it cannot be fetched"):
        local_copy("nobody/nothing")  # the tests are offline
