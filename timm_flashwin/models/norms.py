"""The norms of a block, and the residual adds beside them, in one pass each."""

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from .. import ops
from .dispatch import is_hooked, takes_map

_LAYER_NORMS = (nn.LayerNorm, LayerNorm)


def fuses_norms(block: nn.Module, x: Tensor) -> bool:
    """Whether the kernels take the norms of `block` for the map `x`: where they take its attention, in eager code, and
    its norms and stochastic depth are timm's. What a compiler sees it fuses by itself, and better.
    """
    return (
        not torch.compiler.is_compiling()
        and takes_map(block.attn, x)
        and _is_plain_norm(block.norm1)
        and _is_plain_norm(block.norm2)
        and type(block.drop_path1) in (DropPath, nn.Identity)
        and not is_hooked(block.drop_path1)
    )


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm(x)` in the dtype in which a Linear takes it: autocast's, or that of `x`."""
    return ops.add_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps, _linear_dtype(x))[1]


def add_layer_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor, drop_path: nn.Module) -> tuple[Tensor, Tensor]:
    """`total = x + drop_path(y)` and `norm(total)`, the latter in the dtype in which a Linear takes it."""
    y_scale = None
    if isinstance(drop_path, DropPath) and drop_path.training and drop_path.drop_prob > 0.0:
        y_scale = drop_path(y.new_ones(y.shape[0]))  # B: what it would multiply the samples of y by
    return ops.add_layer_norm(x, y, y_scale, norm.weight, norm.bias, norm.eps, _linear_dtype(x))


def _is_plain_norm(norm: nn.Module) -> bool:
    return (
        type(norm) in _LAYER_NORMS
        and norm.weight is not None
        and norm.bias is not None
        and not getattr(norm, "_fast_norm", False)  # which rounds before it normalises
        and not is_hooked(norm)
    )


def _linear_dtype(x: Tensor) -> torch.dtype:
    return ops.autocast_dtype(x.device.type) or x.dtype
