"""Small random models in the code OpenGVLab and ByteDance publish: saves them, asks them, and keeps what they answer.

Runs where their code runs (transformers 4.49; no perceptio_hf needed), started by original_code.py. Stubbed are only
imports that are not at hand: torchvision (its transforms, with Pillow), timm's DropPath (at rate 0), video readers and
flash-attention.
"""

import argparse
import importlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

QUESTION = "Segment the red ball, please."
TEXTS = [
    "Which is closer, the red ball or the blue box?",
    "It is   17.5 cm\nfrom here: naïve, 你好, Ünïcode 🎉!",
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhere?<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "tokens\tand\r\nlines\n\n\n",
]
SIZES = [(448, 448), (640, 480), (333, 900), (1500, 400), (61, 47)]  # (width, height) of pictures that are tiled
NEW_TOKENS = 12


def noise(width: int, height: int) -> Image.Image:
    """Smooth noise: scaling pure noise would say little about pictures."""
    values = np.random.default_rng(width + height).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def empty_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def stub_imports() -> None:
    """torchvision's transforms as these models use them; anything else that is asked of a stub is an empty class."""
    import transformers  # noqa: F401  (first: it must not take the stubs for the real thing)

    for name in (
        "cv2",
        "timm",
        "timm.models",
        "timm.models.layers",
        "imageio",
        "decord",
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ):
        if name in sys.modules:
            continue
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = empty_class
        sys.modules[name] = module
    transforms, functional = sys.modules["torchvision.transforms"], sys.modules["torchvision.transforms.functional"]
    sys.modules["torchvision"].transforms = transforms
    functional.InterpolationMode = types.SimpleNamespace(BICUBIC=Image.Resampling.BICUBIC)
    functional.to_pil_image = lambda array, mode=None: Image.fromarray(array)
    functional.resize = lambda image, size: image.resize(size[::-1])

    def compose(steps: list[Callable]) -> Callable:
        def apply(value):
            for step in steps:
                value = step(value)
            return value

        return apply

    def normalize(mean, std) -> Callable:
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda pixels: (pixels - mean) / std

    transforms.Compose, transforms.Normalize = compose, normalize
    transforms.Lambda = lambda function: function
    transforms.Resize = lambda size, interpolation=None: lambda image: image.resize(size[::-1], interpolation)
    transforms.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def vision_config(**changes) -> dict:
    """InternViT's shape at 1/32 of its width; tiles of 448 pixels, as published."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    fixed = {
        "image_size": 448,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
    }
    return {**sizes, **fixed, "architectures": ["InternVisionModel"], "use_flash_attn": False, **changes}


def llm_config(architecture: str, vocab_size: int) -> dict:
    config = {
        "architectures": [architecture],
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "attn_implementation": "eager",
    }
    if architecture == "InternLM2ForCausalLM":
        config |= {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    return config


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part shows in the logits; nothing stays at its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "grounding_encoder" in name:  # SAM2 keeps its own initial weights where they are not zero
                parameter.copy_(parameter if parameter.any() else 0.02 * drawn)
            elif parameter.ndim > 1:
                parameter.copy_(drawn * parameter[0].numel() ** -0.5 if "embed" not in name else drawn)
            else:
                parameter.add_(0.1 * drawn)


def make_tokenizer(architecture: str, internlm2_class: type, folder: Path, extra: list[str]):
    """The original tokenizer class on a vocabulary trained on a few sentences, with InternVL's added tokens."""
    images = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", *extra]
    corpus = [*TEXTS[:2], QUESTION, "The red ball is nearer than the blue box, which stands behind it."] * 20
    folder.mkdir(parents=True)
    if architecture == "InternLM2ForCausalLM":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            split_digits=True,
            minloglevel=2,
        )
        tokenizer = internlm2_class(str(folder / "tokenizer.model"))
        tokenizer.register_for_auto_class()
    else:
        from tokenizers import ByteLevelBPETokenizer
        from transformers import Qwen2Tokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(corpus, vocab_size=420, show_progress=False)
        trained.save_model(str(folder))
        tokenizer = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="<|im_end|>")
    special = ["<|im_start|>", "<|im_end|>", *images]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


@torch.no_grad()
def write_internvl(code: Path, out: Path, architecture: str, vision: dict) -> None:
    """One InternVL: its checkpoint in `out`, and in answers.pt what it made of a question about pictures."""
    sys.path.insert(0, str(code / "internvl_chat"))
    from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
    from internvl.train.dataset import build_transform, dynamic_preprocess

    tokenizer = make_tokenizer(architecture, InternLM2Tokenizer, out, [])
    config = InternVLChatConfig(
        vision_config=vision_config(**vision),
        llm_config=llm_config(architecture, len(tokenizer)),
        template="internvl2_5",
        force_image_size=448,
        ps_version="v2",
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=6,
        architectures=["InternVLChatModel"],
    )
    torch.manual_seed(0)
    model = InternVLChatModel(config, use_flash_attn=False).eval()
    randomise(model, seed=1)
    transform = build_transform(is_train=False, input_size=448)
    tiles = [
        torch.stack([transform(tile) for tile in dynamic_preprocess(noise(*size), 1, 6, 448, use_thumbnail=True)])
        for size in SIZES
    ]
    asked: dict = {}
    generate = type(model).generate

    def listening(**given):
        asked.update(given, answer=generate(model, **given))
        return asked["answer"]

    model.generate = listening
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id or 0}
    model.chat(tokenizer, tiles[1], QUESTION, settings)
    ids = asked["input_ids"]
    flags = torch.ones(len(tiles[1]), 1, dtype=torch.long)
    logits = model(pixel_values=tiles[1], input_ids=ids, attention_mask=torch.ones_like(ids), image_flags=flags).logits
    del model.generate
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    answers = {"input_ids": ids, "logits": logits, "answer": asked["answer"], "tiles": tiles}
    torch.save({**answers, "texts": [tokenizer(text)["input_ids"] for text in TEXTS]}, out / "answers.pt")


def without_cuda(model: torch.nn.Module) -> None:
    """Sa2VA's code names the device cuda; here everything stays where it is."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    sam2 = model.grounding_encoder.sam2_model
    start = sam2.init_state

    def init_state(images):
        return start(images) | {"device": torch.device("cpu"), "storage_device": torch.device("cpu")}

    sam2.init_state = init_state


class _Asked(Exception):
    """Carries the arguments of a call that is not made."""


def arguments_of_generate(model: torch.nn.Module, ask: Callable) -> dict:
    """What `ask` passes to `model.generate`, which is not run."""

    def listening(**given):
        raise _Asked(given)

    model.generate = listening
    try:
        ask()
    except _Asked as asked:
        return asked.args[0]
    finally:
        del model.generate
    raise RuntimeError("generate was not called")


def say_seg_and_stop(model: torch.nn.Module, given: dict, seg: int, end: int) -> None:
    """Choose the head's rows so that the answer to `given` is [SEG] and then the end of the turn."""
    head = model.language_model.get_output_embeddings().weight
    states: list[torch.Tensor] = []
    for _ in (seg, end):
        out = model.generate(
            **given | {"generation_config": None, "max_new_tokens": len(states) + 1, "do_sample": False}
        )
        states.append(out.hidden_states[-1][-1][0, -1])  # of the last step, after the final norm
        head.zero_()
        head[[seg, end][: len(states)]] = 10 * torch.linalg.pinv(torch.stack(states, 1))


@torch.no_grad()
def write_sa2va(code: Path, out: Path, architecture: str) -> None:
    """One Sa2VA with its SAM2-large: the checkpoint in `out`, and in answers.pt its masks of a picture."""
    parent, package = code / "projects" / "llava_sam2", "hf.models"
    if not parent.is_dir():  # where newer versions of the repository have it
        parent = code / "projects" / "sa2va"
    sys.path.insert(0, str(parent))
    load = importlib.import_module
    chat = load(f"{package}.modeling_sa2va_chat")
    tokenizer = make_tokenizer(
        architecture,
        load(f"{package}.tokenization_internlm2").InternLM2Tokenizer,
        out,
        ["[SEG]", "<p>", "</p>", "<vp>", "</vp>"],
    )
    config = load(f"{package}.configuration_sa2va_chat").Sa2VAChatConfig(
        vision_config=vision_config(),
        llm_config=llm_config(architecture, len(tokenizer)),
        template={"InternLM2ForCausalLM": "internlm2_chat"}.get(architecture, "qwen_chat"),
        force_image_size=448,
        ps_version="v2",
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=12,
        architectures=["Sa2VAChatModel"],
    )
    torch.manual_seed(0)
    model = chat.Sa2VAChatModel(config, use_flash_attn=False).eval()
    randomise(model, seed=1)
    without_cuda(model)
    model.preparing_for_generation(tokenizer, max_new_tokens=8, torch_dtype=torch.float32)
    seg, end = tokenizer.convert_tokens_to_ids(["[SEG]", "<|im_end|>"])

    def ask() -> dict:
        return model.predict_forward(image=noise(*SIZES[1]), text=f"<image>\n{QUESTION}", tokenizer=tokenizer)

    given = arguments_of_generate(model, ask)
    say_seg_and_stop(model, given, seg, end)
    kept: dict = {}
    encoder = model.grounding_encoder
    states, infer = encoder.get_sam2_embeddings, encoder.language_embd_inference
    encoder.get_sam2_embeddings = lambda pixels: kept.update(pixels=pixels) or states(pixels)

    def inferring(state, prompts):
        kept.update(prompt=prompts[0], logits=infer(state, prompts))
        return kept["logits"]

    encoder.language_embd_inference = inferring
    # save_pretrained of newer versions makes a default configuration, which their class cannot.
    type(config)._get_non_default_generation_parameters = lambda self: {}
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    answer = ask()
    asked = {"input_ids": given["input_ids"], "tiles": given["pixel_values"], "answer": answer["prediction"]}
    masks = torch.from_numpy(np.stack(answer["prediction_masks"]))
    torch.save({**asked, **kept, "masks": masks}, out / "answers.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["internvl", "sa2va"])
    parser.add_argument("architecture")
    parser.add_argument("--code", type=Path, required=True, help="a clone of the repository")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--vision", type=json.loads, default={}, help="fields of vision_config, as JSON")
    options = parser.parse_args()
    stub_imports()
    if options.kind == "internvl":
        write_internvl(options.code, options.out, options.architecture, options.vision)
    else:
        write_sa2va(options.code, options.out, options.architecture)


if __name__ == "__main__":
    main()
