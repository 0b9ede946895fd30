"""The gradients of what all windows share, added up from what each program of the attention's backward left of them.

The bias, the padding and logit_scale are small: three sums, each with its casts around it, would keep the host busy for
longer than the GPU. Here one launch takes all that are needed, in an order that is always the same.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import cdiv
from .launcher import INTERPRETED, Launch, acc_type
from .scale import MAX_LOGIT_SCALE

# Elements a program adds up; in the interpreter a program costs the same whatever its size.
_BLOCK = 2**14 if INTERPRETED else 256
_ROWS = 8  # partial sums in flight


class Programs(NamedTuple):
    """How many partial sums there are of each gradient: 0 where there are none, and the gradient is 0."""

    dbias: int
    dpad: int
    dlogit_scale: int


@triton.jit
def partial_sums_kernel(
    dbias_partials_ptr, dpad_partials_ptr, dlogit_scale_partials_ptr, logit_scale_ptr,
    dbias_ptr, dpad_qkv_ptr, dlogit_scale_ptr,
    dbias_size, dbias_programs, dpad_size, dpad_programs, dlogit_scale_size, dlogit_scale_programs,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of all three gradients,), one after the other; a gradient nobody asks for has the size 0.

    Of the padding k and v have a gradient, its second and last third: a padded query has none.
    """
    block = tl.program_id(0)
    dbias_blocks = tl.cdiv(dbias_size, BLOCK)
    dpad_blocks = tl.cdiv(dpad_size, BLOCK)
    if block < dbias_blocks:
        places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # p
        total = sum_of(dbias_partials_ptr, places, dbias_size, dbias_programs, BLOCK, ROWS, ACC)
        tl.store(dbias_ptr + places, total.to(dbias_ptr.dtype.element_ty), mask=places < dbias_size)
    elif block < dbias_blocks + dpad_blocks:
        places = (block - dbias_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # p
        C = dpad_size // 3
        total = sum_of(dpad_partials_ptr, places - C, 2 * C, dpad_programs, BLOCK, ROWS, ACC)
        tl.store(dpad_qkv_ptr + places, total.to(dpad_qkv_ptr.dtype.element_ty), mask=places < dpad_size)
    else:
        places = (block - dbias_blocks - dpad_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # p
        inside = places < dlogit_scale_size  # p
        total = sum_of(
            dlogit_scale_partials_ptr, places, dlogit_scale_size, dlogit_scale_programs, BLOCK, ROWS, ACC
        )  # p
        logit_scale = tl.load(logit_scale_ptr + places, mask=inside, other=0.0).to(ACC)  # p
        total *= (logit_scale <= MAX_LOGIT_SCALE).to(ACC)  # as torch's clamp has it
        tl.store(dlogit_scale_ptr + places, total.to(dlogit_scale_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_of(ptr, places, size, programs, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The sums over `programs` of the partial sums [programs, size] at `places` [p], 0 outside."""
    inside = (places >= 0) & (places < size)  # p
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)  # r p
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)  # r
        loaded = (rows < programs)[:, None] & inside[None, :]  # r p
        total += tl.load(ptr + rows.to(tl.int64)[:, None] * size + places[None, :], mask=loaded, other=0.0)
    return tl.sum(total, axis=0)  # p


def partial_sums_launch(sizes: tuple[int, int, int], programs: Programs, acc_dtype: torch.dtype) -> Launch:
    """A launch for dbias [num_heads, N, N], dpad_qkv [3 * num_heads * head_dim] and dlogit_scale [num_heads].

    `sizes` are their numbers of elements, 0 for what is not needed. It takes the partial sums of each, which have the
    programs in front (those of dpad are [programs, 2 * num_heads * head_dim], of k and v), logit_scale, and the three.
    """
    arguments = dict(
        dbias_size=sizes[0], dbias_programs=programs.dbias, dpad_size=sizes[1], dpad_programs=programs.dpad,
        dlogit_scale_size=sizes[2], dlogit_scale_programs=programs.dlogit_scale,
        BLOCK=_BLOCK, ROWS=_ROWS, ACC=acc_type(acc_dtype), num_warps=4,
    )  # fmt: skip
    return Launch(partial_sums_kernel, (sum(cdiv(size, _BLOCK) for size in sizes), 1, 1), arguments)
