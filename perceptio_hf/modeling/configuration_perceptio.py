"""Configuration of Perceptio: an InternVL, a SAM2, a depth codec, and the spatial tokens that join them."""

import os

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.sam2.configuration_sam2 import Sam2Config

from perceptio_hf.tokens import SpatialVocabulary

from .configuration_depth_vqvae import DepthVQVAEConfig, refuse_unknown, without_foreign

try:  # transformers >= 5.20
    from transformers.configuration_utils import SubConfigSpec
except ImportError:
    SubConfigSpec = None

_SPATIAL_CONFIGS = {"mask_config": Sam2Config, "depth_config": DepthVQVAEConfig}


def attention_of_internvl(implementation: str | dict | None) -> str | dict | None:
    """An attention implementation, or one per sub-configuration, that leaves SAM2 and the codec as they are.

    SAM2 is float32 and windowed: it knows "eager" and "sdpa", and neither flash nor flex attention. A dict that names
    "mask_config" is taken at its word.
    """
    if not isinstance(implementation, str) or implementation in ("eager", "sdpa"):
        return implementation
    return dict.fromkeys(("", "text_config", "vision_config"), implementation)


def without_places(values: dict) -> dict:
    """What a config.json holds, without `_name_or_path` in its sections."""
    return {
        name: without_places({key: item for key, item in value.items() if key != "_name_or_path"})
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


@strict
class PerceptioConfig(InternVLConfig):
    """Configuration of `PerceptioForConditionalGeneration`; every field of `InternVLConfig` keeps its meaning.

    Args:
        mask_config: transformers' `Sam2Config` of the model that turns [SEG] states into masks.
        depth_config: `DepthVQVAEConfig` of the codec that turns depth codes into a depth map.
        seg_token_id: id of ``[SEG]``; None (as the other ids) in a model whose vocabulary has no spatial tokens.
        depth_start_token_id: id of ``<DEPTH_START>``.
        depth_end_token_id: id of ``<DEPTH_END>``.
        depth_token_ids: ids of ``<DEPTH_0>`` .. ``<DEPTH_{K-1}>`` in this order.
        picture_mark_token_ids: the tokens that picture marks (``Image-2:``, see `perceptio_hf.tokens`) are spelt with:
            the text of each without spaces, and the ids that have this text. None: marks are words without effect.
        num_depth_tokens: N, codes per span; default and only legal value: the codec's grid, g * g.
        num_depth_codes: K, size of the codebook; default and only legal value: the codec's.
        mask_padding_points: "not a point" embeddings before the [SEG] prompt. SAM2 sees two of them where no point is
            given (Sa2VA trains with these), hence the default.
        mask_multimask_output: True takes the best of SAM2's three masks by predicted IoU (as Sa2VA does), False its
            single-mask output.

    Raises:
        ValueError: where these fields contradict one another, or one does not exist.
    """

    model_type = "perceptio"
    if SubConfigSpec is not None:  # 5.20 takes no class in its place, later releases do
        sub_configs_defaults = InternVLConfig.sub_configs_defaults | {
            name: SubConfigSpec(config_class=config_class) for name, config_class in _SPATIAL_CONFIGS.items()
        }
    else:
        sub_configs = {**InternVLConfig.sub_configs, **_SPATIAL_CONFIGS}

    # A configuration that is tried as a dict is printed for the error: milliseconds at every assignment.
    mask_config: PreTrainedConfig | dict | None = None
    depth_config: PreTrainedConfig | dict | None = None
    seg_token_id: int | None = None
    depth_start_token_id: int | None = None
    depth_end_token_id: int | None = None
    depth_token_ids: list[int] | None = None
    picture_mark_token_ids: dict[str, list[int]] | None = None
    num_depth_tokens: int | None = None
    num_depth_codes: int | None = None
    mask_padding_points: int = 2
    mask_multimask_output: bool = True

    def __post_init__(self, **kwargs):
        refuse_unknown(type(self), kwargs)
        for name, config_class in _SPATIAL_CONFIGS.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        super().__post_init__(**kwargs)
        if self.num_depth_tokens is None:
            self.num_depth_tokens = self.depth_config.num_tokens
        if self.num_depth_codes is None:
            self.num_depth_codes = self.depth_config.num_codes
        self._check_depth_sizes()
        self._check_token_ids()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; keys of other programs are left out."""
        values = without_foreign(cls, config_dict)
        if isinstance(values.get("depth_config"), dict):
            values["depth_config"] = without_foreign(DepthVQVAEConfig, values["depth_config"])
        return super().from_dict(values, **kwargs)

    def to_dict(self) -> dict:
        """As in transformers, without the places on somebody's disk that the parts were read from."""
        return without_places(super().to_dict())

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        # What comes with from_pretrained(attn_implementation=...) is meant for InternVL's two models.
        PreTrainedConfig._attn_implementation.fset(self, attention_of_internvl(value))

    def _check_depth_sizes(self) -> None:
        for name, of_codec in (("num_depth_tokens", "num_tokens"), ("num_depth_codes", "num_codes")):
            value, expected = getattr(self, name), getattr(self.depth_config, of_codec)
            if value != expected:
                raise ValueError(
                    f"{name} is {value}, but the depth codec of depth_config has {of_codec} = {expected}. "
                    f"Leave {name} out or correct depth_config."
                )

    def _check_token_ids(self) -> None:
        ids = [self.seg_token_id, self.depth_start_token_id, self.depth_end_token_id]
        given = [token is not None for token in (*ids, self.depth_token_ids)]
        if not any(given):
            return
        if not all(given):
            raise ValueError(
                "seg_token_id, depth_start_token_id, depth_end_token_id and depth_token_ids belong together: "
                f"got {ids} and depth_token_ids={self.depth_token_ids}. Give all four or none."
            )
        if len(self.depth_token_ids) != self.num_depth_codes:
            raise ValueError(
                f"depth_token_ids has {len(self.depth_token_ids)} ids, expected num_depth_codes={self.num_depth_codes}."
            )
        ids += self.depth_token_ids
        if len(set(ids)) != len(ids) or not 0 <= min(ids) <= max(ids) < self.text_config.vocab_size:
            raise ValueError(
                f"The spatial token ids must differ from one another and lie in 0..{self.text_config.vocab_size - 1} "
                f"(text_config.vocab_size), got values from {min(ids)} to {max(ids)}."
            )

    @property
    def has_spatial_tokens(self) -> bool:
        """Whether the vocabulary holds the spatial tokens."""
        return self.seg_token_id is not None

    def spatial_vocabulary(self, turn_ends: int | list[int] | None = None) -> SpatialVocabulary:
        """The spatial tokens' ids in one value; `turn_ends` are the ids that end a turn (the eos ids)."""
        turn_ends = [] if turn_ends is None else [turn_ends] if isinstance(turn_ends, int) else turn_ends
        pieces = self.picture_mark_token_ids or {}
        return SpatialVocabulary(
            seg=self.seg_token_id,
            depth_start=self.depth_start_token_id,
            depth_end=self.depth_end_token_id,
            codes=tuple(self.depth_token_ids),
            num_depth_tokens=self.num_depth_tokens,
            image=self.image_token_id,
            turn_ends=frozenset(turn_ends),
            mark_pieces={token: piece for piece, tokens in pieces.items() for token in tokens},
        )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save the configuration and, beside it, the code that `trust_remote_code=True` loads elsewhere."""
        from .remote_code import write_code  # imported here: a copy of this file outside the package has its own way

        write_code(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)
