"""The table behind the relative position bias of the V2 family: a small MLP of every distance, in one launch.

Shapes stand at the end of the line: t is rows of the table (distances), u hidden units, h heads.
"""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import Launch, acc_type, dtype_of, remembered

_BLOCK_T, _BLOCK_U = 16, 64


@triton.jit
def continuous_position_table_kernel(
    coordinates_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, table_ptr, hidden, num_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_BIAS2: tl.constexpr, OF_PAIRS: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """table[t, h] = relu(coordinates[t] @ weight1^T + bias1) @ weight2^T + bias2, `BOUNDED` to 16 * sigmoid of that.

    Grid: (cdiv(rows of the table, BLOCK_T), cdiv(num_heads, BLOCK_H)). Coordinates `OF_PAIRS` are those of every pair
    of tokens: a row takes the pair in which one token is at the window's edge, along either axis.
    """
    ROWS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # t
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # h
    places = rows
    if OF_PAIRS:
        dy = rows // (2 * WINDOW_W - 1) - (WINDOW_H - 1)  # t
        dx = rows % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
        query = tl.maximum(dy, 0) * WINDOW_W + tl.maximum(dx, 0)
        key = tl.maximum(-dy, 0) * WINDOW_W + tl.maximum(-dx, 0)
        places = query * (WINDOW_H * WINDOW_W) + key
    y = tl.load(coordinates_ptr + 2 * places, mask=rows < ROWS, other=0.0).to(ACC)  # t
    x = tl.load(coordinates_ptr + 2 * places + 1, mask=rows < ROWS, other=0.0).to(ACC)  # t

    table = tl.zeros([BLOCK_T, BLOCK_H], dtype=ACC)  # t h
    for start in range(0, hidden, BLOCK_U):
        units = start + tl.arange(0, BLOCK_U)  # u
        weight_y = tl.load(weight1_ptr + 2 * units, mask=units < hidden, other=0.0).to(ACC)  # u
        weight_x = tl.load(weight1_ptr + 2 * units + 1, mask=units < hidden, other=0.0).to(ACC)  # u
        bias1 = tl.load(bias1_ptr + units, mask=units < hidden, other=0.0).to(ACC)  # u
        active = y[:, None] * weight_y[None, :] + x[:, None] * weight_x[None, :] + bias1[None, :]  # t u
        active = tl.maximum(active, 0.0, propagate_nan=tl.PropagateNan.ALL)
        inside = (heads < num_heads)[:, None] & (units < hidden)[None, :]  # h u
        weight2 = tl.load(weight2_ptr + heads[:, None] * hidden + units[None, :], mask=inside, other=0.0)  # h u
        table += tl.dot(active, tl.trans(weight2.to(ACC)), input_precision="ieee", out_dtype=ACC)
    if HAS_BIAS2:
        table += tl.load(bias2_ptr + heads, mask=heads < num_heads, other=0.0).to(ACC)[None, :]
    if BOUNDED:
        table = 16.0 / (1.0 + tl.exp(-table))
    inside = (rows < ROWS)[:, None] & (heads < num_heads)[None, :]  # t h
    offsets = rows[:, None] * num_heads + heads[None, :]
    tl.store(table_ptr + offsets, table.to(table_ptr.dtype.element_ty), mask=inside)


def launch_continuous_position_table(coordinates, weight1, bias1, weight2, bias2, table, window_size, bounded) -> None:
    """Fill `table` [(2 * Wh - 1) * (2 * Ww - 1), num_heads]; all tensors are contiguous.

    `coordinates` [rows of the table, 2], or [N * N, 2] for every pair of tokens; `weight1` [hidden, 2], `bias1`
    [hidden], `weight2` [num_heads, hidden], `bias2` [num_heads] or None.
    """
    dtypes = tuple([dtype_of(t) for t in (coordinates, weight1, bias1, weight2, bias2, table)])
    of_pairs = coordinates.shape[0] != table.shape[0]
    launch = _continuous_position_table(tuple(weight2.shape), window_size, of_pairs, bounded, dtypes, table.device)
    launch(coordinates, weight1, bias1, weight2, weight2 if bias2 is None else bias2, table)


@remembered
def _continuous_position_table(
    weight2_shape: tuple[int, int], window_size: tuple[int, int], of_pairs: bool, bounded: bool, dtypes: tuple, device
) -> Launch:  # fmt: skip
    num_heads, hidden = weight2_shape
    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    block_h = max(16, min(64, triton.next_power_of_2(num_heads)))
    arguments = dict(
        hidden=hidden, num_heads=num_heads, WINDOW_H=window_size[0], WINDOW_W=window_size[1],
        BLOCK_T=_BLOCK_T, BLOCK_U=_BLOCK_U, BLOCK_H=block_h, HAS_BIAS2=dtypes[4] is not None, OF_PAIRS=of_pairs,
        BOUNDED=bounded, ACC=acc_type(torch.promote_types(dtypes[1], torch.float32)), num_warps=4,
    )  # fmt: skip
    return Launch(continuous_position_table_kernel, (cdiv(rows, _BLOCK_T), cdiv(num_heads, block_h), 1), arguments)
