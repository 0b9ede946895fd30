"""The MLP of the relative position bias of the V2 family: in one launch where its modules are timm's, untouched."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..functional import kernels_serve
from .dispatch import is_untouched


def mlp_table_source(
    attention: nn.Module,
    linear1: nn.Linear,
    linear2: nn.Linear,
    others: tuple,
    coordinates: Callable[[], Tensor],
    bounded: bool,
) -> Callable[[], Tensor] | None:
    """What makes the MLP's rows for every distance of two tokens of `attention`.

    Args:
        attention: The attention the MLP belongs to.
        linear1, linear2: Its two Linears, with a ReLU between them.
        others: The MLP itself and all that is in it beside the Linears, of the types that timm gives them.
        coordinates: A call for [rows of the table, 2], or those of every pair of tokens [N * N, 2].
        bounded: Whether 16 * sigmoid of the MLP is wanted.

    Returns:
        A call for the table [(2 * Wh - 1) * (2 * Ww - 1), num_heads] in the dtype in which a Linear returns it; None
        where the modules themselves have to be called: for a compiler, which fuses them by itself, and where somebody
        could tell that they are not.
    """
    weight = linear1.weight
    if torch.compiler.is_compiling() or not kernels_serve(
        attention.impl, weight.device, weight.dtype, None, attention.num_tokens
    ):
        return None
    linears, points = (linear1, linear2), coordinates()
    if any([type(linear) is not nn.Linear for linear in linears]) or linear1.bias is None or points.requires_grad:
        return None
    tensors = [x for x in (points, weight, linear1.bias, linear2.weight, linear2.bias) if x is not None]
    if not all([ops.is_plain(x) and x.device == weight.device for x in tensors]):  # quantised or sharded weights
        return None
    if not is_untouched(*linears, *others):
        return None
    dtype = ops.compute_dtype(weight)
    # The tensors as they are at the time of the call: they may be replaced.
    return lambda: ops.continuous_position_table(
        coordinates(), linear1.weight, linear1.bias, linear2.weight, linear2.bias, attention.window_size, bounded, dtype
    )
