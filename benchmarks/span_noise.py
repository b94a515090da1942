"""What `span_noise` brings: passes that a span takes and the depth it says, after the same steps with different noise.

python benchmarks/span_noise.py --steps 160 --out benchmarks/results/span_noise.json

Each variant starts from the embedded checkpoint and trains on depth questions about rendered scenes by the trainer that
users have, same samples, same seed; only `span_noise` differs. Measured on scenes that no training saw, one at a time:
passes of the language model per span (greedy, float32, a whole span guessed at once), and the depth itself.
"""

import argparse
import tempfile

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioSFTConfig, PerceptioSFTTrainer, tiny_checkpoint
from perceptio_hf.data.world_samples import world_dataset
from perceptio_hf.evaluation.metrics.depth import depth_metrics
from perceptio_hf.evaluation.run.answering import encode_questions
from perceptio_hf.files import out_file, write_json
from perceptio_hf.modeling.spans import spatial_loop
from perceptio_hf.world import HELD_OUT_SEED, render_scene
from perceptio_hf.world.questions import DEPTH_QUESTIONS

_FIRST_SCENE = 400_000_000  # scenes that trained nothing else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.125, 0.25, 0.5])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes that are measured")
    parser.add_argument("--out", type=out_file, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spatial_loop._PLACES["cpu"] = 4096  # the whole span in a pass, as on a GPU; a CPU is quicker with fewer places
    processor = AutoProcessor.from_pretrained(tiny_checkpoint())
    rows = []
    for noise in (None, *options.noise):  # None: as it is
        name = "embedded checkpoint" if noise is None else f"{options.steps} steps, span_noise {noise}"
        model = fresh() if noise is None else trained(noise, options.steps)
        rows.append({"variant": name, **measure(model, processor, options.scenes)})
        show(rows[-1])
        if options.out:  # after every variant: a run that is stopped has lost nothing
            write_json(options.out, {"scenes": options.scenes, "variants": rows})


def show(row: dict) -> None:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "variant")
    print(f"{row['variant']}: {figures}", flush=True)


def fresh() -> PerceptioForConditionalGeneration:
    return PerceptioForConditionalGeneration.from_pretrained(tiny_checkpoint()).eval()


def trained(noise: float, steps: int) -> PerceptioForConditionalGeneration:
    """The embedded checkpoint after `steps` steps of 16 depth questions."""
    with tempfile.TemporaryDirectory() as out:
        settings = PerceptioSFTConfig(
            out,
            span_noise=noise,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=4e-4,
            lr_scheduler_type="cosine",
            warmup_steps=16,
            bf16=False,
            gradient_checkpointing=False,
            freeze_mask_decoder=True,
            save_strategy="no",
            report_to="none",
            plot_losses=False,
            logging_steps=20,
        )
        data = world_dataset("depth", scenes=16 * steps, first_seed=_FIRST_SCENE)
        trainer = PerceptioSFTTrainer(tiny_checkpoint(), settings, train_dataset=data)
        trainer.train()
        return trainer.model.eval()


@torch.no_grad()
def measure(model: PerceptioForConditionalGeneration, processor, scenes: int) -> dict[str, float]:
    """Passes per span, share of codes that one pass from the draft gets right, AbsRel and delta < 1.25."""
    passes, figures = [], []
    words = model.spatial_vocabulary()
    calls = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + scenes):
        scene = render_scene(seed)
        inputs = encode_questions(processor, [Image.fromarray(scene.image)], [DEPTH_QUESTIONS[0]])
        inputs.pop("mask_pixel_values")
        calls.clear()
        out = model.generate(
            **inputs, spatial="depth", do_sample=False, max_new_tokens=words.span_length, return_dict_in_generate=True
        )
        passes.append(len(calls) - 1)  # without the prompt's; the pass of the start marker is the span's first
        depth = out.depth_maps[0][0].numpy()
        figures.append(depth_metrics(depth, scene.depth, np.ones(scene.depth.shape, bool)))
    hook.remove()
    means = {name: float(np.mean([one[name] for one in figures])) for name in ("absrel", "delta1")}
    share = float(np.mean(passes)) / words.num_depth_tokens
    return {"passes": float(np.mean(passes)), "passes_90": float(np.quantile(passes, 0.9)), "share": share, **means}


if __name__ == "__main__":
    main()
