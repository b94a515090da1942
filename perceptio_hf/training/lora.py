"""LoRA for Perceptio: which layers of a model PEFT adapts, and what is saved beside the adapter.

    model = PerceptioForConditionalGeneration.from_pretrained(folder)
    trainer = PerceptioSFTTrainer(model, settings, train_dataset=samples, peft_config=lora_config(model, r=16))

What is trained is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, folder)` loads it, and `merge_and_unload`
makes a plain Perceptio of both.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceptio_hf.extras import missing
from perceptio_hf.files import new_folder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
    from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BLOCKS = "model.language_model.layers"
MODULES_TO_SAVE = ("seg_projector", "mask_decoder")


def lora_config(
    model: "PerceptioForConditionalGeneration",
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_layers: Sequence[str] | None = None,
    modules_to_save: Sequence[str] = MODULES_TO_SAVE,
    extra_token_ids: Iterable[int] = (),
) -> "LoraConfig":
    """What `PerceptioSFTTrainer(peft_config=...)` and `peft.get_peft_model` need to adapt `model`.

    Low-rank adapters go into linear layers of the language model's blocks and nowhere else: layers of the vision tower
    and of SAM2 have the same names, and stay as they are. Of the embedding and of `lm_head` the rows of the spatial
    tokens learn, in one copy where both are tied; all other rows keep their bits.

    Args:
        model: the model that will be adapted; it is only looked at.
        r: rank of the adapters, 1 or more.
        alpha: their scale is alpha / r; None: 2 r.
        dropout: of their input, 0 or more and below 1.
        target_layers: names of linear layers in a block, such as "q_proj"; None: all of them.
        modules_to_save: parts that are trained as a whole and saved with the adapter, by the end of their names: by
            default the [SEG] projector and SAM2's mask decoder; "multi_modal_projector" is InternVL's projector.
        extra_token_ids: further rows of the embedding that learn, of words that were added to the vocabulary.

    Raises:
        ValueError: for a model that has no spatial tokens or has adapters already, numbers out of range, and names of
            layers or parts that the model does not have.
        ImportError: where PEFT is not installed.
    """
    LoraConfig = _import_peft()
    _check_model(model)
    _check_numbers(r, alpha, dropout)
    words = model.spatial_vocabulary()
    tokens = sorted(
        {words.seg, words.depth_start, words.depth_end, *words.codes, *_checked_ids(model, extra_token_ids)}
    )
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_pattern(_chosen(target_layers, block_layers(model))),
        # Both are named: PEFT shares one copy of the rows where they are tied, and needs two where they are not.
        trainable_token_indices={"embed_tokens": tokens, "lm_head": list(tokens)},
        modules_to_save=_checked_parts(model, modules_to_save),
    )


def block_layers(model: "PerceptioForConditionalGeneration") -> list[str]:
    """The names of the linear layers in a block of the language model, such as "q_proj", in order."""
    blocks = model.get_submodule(_BLOCKS)
    names = [name.rpartition(".")[2] for name, layer in blocks.named_modules() if isinstance(layer, nn.Linear)]
    return list(dict.fromkeys(names))


def save_merged(model: "PeftModel", processor: "PerceptioProcessor", folder: str | os.PathLike) -> Path:
    """Merge the adapters into the model and save it as a checkpoint that needs no PEFT; `model` is used up.

    Raises:
        ValueError: for a folder that exists and holds something else than a saved model, or the one the model was
            loaded from, and for a model in 4 or 8 bit, whose rounding is coarser than most adapters.
        OSError: if it cannot be saved; the folder appears, or is replaced, when it is complete.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ValueError(
            "The adapters' model is quantised: merged into 4 or 8 bit they are rounded away. Load the base again "
            "without quantization_config, then the adapters, PeftModel.from_pretrained(base, folder), and merge these."
        )
    with new_folder(folder, overwrite=True, sources=[model.get_base_model().config.name_or_path]) as fresh:
        model.merge_and_unload().save_pretrained(fresh)
        processor.save_pretrained(fresh)
    return Path(folder)


def check_freezes(model: "PerceptioForConditionalGeneration", settings: Any) -> None:
    """Of a model with adapters: PEFT's configuration decides what learns, so settings must not say otherwise.

    Raises:
        ValueError: for a `freeze_...` that was set, and that is not what the adapters do.
    """
    parts = {
        "language_model": model.model.language_model,
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "mask_decoder": model.mask_model.mask_decoder,
    }
    defaults = {field.name: field.default for field in fields(settings)}
    for name, part in parts.items():
        setting, learns = f"freeze_{name}", any(parameter.requires_grad for parameter in part.parameters())
        frozen = getattr(settings, setting)
        if frozen != defaults[setting] and frozen == learns:
            raise ValueError(
                f"{setting} is {str(frozen).lower()}, but with these adapters the {name.replace('_', ' ')} "
                f"{'learns' if learns else 'does not learn'}: leave it out, and name the parts that are to learn as a "
                "whole in lora_modules_to_save (modules_to_save)."
            )


def base_of_adapter(folder: str | os.PathLike) -> str | None:
    """The checkpoint that the adapter in `folder` was trained on, a folder or a name on the Hub; None for a `folder`
    that holds a model, or nothing.

    Raises:
        ValueError: for an adapter that does not say, or whose base is in no folder, or is an adapter too.
    """
    folder = Path(folder)
    if not _holds_adapter(folder):
        return None
    base = _settings_of(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{folder / _ADAPTER} does not say in base_model_name_or_path which checkpoint it adapts.")
    place = os.path.expanduser(base)
    if os.path.isdir(place):
        if _holds_adapter(Path(place)):
            raise ValueError(f"{folder} is an adapter of {base}, which is one itself; merge that into its base first.")
        return place
    if base.count("/") != 1 or base.startswith((".", "/", "~")):  # else it may be a name on the Hub
        raise ValueError(
            f"{folder} is an adapter of {base}, and there is no such folder; write where it is now into {_ADAPTER} "
            "(base_model_name_or_path)."
        )
    return base


def _holds_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file()


def _settings_of(folder: Path) -> dict[str, Any]:
    file = folder / _ADAPTER
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); save the adapter again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged ({settings!r:.40} is no object); save the adapter again.")
    return settings


def check_goes_on(checkpoint: str | os.PathLike, r: int | None) -> None:
    """ValueError where a training with adapters of rank `r`, or without, cannot go on from a `checkpoint`."""
    checkpoint = Path(checkpoint)
    held = _settings_of(checkpoint).get("r") if (checkpoint / _ADAPTER).is_file() else None
    if held != r:
        kinds = ["a whole model" if rank is None else f"adapters of rank {rank}" for rank in (held, r)]
        raise ValueError(
            f"{checkpoint} is of a training of {kinds[0]}, and the recipe trains {kinds[1]}; name another --out."
        )


def load_merged(folder: str | os.PathLike, **options) -> "PerceptioForConditionalGeneration":
    """The base of the adapter in `folder`, with the adapter merged in; in evaluation mode, on the CPU.

    Args:
        options: of the base's `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: for a folder without an adapter, or with one that is damaged or does not fit its base.
        ImportError: without PEFT.
    """
    _import_peft()
    from peft import PeftModel, get_peft_model_state_dict

    from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration

    base = base_of_adapter(folder)
    if base is None:
        raise ValueError(f"{folder} holds no adapter; name a folder with {_ADAPTER}.")
    saved = _names_in(Path(folder) / _ADAPTER_WEIGHTS)
    model = PerceptioForConditionalGeneration.from_pretrained(base, **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT's own old calls, and of tensors that are compared below
            model = PeftModel.from_pretrained(model, os.fspath(folder))
            names = set(get_peft_model_state_dict(model))
    except Exception as error:  # whatever PEFT and torch raise at settings and shapes that do not fit
        reason = str(error).strip().splitlines()[-1].strip()[:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"the adapter in {folder} does not fit its base {base}: {reason}") from error
    if names != saved:  # PEFT leaves out what has no place, and starts at random what is missing
        missing, over = sorted(names - saved), sorted(saved - names)
        raise ValueError(
            f"the adapter in {folder} does not fit its base {base}: {len(missing)} tensors are missing and {len(over)} "
            f"have no place, the first is {(missing or over)[0]}."
        )
    return model.merge_and_unload().eval()


def _names_in(file: Path) -> set[str]:
    """The names of an adapter's tensors."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file} is missing; it holds the adapter's weights.")
    try:
        with safe_open(file, "pt") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); save the adapter again.") from None


def check_has_no_adapter(model: nn.Module | str) -> None:
    """Raises ValueError for a model, or a folder, with an adapter inside that a training would lose: all would learn,
    and the adapter alone be saved."""
    if isinstance(model, str):
        within = base_of_adapter(model) is not None
    else:
        within = getattr(model, "_hf_peft_config_loaded", False)
    if within:
        raise ValueError(
            "The model has an adapter inside (AutoModel puts one there from an adapter's folder); begin with "
            "perceptio_hf.training.lora.load_merged(folder), or give PeftModel.from_pretrained(base, folder, "
            "is_trainable=True) to train that one on."
        )


def exact_copies(model: nn.Module | str) -> dict[int, Tensor]:
    """What a model with adapters trains as a whole, by the parameters' `id`, for `put_back`; a path has nothing yet."""
    return {} if isinstance(model, str) else {id(copied): copied.data for copied, _ in _copies(model)}


def put_back(model: nn.Module, exact: dict[int, Tensor]) -> None:
    """Undo what TRL does to parts that are trained as a whole beside adapters of a quantised model: it rounds them to
    bfloat16, in which the small steps of the [SEG] projector and of SAM2's mask decoder are lost. Those whose original
    is float32 are float32 again, with the values they had.

    Args:
        model: the trainer's.
        exact: `exact_copies` of the model that the trainer was given.
    """
    for copied, original in _copies(model):
        before = exact.get(id(copied), original.data)  # a copy that PEFT has made meanwhile is like its original
        if copied.dtype == torch.bfloat16 and before.dtype == torch.float32:
            copied.data = before.clone()


def _copies(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Every parameter of PEFT's `modules_to_save` and the one of the model's own that it stands for."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                for name, copied in copy.named_parameters():
                    yield copied, wrapper.original_module.get_parameter(name)


def _import_peft() -> "type[LoraConfig]":
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing(error, "LoRA") from error
    return LoraConfig


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has adapters already; give the model without them, or merge them first (merge_and_unload)."
        )
    if getattr(getattr(model, "config", None), "model_type", None) != "perceptio":
        raise ValueError(f"`model` is a {type(model).__name__}; expected a PerceptioForConditionalGeneration.")


def _check_numbers(r: int, alpha: float | None, dropout: float) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"The rank r is {r!r}; expected a whole number of 1 or more, e.g. 16.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; expected a number above 0, or None for twice the rank.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The dropout is {dropout}; expected a number of 0 or more and below 1.")


def _checked_ids(model: nn.Module, ids: Iterable[int]) -> list[int]:
    ids, rows = list(ids), model.config.text_config.vocab_size
    wrong = [token for token in ids if not 0 <= token < rows]
    if wrong:
        raise ValueError(f"extra_token_ids has {wrong[:5]}; the embedding has the rows 0 to {rows - 1}.")
    return ids


def _chosen(names: Sequence[str] | None, known: list[str]) -> list[str]:
    names = known if names is None else [names] if isinstance(names, str) else list(names)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(
            f"target_layers has {', '.join(map(repr, wrong)) or 'no name'}; the linear layers of the language model's "
            f"blocks are {', '.join(known)}."
        )
    return names


def _pattern(names: Sequence[str]) -> str:
    """What the full names of these layers look like, and no other's: PEFT matches a string against the whole name."""
    return rf"{re.escape(_BLOCKS)}\.\d+\.(?:.+\.)?(?:{'|'.join(map(re.escape, names))})"


def _checked_parts(model: nn.Module, names: Sequence[str]) -> list[str]:
    names, parts = [names] if isinstance(names, str) else list(names), [name for name, _ in model.named_modules()]
    wrong = [name for name in names if not any(part == name or part.endswith(f".{name}") for part in parts)]
    if wrong:
        raise ValueError(
            f"modules_to_save has {', '.join(map(repr, wrong))}, which no part of the model is named; the usual ones "
            f"are {', '.join((*MODULES_TO_SAVE, 'multi_modal_projector'))}."
        )
    return names
