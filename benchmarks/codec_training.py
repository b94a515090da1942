"""Our training of a depth codec beside AiT's own loop, at the size of published codecs, in one process.

git clone https://github.com/SwinTransformer/AiT && git clone https://github.com/andyzeng/tsdf-fusion-python
python benchmarks/codec_training.py --ait-code AiT/vae --frames tsdf-fusion-python/data --minutes 8 \\
    --out benchmarks/results/codec_training.json

Both sides learn from the same 500 frames of real sensor depth (7-Scenes) for as many minutes of CPU time, one thread:
320 x 320 pixels, 10 x 10 codes out of 128. Measured are 50 frames of the end of the sequence, which neither saw: every
frame is written as codes and decoded, and AbsRel is that of `perceptio codebook eval`, scale and shift of 1/z fitted.

AiT's model, quantiser and loss are its own files; its loop is written down here as train_depth_vqvae_dist.py has it
(Adam, exponential decay each 500 steps, half of the patches masked), since that one needs mmcv and CUDA. It is run on
metres, as AiT does, and on grey levels with its scaling to -1..1, as AURORA and MolmoAct did.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.data.depth_maps import DepthMap, read_depth
from perceptio_hf.evaluation.metrics.depth import codebook_usage, depth_metrics
from perceptio_hf.files import out_file
from perceptio_hf.modeling.placement import multiplies_bfloat16
from perceptio_hf.training.codec import CodebookOptions, DepthBank, train_codebook

SIZE, CODES, BATCH = 320, 128, 8
# As vae/configs/depth/ait_depth_vqvae.py has it, at the size of AURORA's checkpoint.
AIT = {
    "image_size": SIZE,
    "num_resnet_blocks": 2,
    "downsample_ratio": 32,
    "num_tokens": CODES,
    "codebook_dim": 512,
    "hidden_dim": 16,
    "channels": 1,
    "train_objective": "regression",
    "residul_type": "v1",
}
AIT_FORMS = {
    "metres": {"use_norm": False, "max_value": 10.0, "loss_type": "mse_ignore_zero"},
    "grey levels": {"use_norm": True, "max_value": 1.0, "loss_type": "mse"},
}
Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, S, S) input -> nearness of the same shape, (B, N) codes


def read_frames(folder: Path, train: int, held_out: int) -> tuple[list[DepthMap], list[DepthMap]]:
    """Depth of the first four fifths of a sequence, and of its end."""
    paths = sorted(folder.glob("*.depth.png"))
    border = len(paths) * 4 // 5
    parts = [paths[:border], paths[border:]]
    chosen = [
        [part[i] for i in np.linspace(0, len(part) - 1, count).astype(int)]
        for part, count in zip(parts, (train, held_out), strict=True)
    ]
    return tuple([shrunk(read_depth(path, "mm")) for path in part] for part in chosen)


def shrunk(item: DepthMap) -> DepthMap:
    """At the codec's size, by the nearest pixels, as AiT's data set would not invent depth either."""
    rows, columns = (((2 * np.arange(SIZE) + 1) * side) // (2 * SIZE) for side in item.relative.shape)
    return DepthMap.from_metric(item.metric[rows[:, None], columns])


def train_ait(code: Path, form: str, maps: list[DepthMap], minutes: float) -> tuple[Any, int]:
    """AiT's VQ-VAE, trained by its loop; and the steps it took."""
    sys.path.insert(0, str(code))
    model = importlib.import_module("models.VQVAE").VQVAE(**AIT, **AIT_FORMS[form]).train()
    values = torch.stack([torch.from_numpy(item.metric if form == "metres" else item.relative) for item in maps])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.98)
    generator, step, end = torch.Generator().manual_seed(0), 0, time.process_time() + 60 * minutes
    while True:
        for rows in torch.randperm(len(values), generator=generator).split(BATCH):
            if time.process_time() > end:
                return model.eval(), step
            if len(rows) < BATCH:
                continue
            label = values[rows][:, None]
            flip = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
            label = torch.where(flip, label.flip(-1), label)
            loss, _, _ = model(img=label * _patches(len(rows), generator), label_img=label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 500 == 0:
                schedule.step()
            step += 1


def _patches(batch: int, generator: torch.Generator) -> Tensor:
    """(B, 1, S, S) of 0 and 1: half of the patches of 16 x 16 pixels are masked, as AiT's MaskGenerator does."""
    side = SIZE // 16
    order = torch.rand(batch, side * side, generator=generator).argsort(1)
    kept = (order >= side * side // 2).float().view(batch, 1, side, side)
    return kept.repeat_interleave(16, 2).repeat_interleave(16, 3)


@torch.no_grad()
def measure(maps: list[DepthMap], reconstruct: Reconstruct) -> dict[str, float]:
    """Errors over the maps, and the codes that occur in them."""
    figures, codes = [], []
    for item in maps:
        nearness, found = reconstruct(item)
        codes.append(found.numpy().reshape(-1))
        figures.append(depth_metrics(nearness.numpy(), item.metric, item.valid))
    means = {key: round(float(np.mean([figure[key] for figure in figures])), 4) for key in ("absrel", "delta1", "rmse")}
    usage = codebook_usage(np.concatenate(codes), CODES)
    return means | {"codes_used": usage["codes_used"], "perplexity": round(usage["perplexity"], 1)}


def by_ait(model: Any, form: str) -> Reconstruct:
    def reconstruct(item: DepthMap) -> tuple[Tensor, Tensor]:
        given = torch.from_numpy(item.metric if form == "metres" else item.relative)[None, None]
        codes = model.get_codebook_indices(given)
        decoded = model.decode(codes)[0, 0]
        return (1.0 / decoded.clamp_min(0.1) if form == "metres" else decoded), codes

    return reconstruct


def by_ours(codec: DepthVQVAE) -> Reconstruct:
    def reconstruct(item: DepthMap) -> tuple[Tensor, Tensor]:
        codes = codec.encode(torch.from_numpy(item.relative), torch.from_numpy(item.valid))
        return codec.decode(codes), codes

    return reconstruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ait-code", type=Path, required=True, help="vae/ of a clone of SwinTransformer/AiT")
    parser.add_argument("--frames", type=Path, required=True, help="folder with *.depth.png in millimetres")
    parser.add_argument("--minutes", type=float, default=8.0, help="for each side")
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--only", choices=["ours", *AIT_FORMS], help="one side alone")
    parser.add_argument("--learning-rate", type=float, help="of ours; default: its own")
    parser.add_argument("--out", type=out_file, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, held_out = read_frames(options.frames, options.train, options.held_out)
    results: dict[str, Any] = {"minutes": options.minutes, "frames": len(train), "held_out": len(held_out), "sides": {}}
    results["ours_in"] = "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32"  # theirs is in float32

    def note(name: str, steps: int, reconstruct: Reconstruct) -> None:
        some = train[:: max(1, len(train) // 50)]
        found = {"steps": steps, "held_out": measure(held_out, reconstruct), "trained_on": measure(some, reconstruct)}
        results["sides"][name] = found
        print(name, json.dumps(found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n")

    if options.only in (None, "ours"):
        counted = []
        config = DepthVQVAEConfig()
        rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
        begin = time.process_time()
        codec = train_codebook(
            config,
            DepthBank.gather(train, config),
            minutes=options.minutes,
            options=CodebookOptions(batch_size=BATCH, **rate),
            now=time.process_time,
            progress=lambda share, error: counted.append((time.process_time() - begin, error)),
        )
        note("ours", 10 * len(counted), by_ours(codec))
    for form in AIT_FORMS:
        if options.only in (None, form):
            model, steps = train_ait(options.ait_code, form, train, options.minutes)
            note(f"AiT, {form}", steps, by_ait(model, form))
    if options.only is None:
        best = min(side["held_out"]["absrel"] for name, side in results["sides"].items() if name != "ours")
        results["ratio"] = round(results["sides"]["ours"]["held_out"]["absrel"] / best, 3)
        print(f"AbsRel of ours / of the better of AiT's: {results['ratio']}")
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
