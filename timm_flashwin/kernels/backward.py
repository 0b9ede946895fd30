"""The backward kernels.

With P = softmax(logits), dP = do @ v^T and delta = rowsum(P * dP) = rowsum(do * out):

    dS = P * (dP - delta),  dv = P^T @ do,  dq = scale * dS @ k,  dk = scale * dS^T @ q,  dbias = sum over windows of dS

Where a window fits one tile, one kernel does it all from q, k, v and do. Larger windows take three kernels, each
pinned to what it accumulates: `dq` to a tile of queries, `dkdv` to a tile of keys, `dbias` to a tile of the bias; they
rebuild P from the forward's row maxima and sums. Every program adds its windows in a fixed order and writes its own
partial sum of dbias and of the padding's gradient; the caller adds those up. No atomics: the same input gives the
same bits.

A padded query has no output, so its do is 0 and so is its dq: only k and v carry a gradient into the padding.
"""

import triton
import triton.language as tl

from .primitives import (
    as_operand,
    load_bias_tile,
    load_stats,
    load_tile,
    locate_tokens,
    stats_offsets,
    store_tile,
    tile_logits,
)


@triton.jit
def store_bias_partial(ptr, tile, head, num_heads, rows, cols, WINDOW_AREA: tl.constexpr):
    """One program's share of dbias into its own slice of the partial sums [programs, num_heads, N, N]."""
    in_window = (rows < WINDOW_AREA)[:, None] & (cols < WINDOW_AREA)[None, :]  # m n
    first = (tl.program_id(1) * num_heads + head).to(tl.int64) * WINDOW_AREA * WINDOW_AREA
    tl.store(ptr + first + rows[:, None] * WINDOW_AREA + cols[None, :], tile, mask=in_window)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr, dpad_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_h, windows_w, num_windows, num_mask_windows, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    grad_stride,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    NEED_DBIAS: tl.constexpr, NEED_DPAD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Windows of one tile, BLOCK_M = BLOCK_N. Grid: (num_heads, programs that share the windows)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0)
    tokens = tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    do_ptr += head * HEAD_DIM
    dq_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    bias_tile = load_bias_tile(bias_ptr, head, tokens, tokens, ACC, WINDOW_AREA, HAS_BIAS)  # n n
    dbias = tl.zeros([BLOCK_N, BLOCK_N], dtype=ACC)  # n n
    dpad_k = tl.zeros([BLOCK_D], dtype=ACC)  # d
    dpad_v = tl.zeros([BLOCK_D], dtype=ACC)  # d

    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, offsets, pixels, region, in_window, in_map = locate_tokens(
            window, tokens, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        q = load_tile(
            q_ptr + image * stride_b, offsets, in_window, in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        k = load_tile(
            k_ptr + image * stride_b, offsets, in_window, in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        v = load_tile(
            v_ptr + image * stride_b, offsets, in_window, in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        do = load_tile(
            do_ptr + image * H * W * C, pixels * C, in_window, in_map, do_ptr, HEAD_DIM, BLOCK_D, False, PRECISION
        )  # n d

        logits = tile_logits(
            q, k, bias_tile, region, region, scale, mask_ptr, window, tokens, tokens, num_mask_windows,
            ACC, PRECISION, WINDOW_AREA, IS_SHIFTED, HAS_MASK,
        )  # fmt: skip
        p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])  # n n
        p = p * (1.0 / tl.sum(p, axis=1))[:, None]
        # Each result leaves as soon as it is there: registers are what this kernel is short of.
        dv = tl.dot(tl.trans(as_operand(p, do.dtype, PRECISION)), do, input_precision=PRECISION, out_dtype=ACC)  # n d
        store_tile(dv_ptr + image * H * W * grad_stride, dv, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
        if NEED_DPAD:
            padded = (in_window & (in_map == 0))[:, None]  # n 1
            dpad_v += tl.sum(tl.where(padded, dv, 0.0), axis=0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # n n
        ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])  # n n
        if NEED_DBIAS:
            dbias += ds
        ds = as_operand(ds, q.dtype, PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC) * scale  # n d
        store_tile(dq_ptr + image * H * W * grad_stride, dq, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC) * scale  # n d
        store_tile(dk_ptr + image * H * W * grad_stride, dk, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
        if NEED_DPAD:
            dpad_k += tl.sum(tl.where(padded, dk, 0.0), axis=0)

    if NEED_DBIAS:
        store_bias_partial(dbias_ptr, dbias, head, num_heads, tokens, tokens, WINDOW_AREA)
    if NEED_DPAD:  # partial sums [programs, 2, num_heads, head_dim]
        channels = tl.arange(0, BLOCK_D)  # d
        dpad_ptr += (tl.program_id(1) * 2 * num_heads + head) * HEAD_DIM + channels
        tl.store(dpad_ptr, dpad_k, mask=channels < HEAD_DIM)
        tl.store(dpad_ptr + C, dpad_v, mask=channels < HEAD_DIM)


@triton.jit
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, out_ptr, stats_ptr, do_ptr, delta_ptr, dq_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_h, windows_w, num_windows, num_mask_windows, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    grad_stride,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the two kernels after it. Grid: (num_heads * query tiles, programs that share the windows)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    rows = tl.program_id(0) // num_heads * BLOCK_M + tl.arange(0, BLOCK_M)  # m
    cols = tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    out_ptr += head * HEAD_DIM
    do_ptr += head * HEAD_DIM
    dq_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C

    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, q_offsets, q_pixels, q_region, q_in_window, q_in_map = locate_tokens(
            window, rows, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        q = load_tile(
            q_ptr + image * stride_b, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # m d
        do = load_tile(
            do_ptr + image * H * W * C, q_pixels * C, q_in_window, q_in_map, do_ptr, HEAD_DIM, BLOCK_D, False, PRECISION
        )  # m d
        out = load_tile(
            out_ptr + image * H * W * C, q_pixels * C, q_in_window, q_in_map, out_ptr, HEAD_DIM, BLOCK_D, False, "ieee"
        )  # m d
        row_max, inverse_sum = load_stats(stats_ptr, window, head, rows, num_heads, WINDOW_AREA)
        delta = tl.sum(do.to(ACC) * out.to(ACC), axis=1)  # m
        tl.store(delta_ptr + stats_offsets(window, head, rows, num_heads, WINDOW_AREA), delta, mask=q_in_window)

        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)  # m d
        for start in range(0, WINDOW_AREA, BLOCK_N):
            image, k_offsets, k_pixels, k_region, k_in_window, k_in_map = locate_tokens(
                window, start + cols, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
                cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
            )  # fmt: skip
            k = load_tile(
                k_ptr + image * stride_b,
                k_offsets,
                k_in_window,
                k_in_map,
                k_pad_ptr,
                HEAD_DIM,
                BLOCK_D,
                HAS_PAD,
                PRECISION,
            )  # n d
            v = load_tile(
                v_ptr + image * stride_b,
                k_offsets,
                k_in_window,
                k_in_map,
                v_pad_ptr,
                HEAD_DIM,
                BLOCK_D,
                HAS_PAD,
                PRECISION,
            )  # n d
            bias_tile = load_bias_tile(bias_ptr, head, rows, start + cols, ACC, WINDOW_AREA, HAS_BIAS)  # m n
            logits = tile_logits(
                q, k, bias_tile, q_region, k_region, scale, mask_ptr, window, rows, start + cols, num_mask_windows,
                ACC, PRECISION, WINDOW_AREA, IS_SHIFTED, HAS_MASK,
            )  # fmt: skip
            p = tl.exp2(logits - row_max[:, None]) * inverse_sum[:, None]  # m n
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
            ds = as_operand(p * (dp - delta[:, None]), k.dtype, PRECISION)  # m n
            dq += tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC)
        store_tile(
            dq_ptr + image * H * W * grad_stride, dq * scale, q_pixels * grad_stride, q_in_map, HEAD_DIM, BLOCK_D
        )  # fmt: skip


@triton.jit
def backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, stats_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, dpad_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_h, windows_w, num_windows, num_mask_windows, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    grad_stride,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    NEED_DPAD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dk and dv. Grid: (num_heads * key tiles, programs that share the windows)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    cols = tl.program_id(0) // num_heads * BLOCK_N + tl.arange(0, BLOCK_N)  # n
    rows = tl.arange(0, BLOCK_M)  # m
    C = num_heads * HEAD_DIM
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    do_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    dpad_k = tl.zeros([BLOCK_D], dtype=ACC)  # d
    dpad_v = tl.zeros([BLOCK_D], dtype=ACC)  # d

    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, k_offsets, k_pixels, k_region, k_in_window, k_in_map = locate_tokens(
            window, cols, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        k = load_tile(
            k_ptr + image * stride_b, k_offsets, k_in_window, k_in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        v = load_tile(
            v_ptr + image * stride_b, k_offsets, k_in_window, k_in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        padded = (k_in_window & (k_in_map == 0))[:, None]  # n 1

        dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)  # n d
        dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)  # n d
        for start in range(0, WINDOW_AREA, BLOCK_M):
            image, q_offsets, q_pixels, q_region, q_in_window, q_in_map = locate_tokens(
                window, start + rows, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
                cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
            )  # fmt: skip
            q = load_tile(
                q_ptr + image * stride_b,
                q_offsets,
                q_in_window,
                q_in_map,
                q_pad_ptr,
                HEAD_DIM,
                BLOCK_D,
                HAS_PAD,
                PRECISION,
            )  # m d
            do = load_tile(
                do_ptr + image * H * W * C,
                q_pixels * C,
                q_in_window,
                q_in_map,
                do_ptr,
                HEAD_DIM,
                BLOCK_D,
                False,
                PRECISION,
            )  # m d
            row_max, inverse_sum = load_stats(stats_ptr, window, head, start + rows, num_heads, WINDOW_AREA)
            delta = tl.load(
                delta_ptr + stats_offsets(window, head, start + rows, num_heads, WINDOW_AREA),
                mask=q_in_window,
                other=0.0,
            )  # m
            bias_tile = load_bias_tile(bias_ptr, head, start + rows, cols, ACC, WINDOW_AREA, HAS_BIAS)  # m n
            logits = tile_logits(
                q, k, bias_tile, q_region, k_region, scale, mask_ptr, window, start + rows, cols, num_mask_windows,
                ACC, PRECISION, WINDOW_AREA, IS_SHIFTED, HAS_MASK,
            )  # fmt: skip
            p = tl.exp2(logits - row_max[:, None]) * inverse_sum[:, None]  # m n
            dv += tl.dot(tl.trans(as_operand(p, do.dtype, PRECISION)), do, input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
            ds = as_operand(p * (dp - delta[:, None]), q.dtype, PRECISION)  # m n
            dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC)
        dk *= scale
        store_tile(dk_ptr + image * H * W * grad_stride, dk, k_pixels * grad_stride, k_in_map, HEAD_DIM, BLOCK_D)
        store_tile(dv_ptr + image * H * W * grad_stride, dv, k_pixels * grad_stride, k_in_map, HEAD_DIM, BLOCK_D)
        if NEED_DPAD:
            dpad_k += tl.sum(tl.where(padded, dk, 0.0), axis=0)
            dpad_v += tl.sum(tl.where(padded, dv, 0.0), axis=0)

    if NEED_DPAD:  # partial sums [programs * key tiles, 2, num_heads, head_dim]
        channels = tl.arange(0, BLOCK_D)  # d
        slot = tl.program_id(1) * (tl.num_programs(0) // num_heads) + tl.program_id(0) // num_heads
        dpad_ptr += (slot * 2 * num_heads + head) * HEAD_DIM + channels
        tl.store(dpad_ptr, dpad_k, mask=channels < HEAD_DIM)
        tl.store(dpad_ptr + C, dpad_v, mask=channels < HEAD_DIM)


@triton.jit
def backward_dbias_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, stats_ptr, do_ptr, delta_ptr, dbias_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_h, windows_w, num_windows, num_mask_windows, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dbias. Grid: (num_heads * query tiles * key tiles, programs that share the windows)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    KEY_TILES: tl.constexpr = (WINDOW_AREA + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    rows = tile // KEY_TILES * BLOCK_M + tl.arange(0, BLOCK_M)  # m
    cols = tile % KEY_TILES * BLOCK_N + tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    do_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    bias_tile = load_bias_tile(bias_ptr, head, rows, cols, ACC, WINDOW_AREA, HAS_BIAS)  # m n
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)  # m n

    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, q_offsets, q_pixels, q_region, q_in_window, q_in_map = locate_tokens(
            window, rows, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        q = load_tile(
            q_ptr + image * stride_b, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # m d
        do = load_tile(
            do_ptr + image * H * W * C, q_pixels * C, q_in_window, q_in_map, do_ptr, HEAD_DIM, BLOCK_D, False, PRECISION
        )  # m d
        row_max, inverse_sum = load_stats(stats_ptr, window, head, rows, num_heads, WINDOW_AREA)
        delta = tl.load(
            delta_ptr + stats_offsets(window, head, rows, num_heads, WINDOW_AREA), mask=q_in_window, other=0.0
        )  # m

        image, k_offsets, k_pixels, k_region, k_in_window, k_in_map = locate_tokens(
            window, cols, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        k = load_tile(
            k_ptr + image * stride_b, k_offsets, k_in_window, k_in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        v = load_tile(
            v_ptr + image * stride_b, k_offsets, k_in_window, k_in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # n d
        logits = tile_logits(
            q, k, bias_tile, q_region, k_region, scale, mask_ptr, window, rows, cols, num_mask_windows,
            ACC, PRECISION, WINDOW_AREA, IS_SHIFTED, HAS_MASK,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
        dbias += tl.exp2(logits - row_max[:, None]) * inverse_sum[:, None] * (dp - delta[:, None])
    store_bias_partial(dbias_ptr, dbias, head, num_heads, rows, cols, WINDOW_AREA)
