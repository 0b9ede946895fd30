"""The table behind the relative position bias of the V2 family, a small MLP of every distance, and its gradient.

Shapes stand at the end of the line: t is rows of the table (distances), u hidden units, h heads.
"""

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import INTERPRETED, Launch, acc_type, dtypes_of, remembered
from .settings import target_arch

_BLOCK_T, _BLOCK_U = 16, 64
# In the backward programs share out the units, and each walks over all rows. In the interpreter a program costs the
# same whatever its size.
_BACKWARD_BLOCK_T, _BACKWARD_BLOCK_U = (64, 512) if INTERPRETED else (64, 16)


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
    y, x = load_coordinates(coordinates_ptr, rows, WINDOW_H, WINDOW_W, OF_PAIRS, ACC)
    table = tl.zeros([BLOCK_T, BLOCK_H], dtype=ACC)  # t h
    for start in range(0, hidden, BLOCK_U):
        units = start + tl.arange(0, BLOCK_U)  # u
        weight_y, weight_x, bias1 = load_units(weight1_ptr, bias1_ptr, units, hidden, ACC)
        active = active_units(y, x, weight_y, weight_x, bias1)  # t u
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


@triton.jit
def continuous_position_table_backward_kernel(
    dtable_ptr, coordinates_ptr, weight1_ptr, bias1_ptr, weight2_ptr, table_ptr,
    dweight1_ptr, dbias1_ptr, dweight2_ptr, dbias2_ptr, hidden, num_heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr, HAS_BIAS2: tl.constexpr, OF_PAIRS: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of both weights and biases. Grid: (cdiv(hidden, BLOCK_U), cdiv(num_heads, BLOCK_H)).

    A program takes dweight2 of its heads and units; one for each block of units takes dweight1 and dbias1, to which
    all heads contribute, and one for each block of heads dbias2.
    """
    ROWS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    units = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)  # u
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # h
    weight_y, weight_x, bias1 = load_units(weight1_ptr, bias1_ptr, units, hidden, ACC)
    dweight_y = tl.zeros([BLOCK_U], dtype=ACC)  # u
    dweight_x = tl.zeros([BLOCK_U], dtype=ACC)  # u
    dbias1 = tl.zeros([BLOCK_U], dtype=ACC)  # u
    dweight2 = tl.zeros([BLOCK_H, BLOCK_U], dtype=ACC)  # h u
    dbias2 = tl.zeros([BLOCK_H], dtype=ACC)  # h
    for start in range(0, ROWS, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)  # t
        y, x = load_coordinates(coordinates_ptr, rows, WINDOW_H, WINDOW_W, OF_PAIRS, ACC)
        active = active_units(y, x, weight_y, weight_x, bias1)  # t u
        dlogits = load_dlogits(dtable_ptr, table_ptr, rows, heads, num_heads, ROWS, BOUNDED, ACC)  # t h
        dweight2 += tl.dot(tl.trans(dlogits), active, input_precision="ieee", out_dtype=ACC)
        dbias2 += tl.sum(dlogits, axis=0)
        if tl.program_id(1) == 0:
            dactive = tl.zeros([BLOCK_T, BLOCK_U], dtype=ACC)  # t u
            for first in range(0, num_heads, BLOCK_H):
                each = first + tl.arange(0, BLOCK_H)  # h
                dlogits = load_dlogits(dtable_ptr, table_ptr, rows, each, num_heads, ROWS, BOUNDED, ACC)  # t h
                inside = (each < num_heads)[:, None] & (units < hidden)[None, :]  # h u
                weight2 = tl.load(weight2_ptr + each[:, None] * hidden + units[None, :], mask=inside, other=0.0)  # h u
                dactive += tl.dot(dlogits, weight2.to(ACC), input_precision="ieee", out_dtype=ACC)
            dactive = tl.where(active <= 0.0, 0.0, dactive)  # t u
            dweight_y += tl.sum(dactive * y[:, None], axis=0)
            dweight_x += tl.sum(dactive * x[:, None], axis=0)
            dbias1 += tl.sum(dactive, axis=0)

    inside = (heads < num_heads)[:, None] & (units < hidden)[None, :]  # h u
    offsets = heads[:, None] * hidden + units[None, :]  # h u
    tl.store(dweight2_ptr + offsets, dweight2.to(dweight2_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        DWEIGHT1: tl.constexpr = dweight1_ptr.dtype.element_ty
        tl.store(dweight1_ptr + 2 * units, dweight_y.to(DWEIGHT1), mask=units < hidden)
        tl.store(dweight1_ptr + 2 * units + 1, dweight_x.to(DWEIGHT1), mask=units < hidden)
        tl.store(dbias1_ptr + units, dbias1.to(dbias1_ptr.dtype.element_ty), mask=units < hidden)
    if HAS_BIAS2:
        if tl.program_id(0) == 0:
            tl.store(dbias2_ptr + heads, dbias2.to(dbias2_ptr.dtype.element_ty), mask=heads < num_heads)


@triton.jit
def load_coordinates(
    coordinates_ptr, rows, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, OF_PAIRS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(y, x) of the `rows` of the table: [t] each. See `continuous_position_table_kernel` for those `OF_PAIRS`."""
    ROWS: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    places = rows  # t
    if OF_PAIRS:
        dy = rows // (2 * WINDOW_W - 1) - (WINDOW_H - 1)  # t
        dx = rows % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
        query = tl.maximum(dy, 0) * WINDOW_W + tl.maximum(dx, 0)
        key = tl.maximum(-dy, 0) * WINDOW_W + tl.maximum(-dx, 0)
        places = query * (WINDOW_H * WINDOW_W) + key
    y = tl.load(coordinates_ptr + 2 * places, mask=rows < ROWS, other=0.0).to(ACC)  # t
    return y, tl.load(coordinates_ptr + 2 * places + 1, mask=rows < ROWS, other=0.0).to(ACC)


@triton.jit
def load_units(weight1_ptr, bias1_ptr, units, hidden, ACC: tl.constexpr):
    """The weights of y and x and the bias of the hidden `units`: [u] each."""
    weight_y = tl.load(weight1_ptr + 2 * units, mask=units < hidden, other=0.0).to(ACC)  # u
    weight_x = tl.load(weight1_ptr + 2 * units + 1, mask=units < hidden, other=0.0).to(ACC)  # u
    return weight_y, weight_x, tl.load(bias1_ptr + units, mask=units < hidden, other=0.0).to(ACC)


@triton.jit
def active_units(y, x, weight_y, weight_x, bias1):
    """The hidden units of some rows: [t, u]."""
    active = y[:, None] * weight_y[None, :] + x[:, None] * weight_x[None, :] + bias1[None, :]  # t u
    return tl.maximum(active, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_dlogits(
    dtable_ptr, table_ptr, rows, heads, num_heads, ROWS: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gradient of what the MLP says [t, h], from that of the table and, where it is bounded, the table."""
    inside = (rows < ROWS)[:, None] & (heads < num_heads)[None, :]  # t h
    offsets = rows[:, None] * num_heads + heads[None, :]  # t h
    dlogits = tl.load(dtable_ptr + offsets, mask=inside, other=0.0).to(ACC)
    if BOUNDED:  # the derivative of 16 * sigmoid is table * (1 - table / 16)
        table = tl.load(table_ptr + offsets, mask=inside, other=0.0)
        dlogits *= table * (1.0 - table / 16.0)
    return dlogits  # t h


def launch_continuous_position_table(coordinates, weight1, bias1, weight2, bias2, table, window_size, bounded) -> None:
    """Fill `table` [(2 * Wh - 1) * (2 * Ww - 1), num_heads]; all tensors are contiguous.

    `coordinates` [rows of the table, 2], or [N * N, 2] for every pair of tokens; `weight1` [hidden, 2], `bias1`
    [hidden], `weight2` [num_heads, hidden], `bias2` [num_heads] or None.
    """
    dtypes = dtypes_of(coordinates, weight1, bias1, weight2, bias2, table)
    of_pairs = coordinates.shape[0] != table.shape[0]
    launch = _continuous_position_table(tuple(weight2.shape), window_size, of_pairs, bounded, dtypes, table.device)
    launch(coordinates, weight1, bias1, weight2, weight2 if bias2 is None else bias2, table)


def launch_continuous_position_table_backward(
    dtable, coordinates, weight1, bias1, weight2, table, grads, window_size, bounded
) -> None:
    """Fill `grads`, those of `weight1`, `bias1`, `weight2` and, where there is one, `bias2`; all are contiguous.

    `table` is what the forward makes without rounding, and is read only where it is `bounded`.
    """
    *three, dbias2 = grads
    dtypes = dtypes_of(dtable, coordinates, weight1, bias1, weight2, table, *grads)
    of_pairs = coordinates.shape[0] != dtable.shape[0]
    launch = _continuous_position_table_backward(
        tuple(weight2.shape), window_size, of_pairs, bounded, dtypes, dtable.device
    )
    launch(dtable, coordinates, weight1, bias1, weight2, table, *three, weight2 if dbias2 is None else dbias2)


@remembered
def _continuous_position_table(
    weight2_shape: tuple[int, int], window_size: tuple[int, int], of_pairs: bool, bounded: bool, dtypes: tuple, device
) -> Launch:  # fmt: skip
    _, weight1, _, _, bias2, _ = dtypes
    arguments = _arguments(weight2_shape, window_size, of_pairs, bounded, weight1, bias2)
    arguments |= dict(BLOCK_T=_BLOCK_T, BLOCK_U=_BLOCK_U)
    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    grid = cdiv(rows, _BLOCK_T), cdiv(weight2_shape[0], arguments["BLOCK_H"]), 1
    return Launch(continuous_position_table_kernel, grid, arguments)


@remembered
def _continuous_position_table_backward(
    weight2_shape: tuple[int, int], window_size: tuple[int, int], of_pairs: bool, bounded: bool, dtypes: tuple, device
) -> Launch:  # fmt: skip
    arguments = _arguments(weight2_shape, window_size, of_pairs, bounded, dtypes[2], dtypes[-1])
    arguments |= dict(BLOCK_T=_BACKWARD_BLOCK_T, BLOCK_U=_BACKWARD_BLOCK_U)
    if target_arch(device) in (86, 89, 100):  # left alone, the compiler spills two registers there
        arguments["maxnreg"] = 255
    grid = cdiv(weight2_shape[1], _BACKWARD_BLOCK_U), cdiv(weight2_shape[0], arguments["BLOCK_H"]), 1
    return Launch(continuous_position_table_backward_kernel, grid, arguments)


def _arguments(
    weight2_shape: tuple[int, int], window_size: tuple[int, int], of_pairs: bool, bounded: bool,
    weight1: torch.dtype, bias2: torch.dtype | None,
) -> dict:  # fmt: skip
    """Those that both kernels have."""
    num_heads, hidden = weight2_shape
    return dict(
        hidden=hidden, num_heads=num_heads, WINDOW_H=window_size[0], WINDOW_W=window_size[1],
        BLOCK_H=max(16, min(64, triton.next_power_of_2(num_heads))), HAS_BIAS2=bias2 is not None, OF_PAIRS=of_pairs,
        BOUNDED=bounded, ACC=acc_type(torch.promote_types(weight1, torch.float32)), num_warps=4,
    )  # fmt: skip
