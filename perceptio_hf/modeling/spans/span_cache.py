"""Keys and values of tokens that were guessed: cut off what was wrong, and put what was right where it belongs."""

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput

# What transformers calls it among arguments and outputs: `cache` since 5.24.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


def can_shrink(cache: Cache | None) -> bool:
    """Whether tokens can be taken back from it: plain dynamic and static caches; no sliding windows, no compression."""
    if type(cache) is StaticCache:
        return all(type(layer) is StaticLayer for layer in cache.layers) and not getattr(cache, "offloading", False)
    if type(cache) is DynamicCache:
        return all(type(layer) is DynamicLayer for layer in cache.layers) and not getattr(cache, "offloading", False)
    return False


def drop_last(cache: Cache, count: int) -> None:
    """Take the last `count` tokens back."""
    if not count:
        return
    if type(cache) is StaticCache:  # transformers < 5.24 cannot; what lies behind the length is overwritten
        for layer in cache.layers:
            layer.cumulative_length.sub_(count)
    else:
        cache.crop(-count)


def move_last(cache: DynamicCache, count: int, columns: torch.Tensor) -> None:
    """Put the last `count` tokens of each row into its `columns` (rows, count), none of them beyond the end."""
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            index = columns.to(kept.device)[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
            kept.scatter_(2, index, kept[:, :, -count:].clone())
