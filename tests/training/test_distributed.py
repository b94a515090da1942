"""Two processes on CPUs take the same steps as one: replicated (DDP) and sharded (FSDP2), started by accelerate."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sft_helpers as sft
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.training import fsdp
from perceptio_hf.training.losses import PARTS

TESTS = Path(__file__).parents[1]
FSDP = [
    "--use_fsdp",
    "--fsdp_version=2",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT",
    "--fsdp_cpu_ram_efficient_loading=false",
]


def launch(out: Path, options: list[str], changes: dict) -> dict:
    """Run `sft_helpers.py` in two processes; returns what it wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    command += ["--num_cpu_threads_per_process=1", str(TESTS / "sft_helpers.py"), str(out), json.dumps(changes)]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("MULTI_CPU", ["--multi_gpu"]), ("FSDP", FSDP)])
def test_two_processes_take_the_steps_of_one(tmp_path, kind, options):
    """Batches of 2 in 2 micro batches on 2 processes, of which some hold no mask and some no depth, against one of 8.

    The same launch also resumes from its first checkpoint.
    """
    single = sft.trainer(tmp_path / "single", evaluation=sft.samples(4, first=100))
    single.train()
    evaluation = single.evaluate()
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    found = launch(tmp_path / "both", options, changes | {"save_steps": 1})
    assert found["kind"].endswith(kind)
    assert (found["sharded"] > 100) == (kind == "FSDP")

    for expected, seen in zip(single.state.log_history[:2], found["history"][:2], strict=True):
        names = [*PARTS, "loss", "grad_norm"]
        assert {name: seen[name] for name in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-5)
    names = [f"eval_{name}" for name in (*PARTS, "loss")]
    assert {n: found["evaluation"][n] for n in names} == pytest.approx({n: evaluation[n] for n in names}, rel=1e-5)

    expected = single.model.state_dict()
    for folder in (tmp_path / "both", tmp_path / "both" / "resumed"):
        trained = PerceptioForConditionalGeneration.from_pretrained(folder).state_dict()
        assert trained.keys() == expected.keys()
        assert max(float((trained[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    assert (tmp_path / "both" / "checkpoint-2" / "trainer_state.json").is_file()


def test_fsdp_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        fsdp.prepare(FullyShardedDataParallelPlugin(fsdp_version=1))
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading is on"):
        fsdp.prepare(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True))


def test_fsdp_needs_a_picture_in_every_micro_batch(tmp_path):
    trainer = sft.trainer(tmp_path)
    trainer.is_fsdp_enabled = True
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="holds no picture"):
        trainer.compute_loss(trainer.model, batch)
