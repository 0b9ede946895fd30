"""The bias in the order in which tensor cores hold an accumulator, for the kernels that walk over tiles of it.

Such a kernel starts every product q @ k^T from another tile of the bias: divided by the scale, which multiplies both
afterwards, it costs no instruction. Lanes of a warp hold the accumulator in fragments of 16 x 8, four elements each:
two side by side, and the two eight rows below. A bias in rows would reach them through shared memory, or in reads of
eight cache lines at a time. Here a fragment is 128 elements in a row, which a warp reads at once and each lane has what
it needs; the fragments of four warps lie side by side. Past the window's end there are rows of 0, which nobody needs,
and columns of -inf, so that no mask is left to apply.
"""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import Launch, acc_type, dtype_of, remembered
from .scale import load_scale

_BLOCK = 2048  # elements a program writes
STRIP = 64  # rows: what four warps hold of an accumulator


@triton.jit
def bias_fragments_kernel(
    bias_ptr, logit_scale_ptr, fragments_ptr, N, scale,
    EXTENT: tl.constexpr, BLOCK: tl.constexpr, COSINE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid: (num_heads * cdiv(EXTENT * EXTENT, BLOCK),)."""
    blocks: tl.constexpr = tl.cdiv(EXTENT * EXTENT, BLOCK)  # of a head
    head = (tl.program_id(0) // blocks).to(tl.int64)
    places = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    strip, warp, lane, element = places // 512, places // 128 % 4, places // 4 % 32, places % 4
    rows = strip // (EXTENT // 8) * 64 + warp * 16 + element // 2 * 8 + lane // 4
    cols = strip % (EXTENT // 8) * 8 + lane % 4 * 2 + element % 2
    in_window = (rows < N) & (cols < N)
    tile = tl.load(bias_ptr + head * N * N + rows * N + cols, mask=in_window, other=0.0).to(ACC)
    tile = tl.where(cols < N, tile, float("-inf")) / load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    tl.store(fragments_ptr + head * EXTENT * EXTENT + places, tile, mask=places < EXTENT * EXTENT)


@triton.jit
def load_bias_fragments(
    fragments_ptr, row, col, EXTENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The tile that starts at (`row`, `col`) of one head's bias, divided by the scale: [m, n]."""
    ROWS: tl.constexpr = 64 if BLOCK_M > 64 else BLOCK_M  # of a strip
    fragments_ptr += row // 64 * 64 * EXTENT + row % 64 * 8 + col * 64
    offsets = (
        tl.arange(0, BLOCK_M // ROWS)[:, None, None] * (64 * EXTENT)
        + tl.arange(0, BLOCK_N // 8)[None, :, None] * 512
        + tl.arange(0, ROWS * 8)[None, None, :]
    )
    tile = tl.load(fragments_ptr + offsets, eviction_policy="evict_last")
    tile = tl.reshape(tile, (BLOCK_M // ROWS, BLOCK_N // 8, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(tile, (0, 2, 5, 3, 1, 4, 6)), (BLOCK_M, BLOCK_N))


def launch_bias_fragments(
    bias: torch.Tensor, scale: float, logit_scale: torch.Tensor | None, acc_dtype: torch.dtype, extent: int
) -> torch.Tensor:
    """`bias` [num_heads, N, N], divided by the scale, in fragments [num_heads, extent / 64, extent / 8, 4, 128].

    `bias` and `logit_scale` are contiguous; `extent` is a multiple of `STRIP` and at least N.
    """
    num_heads, N, _ = bias.shape
    fragments = bias.new_empty(num_heads, extent // STRIP, extent // 8, 4, 128, dtype=acc_dtype)
    launch = _bias_fragments(num_heads, N, extent, scale, bias.dtype, dtype_of(logit_scale), acc_dtype, bias.device)
    launch(bias, bias if logit_scale is None else logit_scale, fragments)
    return fragments


@remembered
def _bias_fragments(num_heads, N, extent, scale, dtype, logit_scale_dtype, acc_dtype, device) -> Launch:
    arguments = dict(
        N=N, scale=scale, EXTENT=extent, BLOCK=_BLOCK, COSINE=logit_scale_dtype is not None, ACC=acc_type(acc_dtype),
        num_warps=4,
    )  # fmt: skip
    return Launch(bias_fragments_kernel, (num_heads * cdiv(extent * extent, _BLOCK), 1, 1), arguments)
