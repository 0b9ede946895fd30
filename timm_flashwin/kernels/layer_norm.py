"""Layer normalisation with the residual add before it (Swin V1) or after it (V2): one pass over the rows, and one back.

PyTorch's own normalisation is far from the speed of memory at the widths of a Swin's blocks, takes a pass of its own
for the add, and under autocast others for casts. Mean and variance are taken in float32 (float64 for float64), twice
over the row in registers; the backward takes them once more, from what was normalised.

Shapes stand at the end of the line: m is rows (tokens) of a tile, c channels.
"""

import math

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import Launch, acc_type, dtypes_of, remembered
from .settings import multiprocessors_of

_TILE = 2048  # elements a program works on at a time: 16 a thread
_PROGRAMS_PER_SM = 8  # in the backward, each with a partial sum of the gradients of weight and bias


@triton.jit
def add_layer_norm_kernel(
    x_ptr, y_ptr, y_scale_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, rows, rows_per_sample, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_Y: tl.constexpr, HAS_Y_SCALE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, BLOCK_M),)."""
    row, inside, offsets = locate_rows(tl.program_id(0), rows, C, BLOCK_M, BLOCK_C)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
    if HAS_Y:
        y = tl.load(y_ptr + offsets, mask=inside, other=0.0)
        if HAS_Y_SCALE:
            y = scaled(y, y_scale_ptr, row, rows, rows_per_sample, ACC)
        # Rounded as if it had been stored and read again: what is normalised is the sum that the next block sees.
        total = (x + y.to(ACC)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, total, mask=inside)
        x = total.to(ACC)
    normed, _ = normalise(x, inside, eps, C)  # m c
    out = weighted(normed, weight_ptr, bias_ptr, C, BLOCK_C, ACC)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_add_kernel(
    x_ptr, y_ptr, y_scale_ptr, weight_ptr, bias_ptr, out_ptr, rows, rows_per_sample, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_Y_SCALE: tl.constexpr, NORMED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x + layer_norm(y), the latter rounded to `NORMED`. Grid: (cdiv(rows, BLOCK_M),)."""
    row, inside, offsets = locate_rows(tl.program_id(0), rows, C, BLOCK_M, BLOCK_C)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(ACC)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(ACC)
    normed, _ = normalise(y, inside, eps, C)
    normed = weighted(normed, weight_ptr, bias_ptr, C, BLOCK_C, ACC).to(NORMED)
    if HAS_Y_SCALE:
        normed = scaled(normed, y_scale_ptr, row, rows, rows_per_sample, ACC)
    tl.store(out_ptr + offsets, (x + normed.to(ACC)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward_kernel(
    dsum_ptr, dout_ptr, sum_ptr, y_scale_ptr, weight_ptr, dx_ptr, dy_ptr, dweight_ptr, dbias_ptr,
    rows, rows_per_sample, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_DSUM: tl.constexpr, HAS_Y: tl.constexpr, HAS_Y_SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient `dx` of the `sum` that was normalised, of both summands where there is a `y`, and of weight and
    bias. The scale of samples is that of `y`, or, without one, of what was made of the normalised rows.

    Grid: (programs,); each takes one tile of rows after the other, and leaves [C] of dweight and dbias.
    """
    channels = tl.arange(0, BLOCK_C)  # c
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(ACC)
    dweight = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)  # m c
    dbias = tl.zeros([BLOCK_M, BLOCK_C], dtype=ACC)  # m c
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row, inside, offsets = locate_rows(tile, rows, C, BLOCK_M, BLOCK_C)
        x = tl.load(sum_ptr + offsets, mask=inside, other=0.0).to(ACC)
        dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0)
        if HAS_Y_SCALE and not HAS_Y:
            dout = scaled(dout, y_scale_ptr, row, rows, rows_per_sample, ACC)
        dout = dout.to(ACC)
        normed, inverse_deviation = normalise(x, inside, eps, C)
        dweight += dout * normed
        dbias += dout
        dnormed = dout * weight[None, :]
        along = tl.sum(dnormed * normed, axis=1) / C  # m
        mean = tl.sum(dnormed, axis=1) / C  # m
        dx = (dnormed - mean[:, None] - normed * along[:, None]) * inverse_deviation[:, None]
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + offsets, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_Y:
            dy = dx.to(dy_ptr.dtype.element_ty)
            if HAS_Y_SCALE:
                dy = scaled(dy, y_scale_ptr, row, rows, rows_per_sample, ACC)
            tl.store(dy_ptr + offsets, dy, mask=inside)
    at = tl.program_id(0) * C + channels
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=channels < C)
    tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=channels < C)


@triton.jit
def locate_rows(tile, rows, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows of a tile [m], which elements there are [m, c], and their offsets [m, c]."""
    row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # m
    channels = tl.arange(0, BLOCK_C)  # c
    inside = (row < rows)[:, None] & (channels < C)[None, :]  # m c
    return row, inside, row[:, None] * C + channels[None, :]


@triton.jit
def weighted(normed, weight_ptr, bias_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """normed * weight + bias [m, c]."""
    channels = tl.arange(0, BLOCK_C)  # c
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(ACC)
    return normed * weight[None, :] + bias[None, :]


@triton.jit
def normalise(x, inside, eps, C: tl.constexpr):
    """The rows of `x` [m, c] with mean 0 and variance 1, and the inverse of the deviation they had: [m]."""
    mean = tl.sum(x, axis=1) / C  # m
    centred = tl.where(inside, x - mean[:, None], 0.0)  # m c
    inverse_deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)  # m
    return centred * inverse_deviation[:, None], inverse_deviation


@triton.jit
def scaled(y, y_scale_ptr, row, rows, rows_per_sample, ACC: tl.constexpr):
    """The rows of `y` [m, c] times the factor of the sample they belong to, rounded to the dtype of `y`."""
    factor = tl.load(y_scale_ptr + row // rows_per_sample, mask=row < rows, other=0.0).to(ACC)  # m
    return (y.to(ACC) * factor[:, None]).to(y.dtype)


_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def launch_add_layer_norm(x, y, y_scale, weight, bias, total, out, eps: float) -> None:
    """Fill `total` (x + y * y_scale, where there is a `y`) and `out`, its layer norm; all contiguous, [B, ..., C]."""
    dtypes = dtypes_of(x, y, y_scale, weight, bias, out)
    launch = _add_layer_norm(x.shape, eps, dtypes, x.device)
    launch(x, x if y is None else y, x if y_scale is None else y_scale, weight, bias, x if y is None else total, out)


@remembered
def _add_layer_norm(shape: torch.Size, eps: float, dtypes: tuple, device) -> Launch:
    x, y, y_scale, *_ = dtypes
    arguments, tiles = _arguments(shape, eps, x)
    arguments |= dict(HAS_Y=y is not None, HAS_Y_SCALE=y_scale is not None)
    return Launch(add_layer_norm_kernel, (tiles, 1, 1), arguments)


def launch_layer_norm_add(x, y, y_scale, weight, bias, out, eps: float, normed_dtype: torch.dtype) -> None:
    """Fill `out` with x + layer_norm(y) * y_scale, the norm rounded to `normed_dtype`; all contiguous, [B, ..., C]."""
    dtypes = dtypes_of(x, y, y_scale, weight, bias, out)
    launch = _layer_norm_add(x.shape, eps, dtypes, normed_dtype, x.device)
    launch(x, y, x if y_scale is None else y_scale, weight, bias, out)


@remembered
def _layer_norm_add(shape: torch.Size, eps: float, dtypes: tuple, normed_dtype, device) -> Launch:
    _, y, y_scale, *_ = dtypes
    arguments, tiles = _arguments(shape, eps, y)
    arguments |= dict(HAS_Y_SCALE=y_scale is not None, NORMED=_TRITON_DTYPES[normed_dtype])
    return Launch(layer_norm_add_kernel, (tiles, 1, 1), arguments)


def launch_layer_norm_backward(dtotal, dout, total, y_scale, weight, dx, dy, eps: float):
    """Fill `dx` and, if given, `dy`; return the gradients of weight and bias, [C] in float32 (float64 for float64).

    `total` is what was normalised; `dtotal` its gradient from elsewhere, or None.
    """
    dtypes = dtypes_of(total, dtotal, dout, y_scale, weight, dx, dy)
    launch, programs = _layer_norm_backward(total.shape, eps, dtypes, total.device)
    acc_dtype = torch.promote_types(total.dtype, torch.float32)
    partial_sums = total.new_empty(2, programs, total.shape[-1], dtype=acc_dtype)
    launch(
        dout if dtotal is None else dtotal, dout, total, total if y_scale is None else y_scale, weight,
        dx, dx if dy is None else dy, *partial_sums.unbind(0),
    )  # fmt: skip
    return partial_sums.sum(dim=1).unbind(0)


@remembered
def _layer_norm_backward(shape: torch.Size, eps: float, dtypes: tuple, device) -> tuple[Launch, int]:
    """(launch, how many programs write partial sums)."""
    total, dtotal, _, y_scale, _, _, dy = dtypes
    arguments, tiles = _arguments(shape, eps, total)
    arguments |= dict(HAS_DSUM=dtotal is not None, HAS_Y=dy is not None, HAS_Y_SCALE=y_scale is not None)
    programs = min(tiles, _PROGRAMS_PER_SM * multiprocessors_of(device))
    return Launch(layer_norm_backward_kernel, (programs, 1, 1), arguments), programs


def _arguments(shape: torch.Size, eps: float, dtype: torch.dtype) -> tuple[dict, int]:
    """(arguments that the three kernels have, tiles of rows) for a map [B, ..., C]; `dtype` is what is normalised."""
    C = shape[-1]
    rows = math.prod(shape[:-1])
    block_c = triton.next_power_of_2(C)
    block_m = max(1, _TILE // block_c)
    arguments = dict(
        rows=rows, rows_per_sample=rows // shape[0], eps=eps, C=C, BLOCK_M=block_m, BLOCK_C=block_c,
        ACC=acc_type(dtype), num_warps=4 if block_c <= 2 * _TILE else 8,
    )  # fmt: skip
    return arguments, cdiv(rows, block_m)
