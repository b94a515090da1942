"""The recipe's configuration of DeepSpeed's ZeRO-3, on two CPU processes: they take the steps of one process.

`make test-zero3` installs DeepSpeed.
"""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sft_helpers as sft
import yaml
from accelerate.utils import DeepSpeedPlugin
from helpers import random_model

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioSFTTrainer, tiny_checkpoint
from perceptio_hf.commands.main import run
from perceptio_hf.data.sources import write_samples
from perceptio_hf.data.world_samples import iter_world_samples
from perceptio_hf.training import zero3
from perceptio_hf.training.rewards.recipe import KINDS

ROOT = Path(__file__).parents[2]
# On CPUs DeepSpeed would first compile a faster way through shared memory, for minutes.
TRAIN = """
import sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from perceptio_hf.commands.main import run
sys.exit(run(sys.argv[1:]))
"""


NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed; make test-zero3 installs it"
)


def trained(folder: Path, rows: int, *launch: str, **changes) -> tuple[list[dict], dict]:
    """The logs and the weights of two steps, each of the same four samples."""
    recipe = {
        "model_name_or_path": "tiny",
        "tasks": [{"samples": str(folder.parent / "samples")}],
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    recipe |= {"per_device_train_batch_size": rows, "use_cpu": True, "bf16": False, "report_to": "none"}
    recipe |= {"disable_tqdm": True, "learning_rate": 1e-4} | changes
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(recipe))
    arguments = ["train", "--config", str(config), "--out", str(folder)]
    if launch:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-9000:]
    else:
        assert run(arguments) == 0
    state = json.loads((folder / f"checkpoint-{recipe['max_steps']}" / "trainer_state.json").read_text())
    return state["log_history"], PerceptioForConditionalGeneration.from_pretrained(folder / "checkpoint").state_dict()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_zero3(folder: Path, **changes) -> list[str]:
    """What launches two processes by the recipe's configuration."""
    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / "zero3_8gpu.yaml").read_text())
    settings |= {"num_processes": 2, "use_cpu": True, "main_process_port": free_port()} | changes
    (folder / "zero3.yaml").write_text(yaml.safe_dump(settings))
    (folder / "train.py").write_text(TRAIN)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "zero3.yaml")]
    return [*launch, str(folder / "train.py")]


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_two_processes_take_the_steps_of_one(tmp_path):
    kinds = ("refer", "depth", "spatial", "refer")
    rows = [next(iter(iter_world_samples(kind, seeds=[seed]))) for seed, kind in enumerate(kinds)]
    write_samples(tmp_path / "samples", rows)
    figures = [{"benchmark": "world-refer", "limit": 4}, {"benchmark": "world-closest", "limit": 4}]
    figures = {"eval_strategy": "steps", "eval_steps": 2, "figures": figures}  # answered by one with the whole model
    logs, weights = trained(tmp_path / "two", 2, *by_zero3(tmp_path), **figures)
    expected_logs, expected = trained(tmp_path / "one", 4, **figures)
    names = ("loss", "text", "token", "marker", "reconstruction", "mask_bce", "mask_dice", "grad_norm")
    for found, should in zip(logs[:2], expected_logs[:2], strict=True):
        assert {name: found[name] for name in names} == pytest.approx({n: should[n] for n in names}, rel=1e-3)
    name = "eval_world-refer_ciou"
    (answered,), (should,) = ([entry for entry in entries if name in entry] for entries in (logs, expected_logs))
    assert answered[name] == pytest.approx(should[name], rel=1e-2) and answered[name] > 0.1
    assert answered["eval_world-closest_accuracy"] == should["eval_world-closest_accuracy"]
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 2.5e-4
    start = PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint()).state_dict()
    moved = [name for name in start if not weights[name].equal(start[name])]
    assert any("language_model" in name for name in moved) and any("mask_decoder" in name for name in moved)
    assert not any("depth_model" in name for name in moved)


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_rewards_see_the_whole_model(tmp_path):
    """Whole or in shards: the same rewards and steps, though the processes' answers ask the model for more or less.
    All is sharded here; by default DeepSpeed leaves parts as small as the codec's whole."""
    recipe = {"recipe": "grpo", "num_generations": 4, "max_completion_length": 110, "beta": 0.02, "max_steps": 6}
    recipe["tasks"] = [{"world": kind, "scenes": 200, "first_seed": 500_000_000} for kind in ("closest", "refer")]
    recipe["rewards"] = {"right_answer": 1.0, "mask_iou": 1.0, "depth_error": 0.5}
    recipe |= {"save_steps": 6, "gradient_checkpointing": False}
    shards = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    values = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    (tmp_path / "deepspeed.json").write_text(json.dumps(values | {"zero_optimization": shards}))
    settings = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": True}
    launch = by_zero3(tmp_path, deepspeed_config=settings, mixed_precision=None)
    logs, _ = trained(tmp_path / "shards", 4, *launch, **recipe)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    expected, _ = trained(tmp_path / "whole", 4, sys.executable, *launch, str(tmp_path / "train.py"), **recipe)
    names = ("loss", "reward", "rewards/mask_iou/mean", "rewards/depth_error/mean", "grad_norm")
    assert any(entry.get("rewards/mask_iou/mean") for entry in logs)
    for found, should in zip(logs[:6], expected[:6], strict=True):
        for name in names:
            assert found[name] == (None if should[name] is None else pytest.approx(should[name], rel=1e-3, abs=1e-5))


@pytest.mark.parametrize("settings", [sft.settings, *(kind[0] for kind in KINDS.values())])
def test_half_precision_would_round_sam2_and_the_codec(tmp_path, monkeypatch, settings):
    """With DeepSpeed 0.19 their tensors came out of a training as bfloat16 has them, and the codec's fingerprint was
    another. Stages that share no weights out load the model as ever."""
    options = {"per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True}
    settings(str(tmp_path), **options | {"bf16": True})  # and accelerate's state, made before DeepSpeed is asked for
    monkeypatch.setattr(DeepSpeedPlugin, "set_deepspeed_weakref", lambda self: None)  # all that needs DeepSpeed itself
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage, bf16, refused in (("3", True, True), ("3", False, False), ("2", True, False)):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        if refused:
            with pytest.raises(ValueError, match=r"bf16 under DeepSpeed's ZeRO-3 rounds all weights.*fsdp2_8gpu"):
                settings(str(tmp_path), **options | {"bf16": bf16})
        else:
            assert zero3.is_on(settings(str(tmp_path), **options | {"bf16": bf16})) == (stage == "3")


def test_compute_metrics_would_wait_for_other_processes(tmp_path, monkeypatch):
    args = sft.settings(tmp_path)
    monkeypatch.setattr(zero3, "is_on", lambda settings: True)
    with pytest.raises(ValueError, match=r"compute_metrics takes a second pass.*perceptio eval"):
        PerceptioSFTTrainer(
            random_model(sft.processor()),
            args,
            train_dataset=sft.samples(4),
            processing_class=sft.processor(),
            compute_metrics=lambda prediction: {},
        )
