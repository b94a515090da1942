"""Time and peak memory of the composite loss beside the plain way, at the size of a real vocabulary.

python benchmarks/loss_memory.py --out benchmarks/results/loss_memory.json

One row of 1,024 positions and 151,674 words, of which 160 positions carry labels, a span of 100 codes among them. The
head is trained, or fixed, or fixed but for the rows of the spatial tokens, as `lora_config` has it. The plain way
computes all logits and passes over them three times: cross-entropy of text and markers, cross-entropy of the codes
renormalised to their ids, and the softmax that counts codes. Reconstruction and masks are left out: they cost the same
on both sides.

Each side runs in a process of its own, one thread. Memory is the peak of the resident set during forward and backward
above what was resident before (inputs and the head's weights), as Linux reports it after its counter was reset; the
gradient of the head's weights, which both sides make where it is trained, is part of it. Time is the median of the
repeats. Losses and a sample of the gradients of both sides must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceptio_hf.files import out_file, write_json
from perceptio_hf.tokens import SpatialVocabulary
from perceptio_hf.training.losses import composite_loss

WORDS, HIDDEN, POSITIONS, LABELLED, CODES, SPAN = 151_674, 896, 1024, 160, 128, 100
MOST_MEMORY, MOST_TIME = 0.35, 0.75  # of the plain way
COMPARED = 10_000  # numbers of each gradient that are compared
FIRST = WORDS - CODES - 3  # [SEG], start marker, codes, end marker are the last words of the vocabulary
VOCABULARY = SpatialVocabulary(
    FIRST, FIRST + 1, WORDS - 1, tuple(range(FIRST + 2, WORDS - 1)), num_depth_tokens=SPAN, image=0
)


class Words(nn.Module):
    """A model as PEFT wants it: with a layer that can be adapted."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.lm_head, self.other = head, nn.Linear(1, 1)


def adapted(head: nn.Linear) -> nn.Module:
    """The head with the rows of the spatial tokens trained by PEFT, all others fixed."""
    from peft import LoraConfig, get_peft_model

    rows = {"lm_head": list(range(FIRST, WORDS))}
    config = LoraConfig(r=1, target_modules=["other"], trainable_token_indices=rows)
    return get_peft_model(Words(head), config).base_model.model.lm_head


def step_inputs(kind: str) -> tuple[Tensor, nn.Module, Tensor]:
    """Random states (1, L, d), a head and the labels of one response at the end of the row."""
    torch.manual_seed(0)
    states = torch.randn(1, POSITIONS, HIDDEN, requires_grad=True)
    head = nn.Linear(HIDDEN, WORDS, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    head.requires_grad_(kind == "head_trained")
    codes = torch.randint(FIRST + 2, WORDS - 1, (SPAN,))
    markers = torch.tensor([FIRST + 1]), torch.tensor([WORDS - 1])
    text = torch.randint(FIRST, (LABELLED - SPAN - 3,))
    response = torch.cat([torch.tensor([FIRST]), markers[0], codes, markers[1], text])
    unlearnt = torch.full((POSITIONS - LABELLED,), -100)
    labels = torch.cat([unlearnt, response])[None]
    return states, adapted(head) if kind == "head_rows" else head, labels


def plain_loss(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """All logits, three separate passes; text and marker + token + count, each its own mean."""
    logits = head(states)[0, :-1]  # (L - 1, V)
    targets, code_ids = labels[0, 1:], torch.tensor(VOCABULARY.codes)
    is_code, learnt = torch.isin(targets, code_ids), targets != -100
    losses = F.cross_entropy(logits, targets.masked_fill(is_code, -100), reduction="none")
    is_marker = (targets == VOCABULARY.depth_start) | (targets == VOCABULARY.depth_end)
    words = losses[learnt & ~is_code & ~is_marker].mean() + losses[is_marker].mean()
    token = F.cross_entropy(logits[:, code_ids], torch.where(is_code, targets - FIRST - 2, -100))
    expected = logits.softmax(-1)[:, code_ids].sum(-1)[learnt].sum()
    error = (expected - SPAN) / SPAN
    return words + token + F.smooth_l1_loss(error, torch.zeros_like(error))


def our_loss(states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return composite_loss(states, head, labels, VOCABULARY)[0]


SIDES = {"plain": plain_loss, "ours": our_loss}
HEADS = ("head_trained", "head_frozen", "head_rows")


def reset_peak() -> None:
    """Let the kernel's counter of the peak resident set start again at the present size."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(side: str, repeats: int, kind: str) -> dict:
    """One side in this process: MiB above what was there before, seconds, loss and a sample of the gradients."""
    torch.set_num_threads(1)
    states, head, labels = step_inputs(kind)
    leaves = [states, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    # A small step first: what libraries allocate for themselves at their first use is no part of the loss.
    F.cross_entropy(nn.Linear(8, 8)(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long)).backward()
    reset_peak()
    before, peaks, seconds = resident("VmRSS"), [], []
    for _ in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        reset_peak()
        start = time.perf_counter()
        loss = SIDES[side](states, head, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        peaks.append(resident("VmHWM") - before)
    return {
        "mib": max(peaks),
        "seconds": statistics.median(seconds),
        "loss": loss.item(),
        "gradient": [leaf.grad.flatten()[:: leaf.numel() // COMPARED].tolist() for leaf in leaves],
    }


def measure_apart(side: str, repeats: int, kind: str) -> dict:
    command = [sys.executable, __file__, "--side", side, "--head", kind, "--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def compare(repeats: int, kind: str) -> dict:
    """Both sides, with the ratios ours / plain; the values must agree."""
    plain, ours = (measure_apart(side, repeats, kind) for side in ("plain", "ours"))
    torch.testing.assert_close(ours["loss"], plain["loss"], rtol=1e-5, atol=0)
    for pair in zip(ours.pop("gradient"), plain.pop("gradient"), strict=True):
        one, other = map(torch.tensor, pair)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    return {
        "plain": plain,
        "ours": ours,
        "memory_ratio": round(ours["mib"] / plain["mib"], 4),
        "time_ratio": round(ours["seconds"] / plain["seconds"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=out_file, help="JSON file to write")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process and print JSON")
    parser.add_argument("--head", choices=HEADS, default=HEADS[0], help="with --side: what of the head is trained")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.repeats, options.head)))
        return
    sizes = {"words": WORDS, "hidden": HIDDEN, "positions": POSITIONS, "labelled": LABELLED, "codes": SPAN}
    result = {"command": f"python benchmarks/loss_memory.py --repeats {options.repeats}", **sizes, "threads": 1}
    result |= {"most_memory": MOST_MEMORY, "most_time": MOST_TIME}
    for name in HEADS:
        result[name] = compare(options.repeats, name)
        memory, seconds = result[name]["memory_ratio"], result[name]["time_ratio"]
        print(f"{name}: {memory:.3f} of the memory (at most {MOST_MEMORY}), {seconds:.3f} of the time ({MOST_TIME})")
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)
    if any(result[name]["memory_ratio"] > MOST_MEMORY or result[name]["time_ratio"] > MOST_TIME for name in HEADS):
        sys.exit("A target was missed.")


if __name__ == "__main__":
    main()
