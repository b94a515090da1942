"""OpenGVLab's and ByteDance's own code beside ours: InternVL and Sa2VA as they save them, loaded by our conversion.

git clone https://github.com/OpenGVLab/InternVL && git clone https://github.com/bytedance/Sa2VA
python -m venv old && old/bin/pip install torch transformers==4.49.0 peft einops sentencepiece pillow tqdm
python benchmarks/original_code.py --python old/bin/python --internvl-code InternVL --sa2va-code Sa2VA \\
    --out benchmarks/results/original_code.json

Their classes, with small random language and vision models (and, in Sa2VA, SAM2-large at its 1024 pixels), answer a
question about a picture, greedily, through `chat` and `predict_forward`. Their code needs an older transformers, so
original_models.py runs there. We load what it saved and answer the same. The table shows the largest differences.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from original_models import NEW_TOKENS, QUESTION, SIZES, TEXTS, noise
from torch import Tensor

from perceptio_hf.files import out_file

SIX_B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}  # InternViT-6B
INTERNVL = {
    "InternVL, InternLM2": ("InternLM2ForCausalLM", {}),
    "InternVL, Qwen2": ("Qwen2ForCausalLM", {}),
    "InternVL, Llama, InternViT-6B's kind": ("LlamaForCausalLM", SIX_B),
}
SA2VA = {"Sa2VA, Qwen2": "Qwen2ForCausalLM", "Sa2VA, InternLM2": "InternLM2ForCausalLM"}


def largest(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the largest value it may be compared with."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"{tuple(ours.shape)} and {tuple(theirs.shape)} cannot be compared")
    return {"largest": float((ours - theirs).abs().max()), "of": float(theirs.abs().max())}


def conversation(size: tuple[int, int]) -> list[dict]:
    parts = [{"type": "image", "image": noise(*size)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def inputs_of(processor: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(conversation(size), **options))


@torch.no_grad()
def compare_internvl(folder: Path) -> dict[str, Any]:
    """Token ids, tiles, logits and answer of one InternVL."""
    from transformers import Sam2Config

    from perceptio_hf import DepthVQVAEConfig, PerceptioProcessor
    from perceptio_hf.conversion.opengvlab import load_opengvlab

    theirs = torch.load(folder / "answers.pt", weights_only=True)
    model, parts = load_opengvlab(folder)
    texts = sum(parts.tokenizer(text)["input_ids"] == ids for text, ids in zip(TEXTS, theirs["texts"], strict=True))
    processor = PerceptioProcessor.from_components(parts, Sam2Config(), DepthVQVAEConfig())
    asked = [inputs_of(processor, size) for size in SIZES]
    inputs = {name: asked[1][name] for name in ("input_ids", "attention_mask", "pixel_values")}
    tiles = [largest(mine["pixel_values"], their) for mine, their in zip(asked, theirs["tiles"], strict=True)]
    said = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return {
        "token ids of the prompt equal": inputs["input_ids"].tolist() == theirs["input_ids"].tolist(),
        "token ids equal in texts": f"{texts} of {len(TEXTS)}",
        "tiles of five pictures": max(tiles, key=lambda tile: tile["largest"]),
        "logits": largest(model(**inputs | {"pixel_values": theirs["tiles"][1]}).logits, theirs["logits"]),
        "greedy answers equal": said[0].tolist() == theirs["answer"][0].tolist(),
    }


@torch.no_grad()
def compare_sa2va(folder: Path) -> dict[str, Any]:
    """Prompt, pictures, [SEG] prompt, mask logits and masks of one Sa2VA."""
    from perceptio_hf import DepthVQVAE, DepthVQVAEConfig
    from perceptio_hf.conversion.sa2va import load_sa2va

    theirs = torch.load(folder / "answers.pt", weights_only=True)
    codec = DepthVQVAE(DepthVQVAEConfig(image_size=32, downsample=8, num_codes=16, code_dim=8, base_channels=4))
    model, processor = load_sa2va(folder, depth_codec=codec)
    inputs = inputs_of(processor, SIZES[1])
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    answer = processor.post_process_spatial(out)[0]
    said = processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :])
    states = model(input_ids=out.sequences, pixel_values=inputs["pixel_values"]).last_hidden_state
    prompt = model.seg_projector(states[out.sequences == processor.seg_token_id])
    embedding, fine = model.encode_mask_pixels(theirs["pixels"])
    same_pixels, _ = model.decode_masks(theirs["prompt"], embedding, fine)
    own_pixels, _ = model.decode_masks(theirs["prompt"], *model.encode_mask_pixels(inputs["mask_pixel_values"]))
    masks, own = theirs["masks"][0], torch.from_numpy(answer.masks)
    at_once = F.interpolate(same_pixels[None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[0] > 0
    return {
        "token ids of the prompt equal": inputs["input_ids"].tolist() == theirs["input_ids"].tolist(),
        "tiles": largest(inputs["pixel_values"], theirs["tiles"]),
        "answer": f"{said!r}, theirs {theirs['answer']!r}",
        "[SEG] prompt of the mask decoder": largest(prompt, theirs["prompt"]),
        "mask logits from their pixels": largest(_large(same_pixels), theirs["logits"][0]),
        "SAM2's pixels": largest(inputs["mask_pixel_values"], theirs["pixels"]),
        "mask logits from our pixels": largest(_large(own_pixels), theirs["logits"][0]),
        "final mask from their pixels: different": f"{float((at_once != masks).float().mean()):.1e}",
        "final mask from our pixels: different": f"{float((own != masks).float().mean()):.1e}",
        "share of the picture inside": f"{float(masks.float().mean()):.2f}",
    }


def _large(logits: Tensor) -> Tensor:
    """Sa2VA scales (1, 256, 256) to SAM2's 1024 before it scales to the picture."""
    return F.interpolate(logits[None], size=(1024, 1024), mode="bilinear", align_corners=False)[0]


def run(python: str, kind: str, architecture: str, code: Path, compare: Callable[[Path], dict], vision: dict) -> dict:
    """Let their code write a checkpoint, then compare."""
    writer = Path(__file__).with_name("original_models.py")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "original"
        command = [python, str(writer), kind, architecture, "--code", str(code), "--out", str(out)]
        done = subprocess.run([*command, "--vision", json.dumps(vision)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return compare(out)


def show(name: str, found: dict[str, Any]) -> None:
    print(name)
    for what, value in found.items():
        text = f"{value['largest']:.1e} of {value['of']:.1f}" if isinstance(value, dict) else str(value)
        print(f"    {what:40} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--internvl-code", type=Path, help="clone of github.com/OpenGVLab/InternVL")
    parser.add_argument("--sa2va-code", type=Path, help="clone of github.com/bytedance/Sa2VA or magic-research/Sa2VA")
    parser.add_argument("--python", required=True, help="the Python of an environment in which their code runs")
    parser.add_argument("--only", help="run only cases whose name contains this")
    parser.add_argument("--out", type=out_file, help="JSON file for the results")
    options = parser.parse_args()
    cases = {}
    if options.internvl_code:
        cases |= {name: ("internvl", options.internvl_code, compare_internvl, *case) for name, case in INTERNVL.items()}
    if options.sa2va_code:
        cases |= {name: ("sa2va", options.sa2va_code, compare_sa2va, text, {}) for name, text in SA2VA.items()}
    results = {}
    for name, (kind, code, compare, architecture, vision) in cases.items():
        if not options.only or options.only in name:
            results[name] = run(options.python, kind, architecture, code, compare, vision)
            show(name, results[name])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
