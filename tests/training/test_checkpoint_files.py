"""A damaged checkpoint is named and the one before it is taken, whichever of its files is damaged and how."""

import json
import os
import shutil
from pathlib import Path

import pytest
import sft_helpers as sft
from helpers import assert_trained_alike
from safetensors.torch import load_file

from perceptio_hf.training import checkpoints
from perceptio_hf.training.checkpoint_files import RECORD, fault_of
from perceptio_hf.training.checkpoints import last_checkpoint, set_aside_later

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-2,  # see `helpers.assert_trained_alike`
}


@pytest.fixture(scope="module")
def processor():
    return sft.processor()


@pytest.fixture(scope="module")
def trained(processor, tmp_path_factory) -> Path:
    """A folder with checkpoint-2 and checkpoint-4."""
    out = tmp_path_factory.mktemp("trained") / "out"
    sft.trainer(out, processor=processor, **SETTINGS).train()
    return out


@pytest.fixture
def out(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "out")


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _swap_values(path: Path) -> None:
    """Other numbers of the same length: nothing of the file itself tells."""
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))


DAMAGES = {
    "halved": _halve,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a bit flipped": _flip,
}
FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
    *("training_args.bin", "tokenizer.json", "processor_config.json", RECORD),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_taken(out, caplog, name, damage):
    DAMAGES[damage](out / "checkpoint-4" / name)
    if (name, damage) == (RECORD, "removed"):  # one of before there were records
        assert last_checkpoint(out).name == "checkpoint-4"
        return
    if (name, damage) == (RECORD, "a bit flipped"):  # may hit a digest, which then accuses its file
        assert last_checkpoint(out).name == "checkpoint-2"
        return
    assert last_checkpoint(out).name == "checkpoint-2"
    (record,) = caplog.records
    assert "checkpoint-4 cannot be used" in record.message and "taking checkpoint-2" in record.message
    assert name in record.message


def test_values_that_were_exchanged(out):
    _swap_values(out / "checkpoint-4" / "model.safetensors")
    assert "model.safetensors is not what was written" in fault_of(out / "checkpoint-4")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["halved", "emptied"])
def test_without_a_record_the_files_tell_of_themselves(out, name, damage):
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        (out / checkpoint / RECORD).unlink()
        assert fault_of(out / checkpoint) is None
    DAMAGES[damage](out / "checkpoint-4" / name)
    assert name in fault_of(out / "checkpoint-4")
    assert last_checkpoint(out).name == "checkpoint-2"


@pytest.mark.parametrize(("name", "words"), [("optimizer.pt", "optimizer"), ("model.safetensors", "weights")])
def test_without_a_record_what_is_needed_must_be_there(out, name, words):
    (out / "checkpoint-4" / RECORD).unlink()
    (out / "checkpoint-4" / name).unlink()
    assert words in fault_of(out / "checkpoint-4")


def test_training_goes_on_to_the_same_weights_and_keeps_the_good_checkpoint(out, trained, processor):
    """With one checkpoint to keep, a damaged one of a later step must not be the one that is kept."""
    _halve(out / "checkpoint-4" / "optimizer.pt")
    expected = load_file(trained / "checkpoint-4" / "model.safetensors")
    trainer = sft.trainer(
        out, processor=processor, **SETTINGS | {"max_steps": 3, "save_total_limit": 1, "save_steps": 1}
    )
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-3", "set-aside-checkpoint-4"}
    sft.trainer(out, processor=processor, **SETTINGS).train(resume_from_checkpoint=True)
    assert_trained_alike(load_file(out / "checkpoint-4" / "model.safetensors"), expected)


def test_a_checkpoint_that_is_asked_for_is_not_replaced_by_another(out, processor):
    _halve(out / "checkpoint-4" / "rng_state.pth")
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be used: rng_state\.pth has \d+ bytes instead of \d+"):
        sft.trainer(out, processor=processor, **SETTINGS).train(resume_from_checkpoint=str(out / "checkpoint-4"))


def _names(out: Path) -> set[str]:
    return {path.name for path in out.glob("*checkpoint-*")}


def test_a_training_that_begins_anew_keeps_its_own_checkpoints(out, processor, caplog):
    """The only one that may stay is the new one, though there are two of higher steps, one of them damaged."""
    _halve(out / "checkpoint-4" / "optimizer.pt")
    trainer = sft.trainer(
        out, processor=processor, **SETTINGS | {"max_steps": 1, "save_steps": 1, "save_total_limit": 1}
    )
    trainer.train()
    assert _names(out) == {"checkpoint-1", "set-aside-checkpoint-2", "set-aside-checkpoint-4"}
    assert last_checkpoint(out).name == "checkpoint-1"
    (line,) = [record.message for record in caplog.records if "begins at step" in record.message]
    assert "begins at step 0, so checkpoint-2, checkpoint-4 in" in line


def test_who_resumes_from_an_earlier_one_goes_on_from_what_follows(out, processor):
    trainer = sft.trainer(out, processor=processor, **SETTINGS | {"max_steps": 3, "save_steps": 1})
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert trainer.state.global_step == 3 and last_checkpoint(out).name == "checkpoint-3"
    assert _names(out) == {"checkpoint-2", "checkpoint-3", "set-aside-checkpoint-4"}
    assert fault_of(out / "set-aside-checkpoint-4") is None


def test_what_was_just_written_is_never_the_one_that_goes(out, processor, monkeypatch):
    """Whatever else comes into the folder meanwhile: age counts, not the number."""
    monkeypatch.setattr(checkpoints, "set_aside_later", lambda *place: None)
    for number, name in enumerate(("checkpoint-2", "checkpoint-4")):
        os.utime(out / name, (1000 + number, 1000 + number))
    sft.trainer(out, processor=processor, **SETTINGS | {"max_steps": 1, "save_steps": 1, "save_total_limit": 1}).train()
    assert _names(out) == {"checkpoint-1"}


def test_nothing_that_was_set_aside_is_lost(tmp_path):
    for name in ("checkpoint-3", "set-aside-checkpoint-3", "checkpoint-2", "checkpoint"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3" / "new").touch()
    set_aside_later(tmp_path, 2)
    kept = {"set-aside-checkpoint-3", "set-aside-checkpoint-3-2", "checkpoint-2", "checkpoint"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "set-aside-checkpoint-3-2" / "new").exists()


def test_the_record_is_of_all_files(trained):
    checkpoint = trained / "checkpoint-4"
    record = json.loads((checkpoint / RECORD).read_text())
    assert set(record) == {path.name for path in checkpoint.iterdir()} - {RECORD}
