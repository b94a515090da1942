"""How long the codec takes to encode, beside the VQ-VAE of AiT, on the same weights and depth maps, in one process.

python benchmarks/codec_speed.py --out benchmarks/results/codec_speed.json

AiT's encoder is written down here as its code computes it when only codes are asked for: grey levels scaled to -1..1,
a plain sequence of layers, all three terms of the squared distance. Both sides take turns, so that what else the
machine does meets both; the ratio is the median of the pairs' ratios in CPU seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
from perceptio_hf.files import out_file


class _Residual(nn.Module):
    def __init__(self, conv1: nn.Module, conv2: nn.Module, conv3: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(conv1, nn.ReLU(), conv2, nn.ReLU(), conv3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden) + hidden


class AiTEncoder(nn.Module):
    """(B, S, S) grey levels in [0, 1] -> (B, N) codes, with the weights of `codec`."""

    def __init__(self, codec: DepthVQVAE):
        super().__init__()
        ours = codec.depth_encoder
        down = [part for layer in ours.down for part in (layer, nn.ReLU())]
        blocks = [_Residual(block.conv1, block.conv2, block.conv3) for block in ours.blocks]
        self.layers = nn.Sequential(*down, *blocks, ours.project)
        self.register_buffer("embedding", codec.codebook)

    @torch.no_grad()
    def forward(self, grey: Tensor) -> Tensor:
        latents = self.layers(2.0 * (grey[:, None].float() - 0.5))
        flat = latents.permute(0, 2, 3, 1).contiguous().view(-1, self.embedding.shape[1])
        squares = flat.square().sum(1, keepdim=True) + self.embedding.square().sum(1)
        return (squares - 2.0 * flat @ self.embedding.T).argmin(1).view(len(grey), -1)


def seconds(run: Callable[[], Tensor]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], rounds: int) -> dict[str, float]:
    """Milliseconds of both sides and the ratio, ours / theirs."""
    for _ in range(3):
        ours(), theirs()
    pairs = []
    for turn in range(rounds):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        times = {first: seconds(first), second: seconds(second)}
        pairs.append((times[ours], times[theirs]))
    middle = [statistics.median(side) * 1e3 for side in zip(*pairs, strict=True)]
    ratio = statistics.median(mine / their for mine, their in pairs)
    return {"ours_ms": round(middle[0], 2), "ait_ms": round(middle[1], 2), "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="depth maps at once")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of calls")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=out_file, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    codec = DepthVQVAE(DepthVQVAEConfig()).eval()
    codec.codebook.mul_(0.3)  # near the latents, so that many codes occur
    theirs = AiTEncoder(codec).eval()
    results = {}
    for batch in options.batch:
        depth = torch.rand(batch, 320, 320)
        whole = torch.ones_like(depth, dtype=torch.bool)
        different = float((codec.encode(depth) != theirs(depth)).float().mean())
        for name, valid in (("", None), (" with a mask of valid pixels", whole)):
            found = compare(lambda d=depth, v=valid: codec.encode(d, v), lambda d=depth: theirs(d), options.rounds)
            results[f"batch {batch}{name}"] = found | {"different_codes": different}
            print(f"batch {batch}{name}: {found['ours_ms']} ms, AiT {found['ait_ms']} ms, {found['ratio']} of its time")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
