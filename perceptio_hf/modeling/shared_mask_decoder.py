"""SAM2's mask decoder for several prompts: what a picture gives is computed once, what a prompt costs is small.

It is the function of transformers' `Sam2MaskDecoder.forward`, with the best of three masks or the single one, in
another order of operations, so that results differ by rounding only:

- A prompt is nine tokens and a picture thousands of places. An attention's scores `(x Wq) (k Wk)'` are computed as
  `(x Wq Wk') k'`, and what it mixes as `(p k) Wv`: the places are never projected. In the first layer, whose places
  know nothing of the prompt yet, all prompts of a picture are one product.
- Places stay in the rows of matrices up to the finished mask: both upscaling convolutions, whose kernels do not
  overlap, are products, and no map is turned around in between.
- The last attention is asked for the tokens that are read, and one mask is made of the three.

Where anything looks unlike what is described here (`can_share`), or does not compute the same on a small example, the
caller uses transformers' own forward.
"""

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from .placement import is_here, is_traced

_checked: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def can_share(decoder: nn.Module, embedding: Tensor, *, multimask: bool = True) -> bool:
    """Whether `best_masks` may take the place of `decoder`'s forward, for pictures with this `embedding`."""
    if torch.is_grad_enabled() or is_traced() or torch.is_autocast_enabled(embedding.device.type):
        return False
    if type(decoder) is not Sam2MaskDecoder or not all(_is_plain(part) for part in decoder.modules()):
        return False
    if not multimask and decoder.dynamic_multimask_via_stability and not decoder.training:
        return False  # it may take one of the three then
    kind = (embedding.device, embedding.dtype)
    if not all(type(p.data) is Tensor and is_here(p) and (p.device, p.dtype) == kind for p in decoder.parameters()):
        return False
    if decoder not in _checked:
        _checked[decoder] = _computes_the_same(decoder.config)
    return _checked[decoder]


def _is_plain(part: nn.Module) -> bool:
    """Whether calling its parts one by one is calling it: nothing was put around or in its place."""
    hooks = part._forward_hooks or part._forward_pre_hooks or "_hf_hook" in part.__dict__ or "forward" in part.__dict__
    return not hooks and type(part).__module__.startswith(("torch.nn.", "transformers."))


@torch.no_grad()
def best_masks(
    decoder: nn.Module,
    embedding: Tensor,
    positions: Tensor,
    sparse: Tensor,
    fine: list[Tensor],
    pictures: Sequence[int],
    *,
    multimask: bool = True,
) -> tuple[Tensor, Tensor]:
    """The best mask of each of n prompts on u pictures.

    Args:
        decoder: SAM2's.
        embedding: (u, C, H, W), the dense prompt added.
        positions: (1, C, H, W).
        sparse: (n, s, C) tokens of each prompt.
        fine: (u, C / 8, 4 H, 4 W) and (u, C / 4, 2 H, 2 W).
        pictures: n indices 0..u-1.
        multimask: the best of three masks by predicted IoU; False: the single one.

    Returns:
        (n, 4 H, 4 W) logits and (n,) predicted IoU.
    """
    size = tuple(embedding.shape[2:])
    index = torch.tensor(list(pictures), device=embedding.device) if len(embedding) > 1 else None
    own = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], 1)  # (n, t, C)
    places, positions = _rows(embedding), _rows(positions)
    if index is not None:
        places = places[index]
    tokens, places = _two_ways(decoder.transformer, tokens, places, positions, 1 + decoder.num_mask_tokens)
    numbers = range(1, decoder.num_mask_tokens) if multimask else range(1)
    scores = decoder.iou_prediction_head(tokens[:, 0])[:, numbers.start : numbers.stop]  # (n, 3 or 1)
    mixers = [decoder.output_hypernetworks_mlps[k](tokens[:, 1 + k]) for k in numbers]
    best = scores.argmax(-1, keepdim=True)
    mixer = torch.stack(mixers, 1).take_along_dim(best[..., None], 1)[:, 0]  # (n, C / 8)
    return _upscaled(decoder, places, mixer, fine, index, size), scores.take_along_dim(best, 1)[:, 0]


def _rows(maps: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, H * W, C)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def _two_ways(
    transformer: nn.Module, tokens: Tensor, places: Tensor, positions: Tensor, read: int
) -> tuple[Tensor, Tensor]:
    """`Sam2TwoWayTransformer`: (n, t, C) tokens, (n or 1, T, C) places -> (n, read, C) after the first, (n, T, C)."""
    queries = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = _among_tokens(layer.self_attn, queries, queries)
        else:
            queries = queries + _among_tokens(layer.self_attn, queries + tokens, queries)
        queries = layer.layer_norm1(queries)
        placed = places + positions
        asked = _of_places(layer.cross_attn_token_to_image, queries + tokens, placed, places)
        queries = layer.layer_norm2(queries + asked)
        queries = layer.layer_norm3(queries + layer.mlp(queries))
        places = _told(layer.cross_attn_image_to_token, places, placed, queries + tokens, queries)
        places = layer.layer_norm4(places)
    queries, tokens = queries[:, 1 : 1 + read], tokens[:, 1 : 1 + read]
    asked = _of_places(transformer.final_attn_token_to_image, queries + tokens, places + positions, places)
    return transformer.layer_norm_final_attn(queries + asked), places


def _among_tokens(attention: nn.Module, asking: Tensor, values: Tensor) -> Tensor:
    return attention(query=asking[:, None], key=asking[:, None], value=values[:, None])[0][:, 0]


def _of_places(attention: nn.Module, asking: Tensor, placed: Tensor, places: Tensor) -> Tensor:
    """What tokens (n, t, C) read off `places` (n or 1, T, C), found by `placed`: (n, t, C).

    A bias of the keys adds the same to all scores of a token, which softmax does not see.
    """
    heads = attention.num_attention_heads
    asking = _split(attention.q_proj(asking), heads) * attention.scaling  # (n, h, t, d)
    asking = (asking @ _by_head(attention.k_proj.weight, heads)).flatten(1, 2)  # (n, h t, C)
    shares = _product(asking, placed.transpose(1, 2)).softmax(-1)  # (n, h t, T)
    mixed = _product(shares, places).unflatten(1, (heads, -1))  # (n, h, t, C)
    mixed = mixed @ _by_head(attention.v_proj.weight, heads).transpose(1, 2)  # (n, h, t, d)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _told(attention: nn.Module, places: Tensor, placed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`places` (n or 1, T, C) and what they read off the tokens `values` (n, t, C), found by `keys`: (n, T, C)."""
    heads, count = attention.num_attention_heads, len(values)
    keys = _split(attention.k_proj(keys), heads) * attention.scaling  # (n, h, t, d)
    offset = keys @ attention.q_proj.bias.view(heads, -1, 1)  # (n, h, t, 1)
    keys = (keys @ _by_head(attention.q_proj.weight, heads)).flatten(1, 2)  # (n, h t, C)
    scores = _product(keys, placed.transpose(1, 2)).unflatten(1, (heads, -1))  # (n, h, t, T)
    shares = scores.add_(offset).softmax(2).flatten(1, 2)  # (n, h t, T)
    given = _split(attention.v_proj(values), heads) @ _by_head(attention.o_proj.weight.t(), heads)  # (n, h, t, C)
    given[:, 0] += attention.o_proj.bias  # shares of a head add up to 1
    return torch.baddbmm(places.expand(count, -1, -1), shares.transpose(1, 2), given.flatten(1, 2))


def _split(values: Tensor, heads: int) -> Tensor:
    """(n, t, h d) -> (n, h, t, d)."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _by_head(weight: Tensor, heads: int) -> Tensor:
    """(h d, C) -> (h, d, C)."""
    return weight.unflatten(0, (heads, -1))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(n, a, b), (n or 1, b, c) -> (n, a, c); with one `right` it is a single matrix product."""
    if len(right) == 1:
        return (left.flatten(0, 1) @ right[0]).unflatten(0, left.shape[:2])
    return torch.bmm(left, right)


def _upscaled(
    decoder: nn.Module, places: Tensor, mixer: Tensor, fine: list[Tensor], index: Tensor | None, size: tuple[int, int]
) -> Tensor:
    """(n, T, C) places -> (n, 4 H, 4 W): both convolutions, each place's block in the rows behind it, and the mixer."""
    height, width = size
    finest, finer = fine
    finer = finer.unflatten(2, (height, 2)).unflatten(4, (width, 2)).permute(0, 2, 4, 3, 5, 1)
    finer = finer.reshape(len(finer), height * width, -1)  # (u, T, 2 2 C/4)
    finest = finest.unflatten(2, (height, 2, 2)).unflatten(5, (width, 2, 2)).permute(0, 2, 5, 3, 6, 4, 7, 1)
    finest = finest.reshape(len(finest), height * width * 4, -1)  # (u, T 2 2, 2 2 C/8)
    maps = [finer + decoder.upscale_conv1.bias.repeat(4), finest + decoder.upscale_conv2.bias.repeat(4)]
    finer, finest = maps if index is None else (part[index] for part in maps)
    weights = [conv.weight.permute(0, 2, 3, 1).flatten(1) for conv in (decoder.upscale_conv1, decoder.upscale_conv2)]
    norm = decoder.upscale_layer_norm
    hidden = (places @ weights[0]).add_(finer).unflatten(2, (4, -1)).flatten(1, 2)  # (n, T 2 2, C/4)
    hidden = decoder.activation(F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    hidden = decoder.activation((hidden @ weights[1]).add_(finest))  # (n, T 2 2, 2 2 C/8)
    masks = hidden.unflatten(2, (4, -1)).flatten(1, 2) @ mixer[..., None]  # (n, T 2 2 2 2, 1)
    return masks.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 4 * height, 4 * width)


def _computes_the_same(config) -> bool:
    """Whether a small decoder of this configuration does what is written here, in double precision."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return _same_on_an_example(Sam2MaskDecoder(_smaller(config)).double().eval())
    except Exception:  # another signature, other parts: whatever it is, it is not what is described here
        return False


def _smaller(config):
    """`config` with as few channels as its heads allow."""
    small = copy.deepcopy(config)
    small.hidden_size = 8 * small.num_attention_heads * small.attention_downsample_rate
    small.mlp_dim = small.iou_head_hidden_dim = 8
    small._attn_implementation = "sdpa"  # the eager one rounds its softmax to float32
    return small


def _same_on_an_example(decoder: nn.Module) -> bool:
    channels, size, pictures = decoder.config.hidden_size, (2, 3), [1, 0, 1]
    height, width = size

    def maps(count: int, share: int, scale: int) -> Tensor:
        return torch.randn(count, channels // share, scale * height, scale * width, dtype=torch.double)

    embedding, positions, sparse = maps(2, 1, 1), maps(1, 1, 1), torch.randn(3, 3, channels, dtype=torch.double)
    fine = [maps(2, 8, 4), maps(2, 4, 2)]
    decoder.dynamic_multimask_via_stability = False
    same = True
    for multimask in (True, False):
        found = best_masks(decoder, embedding, positions, sparse, fine, pictures, multimask=multimask)
        masks, scores = decoder(
            image_embeddings=embedding[pictures],
            image_positional_embeddings=positions.expand(3, -1, -1, -1),
            sparse_prompt_embeddings=sparse[:, None],
            dense_prompt_embeddings=torch.zeros_like(embedding[pictures]),
            multimask_output=multimask,
            high_resolution_features=[part[pictures] for part in fine],
        )[:2]
        rows, best = torch.arange(3), scores[:, 0].argmax(-1)
        expected = masks[rows, 0, best], scores[rows, 0, best]
        same &= all(torch.allclose(*pair, rtol=1e-8, atol=1e-8) for pair in zip(found, expected, strict=True))
    return same
