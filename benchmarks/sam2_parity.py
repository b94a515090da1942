"""Meta's own SAM2 code beside transformers' after `load_sam2`: features, prompts and masks of every published model.

pip install hydra-core iopath && pip install --no-deps sam2
python benchmarks/sam2_parity.py --out benchmarks/results/sam2_parity.json

Meta's code builds each published architecture with random weights (no tensor stays zero), saves it as Meta does, and
our conversion reads the file. Then both get one picture of noise and the same prompts: two objects with three points
each, a box, and a mask with a point. The table shows the largest absolute difference of each kind beside the largest
value there is. No checkpoint is downloaded. The picture is 1024 pixels wide unless --image-size says otherwise.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from perceptio_hf.files import out_file

SIZES = {"tiny": "t", "small": "s", "base-plus": "b+", "large": "l"}
VERSIONS = ("2", "2.1")
MOST = 1e-4  # of the largest value: what single precision leaves, with room


def meta_model(version: str, size: str, image_size: int = 1024, seed: int = 0) -> nn.Module:
    """A published architecture in Meta's code, random weights, evaluation mode."""
    from sam2.build_sam import build_sam2

    torch.manual_seed(seed)
    name = f"configs/sam{version}/sam{version}_hiera_{SIZES[size]}.yaml"
    model = build_sam2(name, None, device="cpu", hydra_overrides_extra=[f"++model.image_size={image_size}"])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # positions and others begin at zero, where a mistake would not show
                parameter.normal_(std=0.02)
    return model


def prompts(image_size: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """By name: points (P, n, 2) as (x, y) in pixels, labels (P, n), maybe mask (P, 1, S/4, S/4); a box is 2 points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(2, 3, 2, generator=generator) * image_size
    corners = torch.tensor([[[0.2, 0.3], [0.7, 0.8]]]) * image_size
    mask = torch.randn(1, 1, image_size // 4, image_size // 4, generator=generator)
    return {
        "points": {"points": points, "labels": torch.tensor([[1, 0, 1], [1, 1, 0]])},
        "box": {"points": corners, "labels": torch.tensor([[2, 3]])},
        "mask and point": {"points": points[:1, :1], "labels": torch.tensor([[1]]), "mask": mask},
    }


@torch.no_grad()
def meta_features(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Strides 4, 8 and 16, as SAM2ImagePredictor.set_image makes them (it cannot be imported without torchvision)."""
    _, features, _, sizes = model._prepare_backbone_features(model.forward_image(pixels))
    features[-1] = features[-1] + model.no_mem_embed
    return [feature.permute(1, 2, 0).unflatten(2, size) for feature, size in zip(features, sizes, strict=True)]


@torch.no_grad()
def meta_answer(
    model: nn.Module, features: list[Tensor], prompt: Mapping[str, Tensor], multimask: bool
) -> dict[str, Tensor]:
    """What SAM2ImagePredictor.predict computes for one picture, before masks are resized."""
    sparse, dense = model.sam_prompt_encoder(
        points=(prompt["points"], prompt["labels"]), boxes=None, masks=prompt.get("mask")
    )
    masks, scores, _, objects = model.sam_mask_decoder(
        image_embeddings=features[-1],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        repeat_image=len(sparse) > 1,
        high_res_features=features[:-1],
    )
    return {"sparse": sparse, "dense": dense[:1], "masks": masks, "scores": scores, "objects": objects}


@torch.no_grad()
def our_answer(
    model: nn.Module, features: list[Tensor], prompt: Mapping[str, Tensor], multimask: bool
) -> dict[str, Tensor]:
    """The same from transformers' Sam2Model."""
    box = bool((prompt["labels"] == 2).any())
    given = (
        {"input_boxes": prompt["points"].flatten(1)[None]}
        if box
        else {"input_points": prompt["points"][None], "input_labels": prompt["labels"][None]}
    )
    mask = prompt.get("mask")
    sparse, dense = model.prompt_encoder(
        **({"input_points": None, "input_labels": None, "input_boxes": None} | given), input_masks=mask
    )
    output = model(image_embeddings=list(features), input_masks=mask, multimask_output=multimask, **given)
    masks, scores, objects = output.pred_masks[0], output.iou_scores[0], output.object_score_logits[0]
    return {"sparse": sparse[0], "dense": dense, "masks": masks, "scores": scores, "objects": objects}


@torch.no_grad()
def differences(meta: nn.Module, ours: nn.Module, pixels: Tensor) -> dict[str, tuple[float, float]]:
    """By name: (largest absolute difference, largest absolute value) from one picture (1, 3, S, S) through both."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, mine: Tensor, theirs: Tensor) -> None:
        assert mine.shape == theirs.shape, name
        gap, value = float((mine - theirs).abs().max()), float(theirs.abs().max())
        found[name] = tuple(map(max, found.get(name, (0.0, 0.0)), (gap, value)))

    theirs, mine = meta_features(meta, pixels), ours.get_image_embeddings(pixels)
    for stride, one, other in zip((4, 8, 16), mine, theirs, strict=True):
        note(f"features, stride {stride}", one, other)
    note("positions", ours.get_image_wide_positional_embeddings(), meta.sam_prompt_encoder.get_dense_pe())
    for name, prompt in prompts(pixels.shape[-1]).items():
        for multimask in (True, False):
            expected = meta_answer(meta, theirs, prompt, multimask)
            for part, value in our_answer(ours, mine, prompt, multimask).items():
                note(part if part in ("masks", "scores", "objects") else f"{part} ({name})", value, expected[part])
    return found


def compare(version: str, size: str, image_size: int) -> dict:
    """Build, save, convert and compare one architecture."""
    from perceptio_hf.conversion.keys import ConversionReport
    from perceptio_hf.conversion.sam2 import load_sam2

    meta, report = meta_model(version, size, image_size), ConversionReport("")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": meta.state_dict()}, Path(folder) / "any_name.pt")
        ours = load_sam2(Path(folder) / "any_name.pt", image_size=image_size, report=report)
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    found = differences(meta, ours, pixels)
    return {
        "model": f"sam{version}-{size}",
        "recognised": report.layout,
        "parameters": ours.num_parameters(),
        "tensors": {"read": report.num_read, "mapped": len(report.mapped)},
        "differences": {name: {"largest": gap, "of": value} for name, (gap, value) in found.items()},
    }


def show(records: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, Callable[[str], bool]] = {
        "features": lambda name: name.startswith(("features", "positions")),
        "prompts": lambda name: name.startswith(("sparse", "dense")),
        "masks": lambda name: name == "masks",
        "scores": lambda name: name in ("scores", "objects"),
    }
    table = Table("model", "recognised as", "million parameters", *groups)
    for record in records:
        cells = []
        for belongs in groups.values():
            parts = [part for name, part in record["differences"].items() if belongs(name)]
            worst = max(parts, key=lambda part: part["largest"])
            cells.append(f"{worst['largest']:.1e} of {worst['of']:.2g}")
        table.add_row(record["model"], record["recognised"], f"{record['parameters'] / 1e6:.1f}", *cells)
    Console(width=140).print(table)


def main() -> None:
    from perceptio_hf.files import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--out", type=out_file, help="JSON file for the figures")
    options = parser.parse_args()
    records = []
    for size in options.sizes:
        for version in options.versions:
            records.append(compare(version, size, options.image_size))
            print(records[-1]["model"], "done", flush=True)
            if options.out:
                write_json(
                    options.out, {"image_size": options.image_size, "torch": torch.__version__, "models": records}
                )
    show(records)
    wrong = [r["model"] for r in records for d in r["differences"].values() if d["largest"] > MOST * max(d["of"], 1.0)]
    if wrong:
        raise SystemExit(f"Too different: {sorted(set(wrong))}")


if __name__ == "__main__":
    main()
