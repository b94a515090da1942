"""Memory that `perceptio train --dry-run` predicts: at full size, and beside what training really takes.

python benchmarks/memory_prediction.py --out benchmarks/results/memory_prediction.json

Predicted: one GPU's memory for InternVL3's shapes of 1, 2 and 8 billion parameters with SAM2.1-large and the codec of
the public checkpoints (320 pixels, 10 x 10 codes of 128), rows of 7 tiles (1,792 picture tokens) and 300 words with a
mask and a depth span, bfloat16 autocast over float32 weights, activations of blocks computed again.

Measured: a model of 0.07 billion parameters is trained for two steps on this machine, in a process of its own, as a
whole, with adapters, and shared by 1, 2 and 4 processes on the processor (FSDP2). Its memory is the most that torch had
allocated at a time, as torch reports it: on a GPU by its own counter, on a processor by its profiler's list of
allocations. The resident set would also count libraries that are loaded meanwhile.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from large import internvl_config, sam2_config
from torch import Tensor

from perceptio_hf.files import out_file

MOST_ERROR = 0.15
WORDS, TILES, PICTURE, MASKS = 300, 7, 256, 1
# Layers, width, feed-forward width, heads and key-value heads of the language model: Qwen2.5's sizes.
SIZES = {"1b": (24, 896, 4864, 14, 2), "2b": (28, 1536, 8960, 12, 2), "8b": (28, 3584, 18944, 28, 4)}
SETUPS = {  # name -> (strategy, GPUs, rank of adapters, rows of a micro batch by size)
    "whole, 1 GPU": ("ddp", 1, None, (2, 1, 1)),
    "whole, 8 GPUs, FSDP2": ("fsdp", 8, None, (4, 2, 1)),
    "LoRA, 1 GPU": ("ddp", 1, 64, (4, 2, 1)),
    "LoRA, 8 GPUs, DDP": ("ddp", 8, 64, (4, 2, 1)),
}


def perceptio_config(size: str):
    """A Perceptio of InternVL3's shape."""
    from perceptio_hf import DepthVQVAEConfig

    layers, width, inner, heads, kv_heads = SIZES[size]
    internvl = internvl_config().to_dict()
    words = 151_808
    internvl["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "tie_word_embeddings": False,
        "layer_types": None,
        "max_window_layers": layers,
    }
    return _joined(internvl, sam2_config(), DepthVQVAEConfig(), words, False)


def small_config():
    """0.07 billion parameters in the shapes of a large one, small enough for a processor."""
    from perceptio_hf import DepthVQVAEConfig
    from perceptio_hf.lab.lessons.model import tiny_mask_config

    internvl, words = internvl_config().to_dict(), 32_000
    internvl["vision_config"] |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    internvl["vision_config"] |= {"num_attention_heads": 4}
    internvl["text_config"] |= {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 5,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": words,
        "tie_word_embeddings": True,
        "layer_types": None,
        "max_window_layers": 5,
    }
    return _joined(internvl, tiny_mask_config(), DepthVQVAEConfig(base_channels=8), words, True)


def _joined(internvl: dict[str, Any], masks: Any, codec: Any, words: int, tied: bool):
    from perceptio_hf import PerceptioConfig

    codes = codec.num_codes
    first = words - codes - 3
    internvl = {key: value for key, value in internvl.items() if key not in ("model_type", "architectures")}
    return PerceptioConfig(
        **internvl
        | {
            "image_token_id": words - codes - 10,
            "image_seq_length": PICTURE,
            "tie_word_embeddings": tied,
            "mask_config": masks,
            "depth_config": codec,
            "seg_token_id": first,
            "depth_start_token_id": first + 1,
            "depth_token_ids": list(range(first + 2, first + 2 + codes)),
            "depth_end_token_id": words - 1,
            "num_depth_tokens": codec.num_tokens,
            "num_depth_codes": codes,
        }
    )


def batch_of(config, rows: int, *, tiles: int = TILES, words: int = WORDS) -> dict[str, Tensor]:
    """Rows of one picture and an answer with a mask, a depth span and half of the words, as the collator gives them."""
    generator = torch.Generator().manual_seed(0)
    span = [
        config.depth_start_token_id,
        *config.depth_token_ids[:1] * config.num_depth_tokens,
        config.depth_end_token_id,
    ]
    answer = torch.tensor([config.seg_token_id, *span])
    text = torch.randint(10, 20_000, (rows, words), generator=generator)
    pictures = torch.full((rows, tiles * PICTURE), config.image_token_id)
    half = words // 2
    ids = torch.cat([pictures, text[:, :half], answer.expand(rows, -1), text[:, half:]], dim=1)
    labels = ids.clone()
    labels[:, : tiles * PICTURE + half] = -100
    side, depth = config.mask_config.prompt_encoder_config.image_size, config.depth_config.image_size
    tile = config.vision_config.image_size[0]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(rows * tiles, 3, tile, tile, generator=generator),
        "mask_pixel_values": torch.randn(rows, 3, side, side, generator=generator),
        "mask_targets": (torch.rand(rows, side // 4, side // 4, generator=generator) > 0.5).float(),
        "depth_targets": torch.rand(rows, depth, depth, generator=generator),
        "depth_valid": torch.ones(rows, depth, depth, dtype=torch.bool),
        "depth_given_as_codes": torch.zeros(rows, dtype=torch.bool),
    }


def settings_of(rows: int, folder: str = "planned", **changes):
    """As the recipes have them."""
    from perceptio_hf import PerceptioSFTConfig

    options = {"bf16": True, "gradient_checkpointing": True, "freeze_mask_decoder": True, "max_steps": 2}
    options |= {"report_to": "none", "save_strategy": "no", "plot_losses": False, "gradient_accumulation_steps": 2}
    return PerceptioSFTConfig(folder, per_device_train_batch_size=rows, **(options | changes))


def predicted() -> list[dict[str, Any]]:
    """The table at full size."""
    from perceptio_hf.training.lora import lora_config
    from perceptio_hf.training.planning.memory import GIB, predict_memory
    from perceptio_hf.training.planning.sharding import Layout

    table = []
    for place, size in enumerate(SIZES):
        config = perceptio_config(size)
        for setup, (strategy, gpus, rank, rows) in SETUPS.items():
            begin, count = time.monotonic(), rows[place]
            adapters = functools.partial(lora_config, r=rank, modules_to_save=["seg_projector"]) if rank else None
            found = predict_memory(
                config,
                batch_of(config, count),
                settings_of(count),
                adapters=adapters,
                layout=Layout(gpus, strategy),
            )
            parts = ["weights", "gradients", "optimizer", "activations", "gathered", "peak"]
            parts += ["answering"] if strategy != "ddp" else []  # figures, by a copy of the whole model
            gib = {part: round(getattr(found, part) / GIB, 2) for part in parts}
            about = {"size": size, "setup": setup, "rows": count, "tokens": found.batch[1]}
            counted = {"parameters": found.parameters, "trained": found.trained}
            table.append(about | counted | gib | {"seconds": round(time.monotonic() - begin, 1)})
            print(table[-1], flush=True)
    return table


def measured(kind: str) -> dict[str, Any]:
    """Train the small model for two steps, whole or with adapters, in this process."""
    from peft import get_peft_model

    from perceptio_hf import PerceptioForConditionalGeneration
    from perceptio_hf.training.lora import lora_config
    from perceptio_hf.training.planning.memory import _inner, _loss, predict_memory
    from perceptio_hf.training.planning.sharding import Layout
    from perceptio_hf.training.trainer import choose_trainable

    config, precise = small_config(), kind.endswith("float32")
    settings = settings_of(2, bf16=not precise, gradient_checkpointing=not precise or kind.startswith("fsdp"))
    batch, device = batch_of(config, 2, tiles=1, words=150), "cuda" if torch.cuda.is_available() else "cpu"
    adapters = functools.partial(lora_config, r=16) if kind.startswith("lora") else None
    layout = Layout(int(os.environ["WORLD_SIZE"]), "fsdp") if kind.startswith("fsdp") else None
    if layout is not None:
        device = "cpu"
        if not torch.distributed.is_initialized():  # reading the settings may have done that
            torch.distributed.init_process_group("gloo")
    guess = predict_memory(config, batch, settings, adapters=adapters, layout=layout)

    def train() -> None:
        model = PerceptioForConditionalGeneration(config).to(device)
        choose_trainable(model, settings)
        if adapters is not None:
            model = get_peft_model(model, adapters(model))
            model.enable_input_require_grads()
        if settings.checkpoints_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if layout is not None:
            shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        given = {name: value.to(device) for name, value in batch.items()}
        for _ in range(2):
            for _ in range(2):
                with torch.autocast(device, torch.bfloat16, enabled=not precise, cache_enabled=False):
                    loss = _loss(model, given, settings)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert _inner(model) is not None

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = allocated(train)
    return {
        "kind": kind,
        "device": device,
        "parameters": guess.parameters,
        "trained": guess.trained,
        "predicted_gib": guess.peak / 2**30,
        "measured_gib": peak / 2**30,
        "error": guess.peak / peak - 1,
    }


def shard(model) -> None:
    """By FSDP2, as accelerate does with TRANSFORMER_BASED_WRAP: every block, and what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    names = set(model._no_split_modules)
    for block in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def allocated(work: Callable[[], None]) -> int:
    """The most bytes that torch has allocated on the CPU at a time during `work`, above those of before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def in_process(kind: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--kind", kind]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    if kind.startswith("fsdp"):
        processes = kind.split()[1]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        command = [sys.executable, *launch, *command[1:]]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--kind", help="used by this script itself")
    parser.add_argument("--without", choices=("predicted", "measured"), help="leave out one of the two tables")
    options = parser.parse_args()
    if options.kind:
        found = measured(options.kind)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found))
        return 0
    alone, shared = ("whole", "whole float32", "lora", "lora float32"), [f"fsdp {n} float32" for n in (1, 2, 4)]
    rows = {}
    for kind in () if options.without == "measured" else (*alone, *shared):
        rows[kind] = in_process(kind)
        print(rows[kind], flush=True)
    result = {"measured": [rows[kind] for kind in alone if kind in rows]}
    result["shared"] = [rows[kind] for kind in shared if kind in rows]
    result |= {"predicted": [] if options.without == "predicted" else predicted()}
    compared = [*result["measured"], *result["shared"]]
    result["passed"] = all(abs(row["error"]) <= MOST_ERROR for row in compared) if compared else None
    if options.out:
        from perceptio_hf.files import write_json

        write_json(options.out, result)
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
