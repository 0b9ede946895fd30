"""The relative position bias [num_heads, N, N] of a window from its table, and the table's gradient: a launch each.

Which row of the table a pair of tokens takes follows from their coordinates (geometry.relative_position_index); there
is no index tensor to read. Shapes stand at the end of the line, as in primitives.py.
"""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import Launch, acc_type, remembered

_TILE = 2048  # elements a program has in flight: 16 a thread, and several such programs fill a multiprocessor
_MAX_BLOCK_HEADS = 32


@triton.jit
def table_rows(i, j, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """geometry.relative_position_index of the queries `i` and the keys `j` of a window, which broadcast."""
    dy = i // WINDOW_W - j // WINDOW_W
    dx = i % WINDOW_W - j % WINDOW_W
    return (dy + WINDOW_H - 1) * (2 * WINDOW_W - 1) + dx + WINDOW_W - 1


@triton.jit
def relative_position_bias_kernel(
    table_ptr, bias_ptr, num_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """bias[h, i, j] = table[index(i, j), h] for a block of pairs of tokens and a block of heads.

    The table has the heads of a pair side by side, and the bias the pairs of a head: a program that holds some of both
    reads and writes whole lines, and turns the tile around in between.
    """
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    pairs = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)  # p, i * N + j
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)  # h
    rows = table_rows(pairs // WINDOW_AREA, pairs % WINDOW_AREA, WINDOW_H, WINDOW_W)  # p
    inside = (pairs < WINDOW_AREA * WINDOW_AREA)[:, None] & (heads < num_heads)[None, :]  # p h
    tile = tl.load(table_ptr + rows[:, None] * num_heads + heads[None, :], mask=inside)  # p h
    # 64 bits: the bias of many heads can be longer than 2**31.
    offsets = heads.to(tl.int64)[None, :] * (WINDOW_AREA * WINDOW_AREA) + pairs[:, None]  # p h
    tl.store(bias_ptr + offsets, tile, mask=inside)


@triton.jit
def relative_position_bias_backward_kernel(
    dbias_ptr, dtable_ptr, num_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The 2 * Ww - 1 rows of the table's gradient that belong to one distance dy, for one head.

    To these belong the pairs of tokens i and j = i - (dy, dx). A program walks over the i that have such a j and reads
    the row of keys each of them has at distance dy, which lies together, sheared by i's column: tile column n is the
    key at xj = xi + n - (Ww - 1), so that its pairs are all at one dx, and lanes without a key read nothing. Every
    element of dbias is read once, and summed in an order that is always the same.
    """
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0)
    dy = tl.program_id(1) - (WINDOW_H - 1)
    first = tl.maximum(dy, 0) * WINDOW_W
    end = (WINDOW_H + tl.minimum(dy, 0)) * WINDOW_W
    dbias_ptr += head.to(tl.int64) * (WINDOW_AREA * WINDOW_AREA)  # 64 bits as in the forward
    columns = tl.arange(0, BLOCK_N)  # n, Ww - 1 - dx
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)  # m n
    for start in range(first, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)  # m
        xi = i % WINDOW_W  # m
        xj = (xi - (WINDOW_W - 1))[:, None] + columns[None, :]  # m n
        key_rows = i - xi - dy * WINDOW_W  # m, the token each row of keys begins with
        inside = (i < end)[:, None] & (xj >= 0) & (xj < WINDOW_W)  # m n
        sums += tl.load(dbias_ptr + (i * WINDOW_AREA + key_rows)[:, None] + xj, mask=inside, other=0.0).to(ACC)

    rows = tl.program_id(1) * (2 * WINDOW_W - 1) + 2 * (WINDOW_W - 1) - columns  # n, of the table
    dtable = tl.sum(sums, axis=0).to(dtable_ptr.dtype.element_ty)  # n
    tl.store(dtable_ptr + rows * num_heads + head, dtable, mask=columns < 2 * WINDOW_W - 1)


def launch_relative_position_bias(table: torch.Tensor, bias: torch.Tensor, window_size: tuple[int, int]) -> None:
    """Fill `bias` [num_heads, N, N] from `table` [(2 * Wh - 1) * (2 * Ww - 1), num_heads]; both are contiguous."""
    _relative_position_bias(bias.shape[0], window_size, table.dtype, table.device)(table, bias)


@remembered
def _relative_position_bias(num_heads: int, window_size: tuple[int, int], dtype, device) -> Launch:
    N = window_size[0] * window_size[1]
    block_heads = min(triton.next_power_of_2(num_heads), _MAX_BLOCK_HEADS)
    block_pairs = _TILE // block_heads
    grid = cdiv(N * N, block_pairs), cdiv(num_heads, block_heads), 1
    arguments = dict(
        num_heads=num_heads, WINDOW_H=window_size[0], WINDOW_W=window_size[1],
        BLOCK_PAIRS=block_pairs, BLOCK_HEADS=block_heads, num_warps=4,
    )  # fmt: skip
    return Launch(relative_position_bias_kernel, grid, arguments)


def launch_relative_position_bias_backward(
    dbias: torch.Tensor, dtable: torch.Tensor, window_size: tuple[int, int]
) -> None:
    """Fill `dtable` [(2 * Wh - 1) * (2 * Ww - 1), num_heads] from `dbias` [num_heads, N, N]; both are contiguous."""
    _relative_position_bias_backward(dbias.shape[0], window_size, dbias.dtype, dbias.device)(dbias, dtable)


@remembered
def _relative_position_bias_backward(num_heads: int, window_size: tuple[int, int], dtype, device) -> Launch:
    block_n = triton.next_power_of_2(2 * window_size[1] - 1)
    block_m = min(triton.next_power_of_2(window_size[0] * window_size[1]), max(1, _TILE // block_n))
    arguments = dict(
        num_heads=num_heads, WINDOW_H=window_size[0], WINDOW_W=window_size[1],
        BLOCK_M=block_m, BLOCK_N=block_n, ACC=acc_type(dtype), num_warps=4,
    )  # fmt: skip
    return Launch(relative_position_bias_backward_kernel, (num_heads, 2 * window_size[0] - 1, 1), arguments)
