"""The backward of the exact GELU, x * Phi(x), together with its output: what is not kept is made where it is needed."""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import Launch, acc_type, remembered

_BLOCK = 2048  # elements of a program
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)


@triton.jit
def gelu_backward_kernel(dout_ptr, x_ptr, dx_ptr, out_ptr, numel, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Grid: (cdiv(numel, BLOCK),)."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # m
    inside = places < numel  # m
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(ACC)  # m
    dout = tl.load(dout_ptr + places, mask=inside, other=0.0).to(ACC)  # m
    below = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))  # m, Phi(x)
    density = _DENSITY_AT_0 * tl.exp(-0.5 * x * x)  # m
    tl.store(dx_ptr + places, (dout * (below + x * density)).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + places, (x * below).to(out_ptr.dtype.element_ty), mask=inside)


def launch_gelu_backward(dout: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `dx` and `out`, the GELU of `x`; all contiguous, of one shape and dtype."""
    _gelu_backward(x.numel(), x.dtype, x.device)(dout, x, dx, out)


@remembered
def _gelu_backward(numel: int, dtype: torch.dtype, device: torch.device) -> Launch:
    arguments = dict(numel=numel, BLOCK=_BLOCK, ACC=acc_type(dtype), num_warps=4)
    return Launch(gelu_backward_kernel, (cdiv(numel, _BLOCK), 1, 1), arguments)
