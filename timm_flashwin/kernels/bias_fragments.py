"""The bias in the order in which tensor cores hold an accumulator, for the kernels that walk over tiles of it.

Such a kernel starts every product q @ k^T from another tile of the bias: divided by the scale, which multiplies both
afterwards, it costs no instruction. Lanes of a warp hold the accumulator in fragments of 16 x 8, four elements each:
two side by side, and the two eight rows below. A bias in rows would reach them through shared memory, or in reads of
eight cache lines at a time. Here a fragment is 128 elements in a row, which a warp reads at once and each lane has what
it needs; the fragments of four warps lie side by side. Past the window's end there are rows of 0, which nobody needs,
and columns of -inf, so that no mask is left to apply: that of the cyclic shift is added too, in four variants of the
bias, one for each way in which its cut may run through a window (`window_cut`).
"""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import INTERPRETED, Launch, acc_type
from .relative_position import table_rows
from .scale import load_scale
from .shift_mask import CUTS, MASK_VALUE, token_region

# Elements a program writes; in the interpreter a program costs the same whatever its size.
_BLOCK = 2**16 if INTERPRETED else 2048
STRIP = 64  # rows: what four warps hold of an accumulator


@triton.jit
def bias_fragments_kernel(
    bias_ptr, logit_scale_ptr, fragments_ptr, N, num_heads, scale, cut_row, cut_col,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, EXTENT: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_TABLE: tl.constexpr, COSINE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(EXTENT * EXTENT, BLOCK) * num_heads * cuts,). `IS_TABLE`: the bias is given by its table."""
    BLOCKS: tl.constexpr = tl.cdiv(EXTENT * EXTENT, BLOCK)  # of a head
    head, cut = tl.program_id(0) // BLOCKS % num_heads, tl.program_id(0) // BLOCKS // num_heads
    places = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    strip, warp, lane, element = places // 512, places // 128 % 4, places // 4 % 32, places % 4
    rows = strip // (EXTENT // 8) * 64 + warp * 16 + element // 2 * 8 + lane // 4
    cols = strip % (EXTENT // 8) * 8 + lane % 4 * 2 + element % 2
    tile = tl.zeros([BLOCK], dtype=ACC)
    if HAS_BIAS:
        in_window = (rows < N) & (cols < N)
        if IS_TABLE:
            addresses = bias_ptr + table_rows(rows, cols, WINDOW_H, WINDOW_W) * num_heads + head
        else:
            addresses = bias_ptr + head.to(tl.int64) * N * N + rows * N + cols
        tile += tl.load(addresses, mask=in_window, other=0.0).to(ACC)
    row_region = token_region(rows, cut, cut_row, cut_col, WINDOW_W)
    tile = tl.where(row_region != token_region(cols, cut, cut_row, cut_col, WINDOW_W), tile + MASK_VALUE, tile)
    tile = tl.where(cols < N, tile, float("-inf")) / load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    fragments_ptr += (cut * num_heads + head).to(tl.int64) * EXTENT * EXTENT
    tl.store(fragments_ptr + places, tile, mask=places < EXTENT * EXTENT)


@triton.jit
def fragments_of(fragments_ptr, cut, head, num_heads, EXTENT: tl.constexpr):
    """Where the fragments begin that a head takes in windows with this `cut`."""
    return fragments_ptr + (cut * num_heads + head).to(tl.int64) * EXTENT * EXTENT


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


def bias_fragments_launch(
    num_heads: int,
    window_size: tuple[int, int],
    cut: tuple[int, int] | None,
    scale: float,
    has_bias: bool,
    is_table: bool,
    cosine: bool,
    acc_dtype: torch.dtype,
    extent: int,
) -> tuple[Launch, tuple[int, ...]]:
    """(launch, shape of the fragments that it fills) for a bias [num_heads, N, N], its table, or 0 in the place of one.

    The launch takes the bias, the logit_scale, both contiguous, and the fragments, of `acc_dtype`. `extent` is a
    multiple of `STRIP` and at least N. `cut` is the row and the column before which the cyclic shift cuts a window
    (geometry.shift_cut); None means that there is no shift, and so no other variant than the bias itself.
    """
    cuts = 1 if cut is None else CUTS
    cut_row, cut_col = cut or (0, 0)
    arguments = dict(
        N=window_size[0] * window_size[1], num_heads=num_heads, scale=scale, cut_row=cut_row, cut_col=cut_col,
        WINDOW_H=window_size[0], WINDOW_W=window_size[1], EXTENT=extent, BLOCK=_BLOCK, HAS_BIAS=has_bias,
        IS_TABLE=is_table, COSINE=cosine, ACC=acc_type(acc_dtype), num_warps=4,
    )  # fmt: skip
    launch = Launch(bias_fragments_kernel, (cdiv(extent * extent, _BLOCK) * num_heads * cuts, 1, 1), arguments)
    return launch, (cuts, num_heads, extent // STRIP, extent // 8, 4, 128)
