"""What is written is read again: a weight that changed by a millionth on its way, or a setting, is found."""

import json
from pathlib import Path

import pytest
import torch
from component_helpers import codec, mask_model
from conversion.test_sa2va import write_source
from original_aurora import aurora_tensors
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from perceptio_hf import DepthVQVAE, PerceptioForConditionalGeneration, tiny_checkpoint
from perceptio_hf.commands import main
from perceptio_hf.conversion.sa2va import convert_sa2va
from perceptio_hf.conversion.written import Written
from perceptio_hf.lab.lessons.model import tiny_mask_config


def change(folder: Path) -> str:
    """Scale the last matrix of a folder by 1 + 1e-6 and return its name there."""
    tensors = load_file(folder / "model.safetensors")
    name = [name for name, value in tensors.items() if value.ndim > 1 and value.is_floating_point() and value.any()][-1]
    tensors[name] = tensors[name] * (1 + 1e-6)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.fixture
def damage(monkeypatch):
    """`save_pretrained` of a class writes something else than the model is."""

    def of(model_class: type) -> None:
        save = model_class.save_pretrained

        def saving(self, folder, *arguments, **options):
            save(self, folder, *arguments, **options)
            change(Path(folder))

        monkeypatch.setattr(model_class, "save_pretrained", saving)

    return of


@pytest.mark.parametrize("make", [codec, mask_model])
def test_weights_and_settings_are_compared(tmp_path, make):
    model = make()
    written = Written.of(model)
    model.save_pretrained(tmp_path)
    written.check(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    name = next(name for name, value in document.items() if isinstance(value, float))
    (tmp_path / "config.json").write_text(json.dumps(document | {name: document[name] * 1.001}))
    with pytest.raises(ValueError, match=rf"not what was to be written: {name} in config.json differs \(1 of"):
        written.check(tmp_path)
    model.save_pretrained(tmp_path)
    changed = change(tmp_path)
    with pytest.raises(ValueError, match=rf"not what was to be written: {changed} differs \(1 of"):
        written.check(tmp_path)


@pytest.mark.parametrize("command", ["convert aurora-vqvae", "export"])
def test_commands_keep_nothing_that_differs(tmp_path, damage, capsys, command):
    torch.save({"weights": aurora_tensors(width=2)}, tmp_path / "vae.pt")
    source = tiny_checkpoint() if command == "export" else tmp_path / "vae.pt"
    damage(InternVLForConditionalGeneration if command == "export" else DepthVQVAE)
    arguments = [*command.split(), str(source), str(tmp_path / "out")]
    assert main.run(arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "What was written is not what was to be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"]
    assert main.run([*arguments, "--no-verify"]) == 0 and (tmp_path / "out").is_dir()


def test_a_sa2va_is_read_again(tmp_path, damage):
    source = write_source(tmp_path / "source", "Qwen2ForCausalLM")
    damage(PerceptioForConditionalGeneration)
    with pytest.raises(ValueError, match="What was written is not what was to be written"):
        convert_sa2va(source, tmp_path / "out", depth_codec=codec(), mask_config=tiny_mask_config())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
