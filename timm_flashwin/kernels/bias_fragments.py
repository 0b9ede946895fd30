"""The bias in the order in which tensor cores hold an accumulator, for the kernels that walk over tiles of it.

Such a kernel adds another tile of the bias to every product. Lanes of a warp hold that product in fragments of 16 x 8,
four elements each: two side by side, and the two eight rows below. A bias in rows would reach them through shared
memory, or in reads of eight cache lines at a time. Here a fragment is 128 elements in a row, which a warp reads at
once and each lane has what it needs. Past the window's end there are rows of 0, which nobody needs, and columns of
-inf, so that no mask is left to apply.
"""

import torch
import triton
import triton.language as tl

FRAGMENT = tl.constexpr(128)  # elements
_BLOCK = 2048  # elements a program writes


@triton.jit
def bias_fragments_kernel(bias_ptr, fragments_ptr, N, EXTENT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (cdiv(EXTENT * EXTENT, BLOCK), num_heads)."""
    head = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fragment, lane, element = places // 128, places // 4 % 32, places % 4
    rows = fragment // (EXTENT // 8) * 16 + element // 2 * 8 + lane // 4
    cols = fragment % (EXTENT // 8) * 8 + lane % 4 * 2 + element % 2
    in_window = (rows < N) & (cols < N)
    tile = tl.load(bias_ptr + head * N * N + rows * N + cols, mask=in_window, other=0.0)
    tile = tl.where(cols < N, tile, float("-inf"))
    tl.store(fragments_ptr + head * EXTENT * EXTENT + places, tile, mask=places < EXTENT * EXTENT)


@triton.jit
def load_bias_fragments(
    fragments_ptr, head, row, col, EXTENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The tile that starts at (`row`, `col`) of a head's bias: [m, n]."""
    fragments_ptr += head.to(tl.int64) * EXTENT * EXTENT + row * EXTENT + col * 16
    # Warps are dealt out over the first axis, as they are over the rows of a product.
    offsets = (
        tl.arange(0, BLOCK_M // 16)[:, None, None] * (16 * EXTENT)
        + tl.arange(0, BLOCK_N // 8)[None, :, None] * 128
        + tl.arange(0, 128)[None, None, :]
    )
    tile = tl.load(fragments_ptr + offsets, eviction_policy="evict_last")
    tile = tl.reshape(tile, (BLOCK_M // 16, BLOCK_N // 8, 8, 4, 2, 2))
    return tl.reshape(tl.permute(tile, (0, 4, 2, 1, 3, 5)), (BLOCK_M, BLOCK_N))


def launch_bias_fragments(bias: torch.Tensor, extent: int) -> torch.Tensor:
    """`bias` [num_heads, N, N] in fragments, [num_heads, extent / 16, extent / 8, 128]; `extent` is a multiple of 16."""
    num_heads, N, _ = bias.shape
    fragments = torch.empty(
        num_heads, extent // 16, extent // 8, 128,
        dtype=torch.promote_types(bias.dtype, torch.float32), device=bias.device,
    )  # fmt: skip
    grid = triton.cdiv(extent * extent, _BLOCK), num_heads
    bias_fragments_kernel[grid](bias.contiguous(), fragments, N, EXTENT=extent, BLOCK=_BLOCK, num_warps=4)
    return fragments
