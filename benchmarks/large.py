"""A Perceptio of full size on this machine: InternVL3-1B's shape and SAM2.1-large with random weights, in bfloat16.

python benchmarks/large.py --out benchmarks/results/large.json

Builds the model, saves it in shards, and loads it beside its two parts as stock transformers load them (InternVL in
bfloat16, SAM2 in float32: Perceptio keeps SAM2 in float32 too). Time is the median of fifteen loads, all sides in turn
in one process, from the call of `from_pretrained` to its return. Memory, in a process of its own for each side, is the
largest resident set during the load and one look at every weight (files are mapped, so that before it next to nothing
is resident), above what was resident before, divided by the size of the weights.
Then the loaded model answers a question with depth and a mask. Needs about 7 GB of disk and 8 GiB of memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MOST_TIME, MOST_MEMORY = 1.10, 1.15
WORDS, SHARD = 151_674, "1GB"
TIMED = 15
KINDS = ("perceptio", "stock", "perceptio_auto", "perceptio_low")


def internvl_config():
    """InternVL3-1B-hf: InternViT-300M and Qwen2.5-0.5B."""
    from transformers import InternVLConfig

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
        "use_absolute_position_embeddings": True,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": WORDS,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=WORDS - 7, tie_word_embeddings=False)


def cut_internvl_config(side: int, **changes):
    """InternVL's shapes cut in depth and width, for pictures of `side` pixels. The vocabulary is whole: it has most of
    the 0.11 billion parameters."""
    from transformers import InternVLConfig

    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": [side, side],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": WORDS,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    given = {"image_token_id": WORDS - 7, "tie_word_embeddings": True} | changes
    return InternVLConfig(vision_config=vision, text_config=text, **given)


def sam2_config():
    """SAM2.1-large."""
    from transformers import Sam2Config

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 144,
        "num_attention_heads": 2,
        "blocks_per_stage": [2, 6, 36, 4],
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
        "window_positional_embedding_background_size": [7, 7],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [1152, 576, 288, 144],
    }
    return Sam2Config(vision_config=vision)


class PeakMemory:
    """Largest resident set (bytes) while the block runs, as Linux reports it after its counter was reset."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_):
        self.peak = _status("VmHWM") - self.before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def load(kind: str, folder: Path):
    """The models of one side."""
    import torch
    from transformers import InternVLForConditionalGeneration, Sam2Model

    from perceptio_hf import PerceptioForConditionalGeneration

    if kind == "stock":
        internvl = InternVLForConditionalGeneration.from_pretrained(folder / "internvl", dtype=torch.bfloat16)
        return internvl, Sam2Model.from_pretrained(folder / "sam2")
    options = {
        "perceptio": {"dtype": torch.bfloat16},
        "perceptio_auto": {"torch_dtype": "auto", "device_map": "auto"},
        "perceptio_low": {"dtype": torch.bfloat16, "low_cpu_mem_usage": True, "device_map": "cpu"},
    }
    return (PerceptioForConditionalGeneration.from_pretrained(folder / "perceptio", **options[kind]),)


def measure(kind: str, folder: Path) -> dict[str, float]:
    """Peak memory of one load, in this process."""
    import torch
    from transformers import InternVLForConditionalGeneration, Sam2Model  # noqa: F401  (imports are not the load)

    from perceptio_hf import PerceptioForConditionalGeneration  # noqa: F401

    with PeakMemory() as memory:
        models = load(kind, folder)
        looked = sum(float(p.sum(dtype=torch.float32)) for model in models for p in model.parameters())
    weights = sum(p.nbytes for model in models for p in (*model.parameters(), *model.buffers()))
    dtypes = {str(p.dtype) for model in models for p in model.parameters()}
    assert np.isfinite(looked) and dtypes == {str(torch.bfloat16), str(torch.float32)}, dtypes
    return {"peak_over_weights": memory.peak / weights, "weights_gb": weights / 1e9}


def in_process(folder: Path, *arguments: str) -> dict:
    """Run this script for one step in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def build(folder: Path) -> dict[str, float]:
    """Make the two parts with random weights, join them with a codec of the published size, and save all three."""
    import torch
    from transformers import InternVLForConditionalGeneration, Sam2Model

    from perceptio_hf import DepthVQVAE, DepthVQVAEConfig, PerceptioForConditionalGeneration

    torch.manual_seed(0)
    internvl = InternVLForConditionalGeneration(internvl_config()).to(torch.bfloat16)
    sam2, codec = Sam2Model(sam2_config()), DepthVQVAE(DepthVQVAEConfig())
    internvl.save_pretrained(folder / "internvl", max_shard_size=SHARD)
    sam2.save_pretrained(folder / "sam2", max_shard_size=SHARD)
    started = time.perf_counter()
    model = PerceptioForConditionalGeneration.from_components(internvl, sam2, codec)
    built = time.perf_counter()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "perceptio", max_shard_size=SHARD)
    return {
        "parameters_millions": sum(p.numel() for p in model.parameters()) / 1e6,
        "shards": len(list((folder / "perceptio").glob("*.safetensors"))),
        "join_seconds": built - started,
        "save_seconds": time.perf_counter() - built,
    }


def answer(folder: Path) -> dict[str, float]:
    """Load the model and let it answer a picture with one tile: a mask, a depth map and 8 words."""
    import torch
    from speed import check_answers, writing

    from perceptio_hf import PerceptioForConditionalGeneration

    model = PerceptioForConditionalGeneration.from_pretrained(folder / "perceptio", dtype=torch.bfloat16)
    torch.manual_seed(0)
    tokens = model.config.image_seq_length
    prompt = torch.cat([torch.full((tokens,), model.config.image_token_id), torch.randint(1000, 2000, (16,))])[None]
    side = model.config.mask_config.prompt_encoder_config.image_size
    with writing(model, prompt.shape[1], masks=1):
        started = time.perf_counter()
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=torch.randn(1, 3, 448, 448, dtype=torch.bfloat16),
            mask_pixel_values=torch.randn(1, 3, side, side),
            spatial="seg+depth",
            max_new_tokens=1 + model.spatial_vocabulary().span_length + 8,
            return_dict_in_generate=True,
            do_sample=False,
        )
        seconds = time.perf_counter() - started
    check_answers(model, out.sequences, 1)
    assert len(out.mask_logits[0]) == 1 and len(out.depth_maps[0]) == 1
    return {"answer_seconds": seconds, "new_tokens": out.sequences.shape[1] - prompt.shape[1]}


def times(folder: Path) -> dict[str, float]:
    """Median seconds of each kind of load, all kinds in turn in this one process; the first round only warms up."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(1 + TIMED):
        for kind in KINDS:
            started = time.perf_counter()
            models = load(kind, folder)
            seconds[kind].append(time.perf_counter() - started)
            del models
    return {kind: statistics.median(runs[1:]) for kind, runs in seconds.items()}


STEPS = {"build": build, "times": times, "answer": answer} | {
    kind: lambda folder, kind=kind: measure(kind, folder) for kind in KINDS
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, which takes minutes
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        run(options.folder or Path(temporary), options.out)


def run(folder: Path, out: Path | None) -> None:
    """All steps, their figures printed and written."""
    from perceptio_hf.files import write_json

    results: dict = {}
    if not (folder / "perceptio" / "config.json").exists():
        results["build"] = in_process(folder, "--step", "build")
    seconds = in_process(folder, "--step", "times")
    for kind in KINDS:
        results[kind] = in_process(folder, "--step", kind) | {"seconds": seconds[kind]}
    results["answer"] = in_process(folder, "--step", "answer")
    for kind in KINDS:
        if kind != "stock":
            results[kind]["time_over_stock"] = results[kind]["seconds"] / results["stock"]["seconds"]
    print(json.dumps(results, indent=2))
    ours = results["perceptio"]
    for name, value, most in (
        ("time of from_pretrained over stock InternVL and SAM2", ours["time_over_stock"], MOST_TIME),
        ("peak memory over the weights", ours["peak_over_weights"], MOST_MEMORY),
    ):
        print(f"{name}: {value:.2f} (asked: at most {most}) {'met' if value <= most else 'MISSED'}")
    if out:
        write_json(out, results)


if __name__ == "__main__":
    main()
