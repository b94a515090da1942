"""Two processes on CPUs take the same steps as one: replicated (DDP) and sharded (FSDP2), started by accelerate."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sft_helpers as sft
from accelerate.utils import FullyShardedDataParallelPlugin

from perceptio_hf import PerceptioForConditionalGeneration
from perceptio_hf.training import fsdp
from perceptio_hf.training.losses import PARTS

TESTS = Path(__file__).parents[1]
FIGURES = ("world-refer_ciou", "world-depth_absrel", "broken_spans")  # of answers of the whole model
KINDS = ("FSDP", "MULTI_CPU")
FSDP = [
    "--use_fsdp",
    "--fsdp_version=2",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT",
    "--fsdp_cpu_ram_efficient_loading=false",
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """Where `sft_helpers.py` has trained in two processes, sharded and then replicated: one launch for both, since
    starting takes longer than training."""
    out = tmp_path_factory.mktemp("launched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *FSDP, "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    command += ["--num_cpu_threads_per_process=1", str(TESTS / "sft_helpers.py"), str(out), *KINDS]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "said.txt").write_text(done.stderr)
    return out


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[sft.PerceptioSFTTrainer, dict]:
    """The same steps by one process: its trainer, and its evaluation."""
    data = {"train": sft.some_without_picture(16), "evaluation": sft.samples(4, first=100)}
    trainer = sft.trainer(tmp_path_factory.mktemp("single"), freeze_vision_tower=False, **data)
    trainer.train()
    trainer.figures = sft.answered()
    return trainer, trainer.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(launched, single, kind):
    """Micro batches of 1, 4 a step, on 2 processes, of which some hold no picture, some no mask and some no depth,
    against one batch of 8; and the same resumed from the first checkpoint."""
    one, evaluation = single
    found = json.loads((launched / kind / "result.json").read_text())
    assert found["kind"].endswith(kind)
    assert (found["sharded"] > 100) == (kind == "FSDP")

    for expected, seen in zip(one.state.log_history[:2], found["history"][:2], strict=True):
        names = [*PARTS, "loss", "grad_norm"]
        assert {name: seen[name] for name in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-5)
    names = [f"eval_{name}" for name in (*PARTS, "loss", *FIGURES)]
    assert {n: found["evaluation"][n] for n in names} == pytest.approx({n: evaluation[n] for n in names}, rel=1e-5)
    assert (launched / kind / "figures" / "world-refer-2.png").is_file()

    expected = one.model.state_dict()
    for folder in (launched / kind, launched / kind / "resumed"):
        trained = PerceptioForConditionalGeneration.from_pretrained(folder).state_dict()
        assert trained.keys() == expected.keys()
        assert max(float((trained[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    assert (launched / kind / "checkpoint-2" / "trainer_state.json").is_file()
    trained = sum(parameter.numel() for parameter in one.model.parameters() if parameter.requires_grad)
    shares = [count / trained for count in found["gradients"]]  # what the first process has after a micro batch
    assert shares == pytest.approx([0.5 if kind == "FSDP" else 1] * 6, abs=0.03)  # two steps of four
    assert found["checked"] == [1, 0]  # the first process reads the checkpoint and tells the other


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_that_of_the_language_model(launched, kind):
    """FSDP2 gets its autocast from the trainer: accelerate leaves it out there."""
    found = json.loads((launched / kind / "result.json").read_text())["halved"]
    assert found == {"language": "torch.bfloat16", "trained": "torch.float32"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_whose_shards_hold_different_numbers_of_samples(launched, kind):
    steps, expected, found = json.loads((launched / kind / "result.json").read_text())["streamed"]
    assert steps == 3
    names = [f"eval_{name}" for name in (*PARTS, "loss")]
    assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_of_a_stream_is_left_out_unsaid(launched, kind):
    """Of three shards two processes would take two and one; and of two that differ the longer one says so."""
    one, other = json.loads((launched / kind / "result.json").read_text())["used"]
    assert len(one) == len(other) == 6 and len({*one, *other}) == 12
    whole, resumed = (
        PerceptioForConditionalGeneration.from_pretrained(launched / kind / name).state_dict()
        for name in ("divided", "again")
    )
    assert max(float((resumed[name] - whole[name]).abs().max()) for name in whole) < 1e-6
    assert (launched / "said.txt").read_text().count("hold less than those of process 0") == len(KINDS)


def test_fsdp_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        fsdp.prepare(FullyShardedDataParallelPlugin(fsdp_version=1))
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading is on"):
        fsdp.prepare(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True))
