"""Samples a second of a training with mixed tasks: before and after a change, in turns, and beside TRL's own trainer.

git worktree add ../before b5b64f5
python benchmarks/train_throughput.py --before ../before --out benchmarks/results/train_throughput.json

A random model of 0.125 B parameters (InternVL's shapes cut in depth and width, tiles of 64 tokens, its vocabulary of
151,674 words whole; SAM2 at 1024 pixels with a small Hiera, the same on all sides; a codec of the published size)
learns from rows as published sets have them: pictures of 640 x 480, which InternVL cuts into up to `--tiles` tiles,
referring segmentation, a depth span alone, spans before answers, questions in words of many lengths, and texts without
a picture.

Each side is a process of its own with one thread, whose model stays; a round trains every side for one epoch of the
same rows, one side after the other. Shown are samples a second of the process's CPU time, which others on the machine
hardly change, medians over rounds, from the first step's begin to the last step's end.

    before       another checkout (--before), as it trains by default
    after        this one, as it trains by default
    by length    this one with train_sampling_strategy: group_by_length
    trl          TRL's SFTTrainer on the InternVL inside: plain cross-entropy of the same rows, without masks and depth

"steps" is the same with rows that all sides can learn, without [SEG]: what the composite loss costs beside TRL's.
"prepare" is the collator alone on the mixed rows: what stands between the files and the model.
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
from large import cut_internvl_config

GRID, CODES = 10, 128
KINDS = ("prepare", "mixed", "steps")
SIDES = ("before", "after", "by length", "trl")
_SIDES_OF = {"prepare": SIDES[:2], "mixed": SIDES[:3], "steps": SIDES}
TEXTS = ("Segment the red ball on the left of the table.", "How far away is everything in this picture?", "A and B?")
TASKS = ("refer", "refer", "depth", "spatial", "spatial", "plain", "plain", "text")


def rows(count: int, masks: bool, folder: Path) -> list[dict]:
    """Samples by turns of the tasks, their pictures as JPEG in `folder`."""
    from PIL import Image

    rng, samples = np.random.default_rng(0), []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        words = " ".join(f"word{word % 97}" for word in rng.integers(0, 500, int(rng.choice([4, 12, 40, 120, 300]))))
        sample = {"id": f"{task} {number}"}
        if task != "text":
            path, size = folder / f"{number}.jpg", [(640, 480), (480, 640), (448, 448), (1280, 720)][number % 4]
            small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
            sample["images"] = [str(path)]
        answer = {"refer": "Sure, [SEG].", "depth": "<DEPTH_START><DEPTH_END>", "spatial": "<DEPTH_START><DEPTH_END>A."}
        said = answer.get(task, words)
        if task == "refer":
            if masks:
                mask = np.zeros(size[::-1], bool)
                mask[40:300, 60:200] = True
                sample["masks"] = [mask]
            else:
                said = "Sure, there."
        if task in ("depth", "spatial"):
            sample["depth_codes"] = [rng.integers(0, CODES, GRID * GRID).tolist()]
        sample["messages"] = [
            {"role": "user", "content": TEXTS[number % 3]},
            {"role": "assistant", "content": said},
        ]
        samples.append(sample)
    return samples


def make_processor(tiles: int):
    """The processor of the random model."""
    from perceptio_hf import DepthVQVAEConfig
    from perceptio_hf.lab.lessons.model import tiny_processor, tiny_tokenizer

    codec = DepthVQVAEConfig()
    processor = tiny_processor(tiny_tokenizer([*TEXTS, *(f"word{number}" for number in range(97))], 700), codec)
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.image_processor.max_patches, processor.crop_to_patches = tiles, True
    processor.image_seq_length, processor.mask_image_size = 64, 1024
    return processor


def make_model(processor):
    """A random model."""
    import torch

    from perceptio_hf import DepthVQVAEConfig, PerceptioConfig, PerceptioForConditionalGeneration

    torch.manual_seed(0)
    codec = DepthVQVAEConfig()
    internvl = cut_internvl_config(224, image_token_id=processor.image_token_id, image_seq_length=64)
    config = {key: value for key, value in internvl.to_dict().items() if key not in ("model_type", "architectures")}
    model = PerceptioForConditionalGeneration(
        PerceptioConfig(
            **config | {"tie_word_embeddings": True},
            **processor.spatial_token_ids(),
            mask_config=small_sam2(),
            depth_config=codec.to_dict(),
            num_depth_tokens=codec.num_tokens,
            num_depth_codes=codec.num_codes,
            picture_mark_token_ids=processor.picture_mark_token_ids(),
        )
    )
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = processor.tokenizer.eos_token_id
    return model


def small_sam2():
    """SAM2 whose image encoder is cut in depth and width: its work is the same on all sides and must not drown them."""
    from transformers import Sam2Config

    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 24,
        "num_attention_heads": 1,
        "image_size": [1024, 1024],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [24, 48, 96, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 4],
        "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [3],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [128, 96, 48, 24],
        "backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]],
    }
    return Sam2Config(vision_config=vision).to_dict()


def trainer_of(side: str, model, processor, dataset, batch: int, steps: int, out: Path):
    """A trainer of this side for one epoch."""
    from perceptio_hf import PerceptioSFTConfig, PerceptioSFTTrainer
    from perceptio_hf.training.collator import PerceptioDataCollator

    common = {
        "output_dir": str(out),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "optim": "sgd",
        "logging_steps": 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if side != "trl":
        if side == "by length":
            common["train_sampling_strategy"] = "group_by_length"
        settings = PerceptioSFTConfig(**common, plot_losses=False)
        return PerceptioSFTTrainer(model, settings, train_dataset=dataset, processing_class=processor)
    from trl import SFTConfig, SFTTrainer

    collate = PerceptioDataCollator(processor, depth_image_size=320)
    names = ("input_ids", "attention_mask", "labels", "pixel_values")

    def plain(samples):
        batch = collate(samples)
        return {name: batch[name] for name in names if name in batch}

    settings = SFTConfig(**common, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, settings, data_collator=plain, train_dataset=dataset, processing_class=processor)


def seconds_to_prepare(processor, samples: list[dict], batch: int) -> float:
    """CPU seconds of the collator for all samples."""
    from perceptio_hf.data.rows import dataset_of
    from perceptio_hf.training.collator import PerceptioDataCollator

    rows = list(dataset_of(samples))
    collate = PerceptioDataCollator(processor, depth_image_size=320)
    collate(rows[:1])
    begin = time.process_time()
    for start in range(0, len(rows), batch):
        collate(rows[start : start + batch])
    return time.process_time() - begin


def serve(side: str, options: argparse.Namespace) -> None:
    """Train one epoch whenever a line with a number of rows' file comes, and print its seconds."""
    import torch
    from transformers import InternVLForConditionalGeneration, TrainerCallback, logging

    from perceptio_hf.data.rows import dataset_of

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.begin = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.end = time.process_time()

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    processor = make_processor(options.tiles)
    model = make_model(processor) if set(options.kinds) - {"prepare"} else None
    if side == "trl":
        whole, config = model, model.config
        fields = {"vision_config": config.vision_config, "text_config": config.text_config}
        from transformers import InternVLConfig

        inner = InternVLConfig(
            **{name: value.to_dict() for name, value in fields.items()}, image_token_id=config.image_token_id
        )
        model = InternVLForConditionalGeneration(inner)
        model.load_state_dict(whole.state_dict(), strict=False)
        model.model.vision_tower.requires_grad_(False)
        del whole
    talk = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    print("ready", file=talk, flush=True)
    for line in sys.stdin:
        kind = line.strip()
        with tempfile.TemporaryDirectory() as folder:
            if kind == "prepare":
                samples = rows(options.rows, True, Path(folder))
                print(seconds_to_prepare(processor, samples, options.batch), file=talk, flush=True)
                continue
            dataset = dataset_of(rows(options.rows, kind == "mixed", Path(folder)))
            steps = options.rows // options.batch
            trainer = trainer_of(side, model, processor, dataset, options.batch, steps, Path(folder, "out"))
            clock = Clock()
            trainer.add_callback(clock)
            trainer.train()
        print(clock.end - clock.begin, file=talk, flush=True)


def start(side: str, options: argparse.Namespace) -> subprocess.Popen:
    checkout = options.before if side == "before" else Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, __file__, "--side", side]
    for name in ("rows", "batch", "tiles"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--kinds", *options.kinds]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "ready\n", f"{side} did not start"
    return process


def measure(options: argparse.Namespace) -> dict:
    sides = [side for side in options.sides if side != "before" or options.before]
    workers = {side: start(side, options) for side in sides}
    figures: dict = {}
    for kind in options.kinds:
        seconds = {side: [] for side in sides if side in _SIDES_OF[kind]}
        for round_number in range(options.warm + options.rounds):
            for side in seconds:
                workers[side].stdin.write(kind + "\n")
                workers[side].stdin.flush()
                taken = float(workers[side].stdout.readline())
                if round_number >= options.warm:
                    seconds[side].append(taken)
                print(f"{kind}, round {round_number}: {side} {options.rows / taken:.3f} samples/s", flush=True)
        figures[kind] = {side: options.rows / statistics.median(taken) for side, taken in seconds.items()}
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=1, help="rounds before that do not count")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, which takes minutes
    if options.side:
        serve(options.side, options)
        return
    figures = measure(options)
    result = {name: getattr(options, name) for name in ("rows", "batch", "tiles", "rounds")}
    result |= {"threads": 1, "unit": "samples per second of CPU time, median of the rounds", **figures}
    for kind, values in figures.items():
        for side, value in values.items():
            beside = f", {value / values['before']:.2f} times before" if "before" in values else ""
            print(f"{kind}: {side} {value:.3f} samples/s{beside}")
    print(json.dumps(result, indent=2))
    if options.out:
        from perceptio_hf.files import write_json

        write_json(options.out, result)


if __name__ == "__main__":
    main()
