"""The norms of a block, and the residual adds beside them, in one pass each."""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from .. import ops
from ..functional import kernels_serve
from .dispatch import is_untouched, takes_map
from .mlp import mlp

_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def fuses_norms(block: nn.Module, x: Tensor) -> bool:
    """Whether the kernels take the norms of `block` for the map `x`.

    They do where they take its attention, in eager code without transforms, and where its norms and stochastic depth
    are timm's. What a compiler sees it fuses by itself, and better.
    """
    attention, norms, drop_paths = block.attn, (block.norm1, block.norm2), (block.drop_path1, block.drop_path2)
    return (
        not torch.compiler.is_compiling()
        and takes_map(attention, x)
        and (
            attention.impl == "auto"
            or kernels_serve(attention.impl, x.device, ops.compute_dtype(x), attention.head_dim, attention.num_tokens)
        )
        and all([_is_plain_norm(norm, x.shape[-1]) for norm in norms])
        and all([type(drop_path) in (DropPath, nn.Identity) for drop_path in drop_paths])
        and is_untouched(*norms, *drop_paths)
    )


def layer_norm(norm: nn.LayerNorm, x: Tensor, into_linear: bool) -> Tensor:
    """`norm(x)`; see `handed_on` for its dtype."""
    return ops.add_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps, handed_on(x, into_linear))[1]


def add_layer_norm(
    norm: nn.LayerNorm, x: Tensor, y: Tensor, drop_path: nn.Module, into_linear: bool
) -> tuple[Tensor, Tensor]:
    """`total = x + drop_path(y)` and `norm(total)`; see `handed_on` for the dtype of the latter."""
    scale = sample_scale(drop_path, y, y.dtype)
    return ops.add_layer_norm(x, y, scale, norm.weight, norm.bias, norm.eps, handed_on(x, into_linear))


def handed_on(x: Tensor, into_linear: bool) -> torch.dtype:
    """The dtype in which a norm of `x` hands it on: autocast's, in which a Linear takes it, or that of `x`. What else
    may come next, under an autocast of its own, gets what timm's norm gives: float32 under autocast."""
    if into_linear or ops.autocast_dtype(x.device.type) is None:
        return ops.compute_dtype(x)
    return torch.promote_types(x.dtype, torch.float32)


def layer_norm_add(norm: nn.LayerNorm, x: Tensor, y: Tensor, drop_path: nn.Module) -> Tensor:
    """`x + drop_path(norm(y))`."""
    dtype = handed_on(y, into_linear=False)
    return ops.layer_norm_add(x, y, sample_scale(drop_path, y, dtype), norm.weight, norm.bias, norm.eps, dtype)


def post_norm_branches(block: nn.Module, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Both branches of a block of V2 or V2-CR, whose attention is `attend`: from the map [B, H, W, C] to tokens."""
    x = layer_norm_add(block.norm1, x, attend(x), block.drop_path1)
    tokens = x.flatten(1, 2)  # B, H * W, C
    return layer_norm_add(block.norm2, tokens, mlp(block.mlp, tokens), block.drop_path2)


def sample_scale(drop_path: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What `drop_path` would multiply the samples of `y` in `dtype` by, drawn as it draws: [B], or None for nothing."""
    if isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob > 0.0:
        return drop_path(y.new_ones(y.shape[0], dtype=dtype))
    return None


def _is_plain_norm(norm: nn.Module, channels: int) -> bool:
    return (
        type(norm) in _LAYER_NORMS
        and norm.normalized_shape == (channels,)
        and norm.weight is not None
        and norm.bias is not None
        and not getattr(norm, "_fast_norm", False)  # which rounds before it normalises
    )
