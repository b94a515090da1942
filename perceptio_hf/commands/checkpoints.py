"""Loads the checkpoint a command names, with errors that a user can act on; and the options that name it."""

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from perceptio_hf import tiny_checkpoint

if TYPE_CHECKING:
    from perceptio_hf import PerceptioForConditionalGeneration, PerceptioProcessor

Model = Annotated[
    str | None,
    typer.Option(help="Folder or Hub name of a checkpoint. Default: the embedded tiny one.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1, mps ... Default: the GPU if there is one.", show_default=False
    ),
]
_Source = TypeVar("_Source")
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DType = Annotated[
    DTypeName,
    typer.Option(help="Numbers the language model computes with; auto takes those it was saved in."),
]
TINY_NOTE = (
    "The embedded tiny checkpoint knows only rendered scenes: on photographs it shows that everything runs, not that "
    "it sees. Name another checkpoint with --model."
)
# Below so many parameters an operation on the CPU is too short to share: on a busy machine with two cores, two threads
# waiting for one another took up to a hundred times as long as one.
SMALL = 50_000_000


def resolve(model: str | None) -> str:
    """The folder or Hub name to load; None and "tiny", as recipes call it, mean the embedded tiny checkpoint.

    Raises:
        ValueError: for a folder that is missing or holds no Perceptio checkpoint.
        FileNotFoundError: where the package was installed without its tiny checkpoint.
    """
    if model in (None, "tiny"):
        return tiny_checkpoint()
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):
        if not any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{model} has no config.json, so it is not a saved checkpoint; name the folder that does.")
        return folder
    if os.path.exists(folder):
        raise ValueError(f"{model} is a file; --model is the folder that save_pretrained wrote.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or not all(model.split("/")):
        raise ValueError(f"There is no folder {model!r}; --model is a checkpoint's folder or its Hub name, owner/name.")
    return model


def or_tiny(source: _Source) -> _Source | str:
    """`source`; the embedded tiny checkpoint's folder where it is "tiny"."""
    return tiny_checkpoint() if source == "tiny" else source


def is_tiny(folder: str) -> bool:
    """Whether `folder` is the embedded tiny checkpoint."""
    try:
        return Path(folder).resolve() == Path(tiny_checkpoint()).resolve()
    except FileNotFoundError:
        return False


def check_device(device: str) -> None:
    """Raises ValueError where torch knows no such device or this machine has none."""
    import torch

    try:
        if torch.device(device).type == "meta":
            raise ValueError("it holds no values")
        torch.zeros(1, device=device)
    except Exception as error:  # each backend of torch has its own way to say no, some on many lines
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(f"--device {device} cannot be used here: {reason}. Name cpu, cuda, cuda:1, mps ...") from None


def load(
    folder: str, device: str | None = None, dtype: str = "auto", load_in: str | None = None
) -> "tuple[PerceptioForConditionalGeneration, PerceptioProcessor]":
    """Model (in evaluation mode) and processor of a checkpoint; an adapter's is its base with the adapter merged in.

    A small model on the CPU sets torch to one thread. One that was saved in bfloat16 is spoken of on a CPU that does
    not multiply it, unless `dtype` asks for it.

    Args:
        device: where the model goes; default: the GPU where there is one.
        dtype: of the language model and its eyes, as torch names it; "auto": as it was saved. SAM2 and the codec keep
            float32.
        load_in: "4bit" or "8bit": the matrices of the language model and its eyes, by bitsandbytes.

    Raises:
        ValueError: where the checkpoint is of another kind, incomplete, damaged, or not to be had.
        ImportError: for `load_in` without bitsandbytes.
    """
    import torch
    from transformers import AutoModel

    from perceptio_hf.training.lora import base_of_adapter, load_merged

    processor = load_processor(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapts = base_of_adapter(folder) is not None
    if adapts and load_in is not None:  # merged into 4 or 8 bit it would be rounded away
        raise ValueError(
            f"--load-in takes whole checkpoints and {folder} is an adapter: merge it first (docs/lora.md)."
        )
    options = {} if load_in is None else _quantised(load_in, device, dtype)
    try:
        model = (load_merged if adapts else AutoModel.from_pretrained)(folder, dtype=dtype, **options)
    except Exception as error:  # whatever transformers, safetensors or the Hub raise: the user named a wrong checkpoint
        raise _not_loaded(folder, error) from error
    if device == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    half = dtype == "auto" and model.get_input_embeddings().weight.dtype == torch.bfloat16
    if half and _converts_bfloat16(device):
        print(
            f"perceptio: {folder} is in bfloat16, which this processor does not multiply. In float32 (--dtype float32 "
            "where a command has it, or saved so) it takes twice the memory and a fraction of the time.",
            file=sys.stderr,
        )
    return (model.eval() if load_in else model.eval().to(device)), processor


def load_processor(folder: str) -> "PerceptioProcessor":
    """The processor of a checkpoint, alone.

    Raises:
        ValueError: as `load`.
    """
    from transformers import AutoConfig

    from perceptio_hf import PerceptioProcessor
    from perceptio_hf.training.lora import base_of_adapter

    quieten()
    try:
        base = base_of_adapter(folder)
        kind = AutoConfig.from_pretrained(base or folder).model_type
        if kind != "perceptio":
            raise ValueError(f"it is a {kind!r} model" if base is None else f"it adapts {base}, a {kind!r} model")
        # PEFT alone saves an adapter without its processor.
        own = base is None or os.path.isfile(os.path.join(folder, "processor_config.json"))
        return PerceptioProcessor.from_pretrained(folder if own else base)
    except Exception as error:  # as above
        raise _not_loaded(folder, error) from error


def _not_loaded(folder: str, error: Exception) -> ValueError:
    return ValueError(f"{folder} cannot be loaded as a Perceptio checkpoint: {error}")


def _quantised(load_in: str, device: str, dtype: str) -> dict:
    """Options of `from_pretrained`. Quantised models are put on their device while they are loaded, not later."""
    from perceptio_hf.extras import missing

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise missing(error, "--load-in") from error
    import torch
    from transformers import BitsAndBytesConfig

    chosen = "float32" if _converts_bfloat16(device) else "bfloat16"
    computes = getattr(torch, chosen if dtype == "auto" else dtype)
    bits = {"load_in_8bit": True} if load_in == "8bit" else {"load_in_4bit": True, "bnb_4bit_compute_dtype": computes}
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}


def _converts_bfloat16(device: str) -> bool:
    """Whether models run on a processor that turns every number of bfloat16 into float32 and back."""
    import torch

    from perceptio_hf.modeling.placement import multiplies_bfloat16

    return device == "cpu" and not multiplies_bfloat16(torch.device(device))


def fingerprint(folder: str) -> str:
    """What tells a checkpoint from others without loading it: SHA-256 over its settings and weights, or, of one on the
    Hub, its name and commit. About a second for each gigabyte."""
    if not os.path.isdir(folder):
        from transformers import AutoConfig

        return f"{folder}@{getattr(AutoConfig.from_pretrained(folder), '_commit_hash', None)}"
    from perceptio_hf.training.lora import base_of_adapter

    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors", ".bin") and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
    if (base := base_of_adapter(folder)) is not None:
        digest.update(fingerprint(base).encode())
    return digest.hexdigest()


def quieten() -> None:
    """Keep transformers' progress bars and load reports out of the command's output, unless somebody debugs."""
    from transformers.utils import logging

    if not os.environ.get("PERCEPTIO_DEBUG"):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
