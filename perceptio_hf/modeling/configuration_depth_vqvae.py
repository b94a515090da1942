"""Settings of the depth codec, a VQ-VAE that writes a depth map as a short sequence of codes."""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a configuration of any kind may hold without a field of that name: arguments of transformers' base class, and
# what its versions since 4.0 have saved into config.json.
_STANDARD = frozenset(
    (
        "add_cross_attention",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "is_decoder",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "loss_type",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "per_layer_config",
        "prefix",
        "pruned_heads",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "tie_word_embeddings",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
    )
)
# Names that other codes have for fields of the codec; `hidden_dim` and the like are AiT's.
_ELSEWHERE = {
    "codebook_dim": "code_dim",
    "codebook_size": "num_codes",
    "downsample_ratio": "downsample",
    "embedding_dim": "code_dim",
    "hidden_dim": "base_channels",
    "hidden_size": "code_dim",
    "num_embeddings": "num_codes",
    "num_resnet_blocks": "num_residual_blocks",
    "num_tokens": "num_codes",
}


def unknown_keys(config_class: type[PreTrainedConfig], keys: Iterable[str]) -> list[str]:
    """Those of `keys` that neither are fields of the class nor standard ones of transformers, of any version."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    standard = _STANDARD | set(GenerationConfig._get_default_generation_params())
    return [key for key in keys if key not in fields | standard and not key.startswith("_")]


def likely_key(config_class: type[PreTrainedConfig], key: str, *, cutoff: float = 0.6) -> str | None:
    """The field that may have been meant by `key`, if one looks like it."""
    fields = [field.name for field in dataclasses.fields(config_class)]
    if _ELSEWHERE.get(key) in fields:
        return _ELSEWHERE[key]
    close = difflib.get_close_matches(key, fields, n=1, cutoff=cutoff)
    return close[0] if close else None


def refuse_unknown(config_class: type[PreTrainedConfig], keys: Iterable[str]) -> None:
    """ValueError for the first key that no such configuration has, with the one that may have been meant.

    transformers would keep it as an attribute that nothing reads.
    """
    for key in unknown_keys(config_class, keys):
        likely = likely_key(config_class, key)
        own = sorted(set(config_class.__annotations__) - set(PreTrainedConfig.__annotations__))
        hint = f"did you mean {likely!r}?" if likely else f"its own are {', '.join(own)}."
        raise ValueError(f"{config_class.__name__} has no field {key!r}; {hint}")


def without_foreign(config_class: type[PreTrainedConfig], values: dict) -> dict:
    """The saved `values` without what other programs have put beside them, which is said once.

    Raises:
        ValueError: for a key that looks like a field, which is a slip of the pen and not another program's.
    """
    foreign = unknown_keys(config_class, values)
    refuse_unknown(config_class, [key for key in foreign if likely_key(config_class, key, cutoff=0.8)])
    if foreign:
        names = ", ".join(map(repr, foreign))
        logger.warning_once(f"{config_class.__name__} has no field {names}, which config.json holds; left out.")
    return {key: value for key, value in values.items() if key not in foreign}


@strict
class DepthVQVAEConfig(PreTrainedConfig):
    """Settings of `DepthVQVAE`. The defaults are those of the VQ-VAE used by AiT, AURORA and MolmoAct.

    Args:
        image_size: Side of the square the codec works on, in pixels. Depth of any other size is resampled to it.
        downsample: Pixels per code along each side, a power of two. The grid is `image_size // downsample` wide.
        num_codes: Entries K of the codebook.
        code_dim: Length d of a codebook entry.
        base_channels: Channels of the finest layer. They double with every halving of the resolution.
        num_residual_blocks: Residual blocks at the coarsest resolution, in the encoder and in the decoder each.
        activation: Non-linearity after every layer, a name of transformers' `ACT2FN`.
        value_low, value_high: What relative inverse depth 0 (farthest) and 1 (nearest) are inside the network. The
            published VQ-VAE reads grey levels scaled to -1..1.
        commitment_weight: Weight of the commitment loss.
        gradient_weight: Weight of the loss on differences between neighbouring pixels.
        depth_ratio: Ratio farthest / nearest distance at which the reconstruction loss becomes an error relative to
            the distance, so that far surfaces, squeezed into a small part of 0..1, are not neglected. 1.0 is plain L1.
        initializer_range: Standard deviation of a freshly initialised codebook.

    Raises:
        ValueError: A field is out of range, contradicts another one, or does not exist.
    """

    model_type = "perceptio_depth_vqvae"

    image_size: int = 320
    downsample: int = 32
    num_codes: int = 128
    code_dim: int = 512
    base_channels: int = 16
    num_residual_blocks: int = 2
    activation: str = "relu"
    value_low: float = -1.0
    value_high: float = 1.0
    commitment_weight: float = 0.25
    gradient_weight: float = 0.5
    depth_ratio: float = 1.0
    initializer_range: float = 1.0

    def __post_init__(self, **kwargs):
        refuse_unknown(type(self), kwargs)
        self._check_sizes()
        self._check_ranges()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in ("image_size", "num_codes", "code_dim", "base_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if self.num_residual_blocks < 0:
            raise ValueError(f"`num_residual_blocks` is {self.num_residual_blocks}; it must be 0 or more.")
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"`downsample` is {self.downsample}; it must be a power of two, at least 2.")
        if self.image_size % self.downsample:
            raise ValueError(
                f"`image_size` {self.image_size} is not a multiple of `downsample` {self.downsample}; "
                f"use {max(1, self.image_size // self.downsample) * self.downsample} or another `downsample`."
            )

    def _check_ranges(self) -> None:
        for name in ("value_low", "value_high", "depth_ratio", "commitment_weight", "gradient_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a finite number.")
        if not self.value_low < self.value_high:
            raise ValueError(f"`value_low` {self.value_low} must be smaller than `value_high` {self.value_high}.")
        if self.depth_ratio < 1.0:
            raise ValueError(f"`depth_ratio` is {self.depth_ratio}; farthest / nearest distance is at least 1.0.")
        for name in ("commitment_weight", "gradient_weight", "initializer_range"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must not be negative.")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; keys of other programs are left out."""
        return super().from_dict(without_foreign(cls, config_dict), **kwargs)

    @property
    def grid_size(self) -> int:
        """Codes along one side, g."""
        return self.image_size // self.downsample

    @property
    def num_tokens(self) -> int:
        """Codes of one depth map, N = g * g."""
        return self.grid_size**2

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save the configuration and, beside it, the code that `trust_remote_code=True` loads elsewhere."""
        from .remote_code import write_code  # here, because a copy outside the package has no use for it

        write_code(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["DepthVQVAEConfig"]
