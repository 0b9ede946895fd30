"""The backward kernels.

With P = softmax(logits), dP = do @ v^T and delta = rowsum(P * dP) = rowsum(do * out):

    dS = P * (dP - delta),  dv = P^T @ do,  dq = scale * dS @ k,  dk = scale * dS^T @ q,  dbias = sum over windows of dS

For cosine attention q and k above are the normalised ones: dq and dk then go through the norms (`through_norm`), and
dlogit_scale = scale * sum(dS * (q @ k^T)), which is the sum of what dq has along q.

Where a window fits one tile, one kernel does it all from q, k, v and do. Larger windows take three kernels, each
pinned to what it accumulates: `dq` to a tile of queries, `dkdv` to a tile of keys, `dbias` to a tile of the bias; they
rebuild P from the forward's row maxima and sums. Every program adds its windows in a fixed order and writes its own
partial sums of what all windows share (the bias, the padding, logit_scale); the caller adds those up. No atomics: the
same input gives the same bits.

A padded query has no output, so its do is 0 and so is its dq: only k and v carry a gradient into the padding.
"""

import triton
import triton.language as tl

from .bias_fragments import fragments_of
from .primitives import (
    as_operand,
    exp_from,
    exp_from_score,
    here,
    load_bias_tile,
    load_stats,
    load_tile,
    load_tiled_bias_tile,
    locate_tokens,
    placed_program,
    places_in_step,
    query_key_operand,
    share_of,
    stats_offsets,
    store_tile,
    through_norm,
    tile_logits,
    tile_scores,
)
from .scale import load_scale
from .shift_mask import window_cut


@triton.jit
def store_bias_partial(ptr, tile, program, head, num_heads, rows, cols, WINDOW_AREA: tl.constexpr):
    """One program's share of dbias into its own slice of the partial sums [programs, num_heads, N, N]."""
    in_window = (rows < WINDOW_AREA)[:, None] & (cols < WINDOW_AREA)[None, :]  # m n
    first = (program * num_heads + head).to(tl.int64) * WINDOW_AREA * WINDOW_AREA
    tl.store(ptr + first + rows[:, None] * WINDOW_AREA + cols[None, :], tile, mask=in_window)


@triton.jit
def store_pad_partial(ptr, dk, dv, program, head, num_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program's share of the padding's dk and dv [d] into the partial sums [programs, 2, num_heads, head_dim]."""
    channels = tl.arange(0, BLOCK_D)  # d
    ptr += (program * 2 * num_heads + head) * HEAD_DIM + channels
    tl.store(ptr, dk, mask=channels < HEAD_DIM)
    tl.store(ptr + num_heads * HEAD_DIM, dv, mask=channels < HEAD_DIM)


@triton.jit
def load_row_stats(stats_ptr, delta_ptr, window, head, rows, in_window, num_heads, WINDOW_AREA: tl.constexpr):
    """(row_max, inverse_sum, delta) of the query `rows` of a window: [m] each."""
    row_max, inverse_sum = load_stats(stats_ptr, window, head, rows, num_heads, WINDOW_AREA)
    delta = tl.load(
        delta_ptr + stats_offsets(window, head, rows, num_heads, WINDOW_AREA), mask=in_window, other=0.0
    )  # m
    return row_max, inverse_sum, delta


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, logit_scale_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    dbias_ptr, dpad_ptr, dlogit_scale_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    grad_stride, groups,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    COSINE: tl.constexpr, NEED_DBIAS: tl.constexpr, NEED_DPAD: tl.constexpr, NEED_DLOGIT_SCALE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Windows of one tile, BLOCK_M = BLOCK_N. Grid: (num_heads, programs in step)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0)
    program = tl.program_id(1)
    tokens = tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    do_ptr += head * HEAD_DIM
    dq_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    dbias = tl.zeros([BLOCK_N, BLOCK_N], dtype=ACC)  # n n
    dlogit_scale = tl.zeros([BLOCK_N], dtype=ACC)  # n
    dpad_k = tl.zeros([BLOCK_D], dtype=ACC)  # d
    dpad_v = tl.zeros([BLOCK_D], dtype=ACC)  # d

    first_position, first_image, step = places_in_step(program, tl.num_programs(1), groups)
    for position in range(first_position, num_positions, groups):
        offsets, pixels, in_window, in_map = locate_tokens(
            position, tokens, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        padded = (in_window & (in_map == 0))[:, None]  # n 1
        bias_tile = load_bias_tile(
            bias_ptr, head, num_heads, position * num_heads,
            window_cut(position, windows_w, cut_window_h, cut_window_w), cut_row, cut_col,
            ACC, WINDOW_H, WINDOW_W, BLOCK_M, BLOCK_N, HAS_BIAS, False, IS_SHIFTED,
        )  # fmt: skip
        for image in range(first_image, num_images, step):
            at = tl.cast(image, tl.int64) * stride_b
            pixels_at = tl.cast(image, tl.int64) * H * W
            q = load_tile(q_ptr + at, offsets, in_window, in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            k = load_tile(k_ptr + at, offsets, in_window, in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            v = load_tile(v_ptr + at, offsets, in_window, in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            do = load_tile(
                do_ptr + pixels_at * C, pixels * C, in_window, in_map, do_ptr, HEAD_DIM, BLOCK_D, False
            )  # n d
            q, q_inverse_norm = query_key_operand(q, ACC, PRECISION, COSINE)
            k, k_inverse_norm = query_key_operand(k, ACC, PRECISION, COSINE)
            v = as_operand(v, v.dtype, PRECISION)
            do = as_operand(do, do.dtype, PRECISION)

            logits = tile_logits(
                q, k, bias_tile, scale, mask_ptr, image, tokens, tokens, num_masks,
                ACC, PRECISION, WINDOW_AREA, HAS_MASK,
            )  # fmt: skip
            p = exp_from(logits, tl.max(logits, axis=1))  # n n
            p = p * (1.0 / tl.sum(p, axis=1))[:, None]
            # Each result leaves as soon as it is there: registers are what this kernel is short of.
            dv = tl.dot(tl.trans(as_operand(p, do.dtype, PRECISION)), do, input_precision=PRECISION, out_dtype=ACC)
            store_tile(dv_ptr + pixels_at * grad_stride, dv, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
            if NEED_DPAD:
                dpad_v += tl.sum(tl.where(padded, dv, 0.0), axis=0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # n n
            ds = p * (dp - tl.sum(p * dp, axis=1)[:, None])  # n n
            if NEED_DBIAS:
                dbias += ds
            ds = as_operand(ds, q.dtype, PRECISION)
            dq = tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC) * scale  # n d
            dq, along = through_norm(dq, q, q_inverse_norm, ACC, COSINE)
            dlogit_scale += along
            store_tile(dq_ptr + pixels_at * grad_stride, dq, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC) * scale  # n d
            dk, _ = through_norm(dk, k, k_inverse_norm, ACC, COSINE)
            store_tile(dk_ptr + pixels_at * grad_stride, dk, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
            if NEED_DPAD:
                dpad_k += tl.sum(tl.where(padded, dk, 0.0), axis=0)

    if NEED_DBIAS:
        store_bias_partial(dbias_ptr, dbias, program, head, num_heads, tokens, tokens, WINDOW_AREA)
    if NEED_DLOGIT_SCALE:  # partial sums [programs, num_heads]
        tl.store(dlogit_scale_ptr + program * num_heads + head, tl.sum(dlogit_scale, axis=0))
    if NEED_DPAD:
        store_pad_partial(dpad_ptr, dpad_k, dpad_v, program, head, num_heads, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, fragments_ptr, mask_ptr, logit_scale_ptr, out_ptr, stats_ptr, do_ptr, delta_ptr,
    dq_ptr, dlogit_scale_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w,
    grad_stride, shares, multiprocessors,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXTENT: tl.constexpr, HAS_FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr,
    COSINE: tl.constexpr, NEED_DLOGIT_SCALE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dq, the gradient of logit_scale, and delta for the two kernels after it; see `placed_program` for the grid."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    slot, share = placed_program(shares, multiprocessors)
    if slot >= num_heads * tl.cdiv(WINDOW_AREA, BLOCK_M):
        return
    head = slot % num_heads
    tile = slot // num_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # m
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    out_ptr += head * HEAD_DIM
    do_ptr += head * HEAD_DIM
    dq_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    dlogit_scale = tl.zeros([BLOCK_M], dtype=ACC)  # m
    # The rows of dS add up to 0, but for the rounding of delta. dlogit_scale multiplies what is left by a row's mean
    # cosine and adds up all rows: in float32 that would be most of its error, so it is taken out again.
    CENTRED: tl.constexpr = NEED_DLOGIT_SCALE and q_ptr.dtype.element_ty == tl.float32

    first, last = share_of(num_positions * num_images, share, shares)
    for position in range(first // num_images, tl.cdiv(last, num_images)):
        offsets, pixels, in_window, in_map = locate_tokens(
            position, rows, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        cut = window_cut(position, windows_w, cut_window_h, cut_window_w)
        position_fragments_ptr = fragments_of(fragments_ptr, cut, head, num_heads, EXTENT)
        bias_tile = load_tiled_bias_tile(
            position_fragments_ptr, tile * BLOCK_M, 0, ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS
        )  # m n
        before = position * num_images
        for image in range(tl.maximum(first - before, 0), tl.minimum(last - before, num_images)):
            window = tl.cast(image, tl.int64) * num_positions + position
            at = tl.cast(image, tl.int64) * stride_b
            pixels_at = tl.cast(image, tl.int64) * H * W
            q = load_tile(q_ptr + at, offsets, in_window, in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # m d
            do = load_tile(
                do_ptr + pixels_at * C, pixels * C, in_window, in_map, do_ptr, HEAD_DIM, BLOCK_D, False
            )  # m d
            out = load_tile(
                out_ptr + pixels_at * C, pixels * C, in_window, in_map, out_ptr, HEAD_DIM, BLOCK_D, False
            )  # m d
            do = as_operand(do, do.dtype, PRECISION)
            q, inverse_norm = query_key_operand(q, ACC, PRECISION, COSINE)
            row_max, inverse_sum = load_stats(stats_ptr, window, head, rows, num_heads, WINDOW_AREA)
            delta = tl.sum(do.to(ACC) * out.to(ACC), axis=1)  # m
            tl.store(delta_ptr + stats_offsets(window, head, rows, num_heads, WINDOW_AREA), delta, mask=in_window)

            dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)  # m d
            surplus = tl.zeros([BLOCK_M], dtype=ACC)  # m
            mean_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)  # m d
            for start in range(0, WINDOW_AREA, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)  # n
                k_offsets, k_pixels, k_in_window, k_in_map = locate_tokens(
                    position, cols, stride_h, stride_w, H, W, windows_w, roll_h, roll_w,
                    WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
                )  # fmt: skip
                k = load_tile(
                    k_ptr + at, k_offsets, k_in_window, k_in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD
                )  # n d
                v = load_tile(
                    v_ptr + at, k_offsets, k_in_window, k_in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD
                )  # n d
                k = query_key_operand(k, ACC, PRECISION, COSINE)[0]
                v = as_operand(v, v.dtype, PRECISION)
                scores = tile_scores(
                    q, k, bias_tile, scale, mask_ptr, image, rows, cols, num_masks,
                    ACC, PRECISION, WINDOW_AREA, HAS_MASK,
                )  # fmt: skip
                p = exp_from_score(scores, row_max, scale)  # m n, to be divided by the row's sum
                following = tl.where(start + BLOCK_N < WINDOW_AREA, start + BLOCK_N, 0)  # as the forward does
                bias_tile = load_tiled_bias_tile(
                    position_fragments_ptr, tile * BLOCK_M, following,
                    ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS,
                )  # m n  # fmt: skip
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
                ds = as_operand(p * (dp - delta[:, None]), k.dtype, PRECISION)  # m n
                dq += tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC)
                if CENTRED:
                    surplus += tl.sum(ds.to(ACC), axis=1)
                    mean_k += tl.dot(as_operand(p, k.dtype, PRECISION), k, input_precision=PRECISION, out_dtype=ACC)
            if CENTRED:
                dq -= mean_k * (surplus * inverse_sum)[:, None]
            dq, along = through_norm(dq * (inverse_sum * scale)[:, None], q, inverse_norm, ACC, COSINE)
            dlogit_scale += along
            store_tile(dq_ptr + pixels_at * grad_stride, dq, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)

    if NEED_DLOGIT_SCALE:  # partial sums [query tiles * shares, num_heads]
        tl.store(dlogit_scale_ptr + (tile * shares + share) * num_heads + head, tl.sum(dlogit_scale, axis=0))


@triton.jit
def backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, fragments_ptr, mask_ptr, logit_scale_ptr, stats_ptr, do_ptr, delta_ptr,
    dk_ptr, dv_ptr, dpad_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w,
    grad_stride, shares, multiprocessors,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXTENT: tl.constexpr, HAS_FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr,
    COSINE: tl.constexpr, NEED_DPAD: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dk and dv; see `placed_program` for the grid."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    slot, share = placed_program(shares, multiprocessors)
    if slot >= num_heads * tl.cdiv(WINDOW_AREA, BLOCK_N):
        return
    head = slot % num_heads
    tile = slot // num_heads
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    do_ptr += head * HEAD_DIM
    dk_ptr += head * HEAD_DIM
    dv_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    dpad_k = tl.zeros([BLOCK_D], dtype=ACC)  # d
    dpad_v = tl.zeros([BLOCK_D], dtype=ACC)  # d

    first, last = share_of(num_positions * num_images, share, shares)
    for position in range(first // num_images, tl.cdiv(last, num_images)):
        cut = window_cut(position, windows_w, cut_window_h, cut_window_w)
        offsets, pixels, in_window, in_map = locate_tokens(
            position, cols, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        position_fragments_ptr = fragments_of(fragments_ptr, cut, head, num_heads, EXTENT)
        before = position * num_images
        for image in range(tl.maximum(first - before, 0), tl.minimum(last - before, num_images)):
            window = tl.cast(image, tl.int64) * num_positions + position
            at = tl.cast(image, tl.int64) * stride_b
            pixels_at = tl.cast(image, tl.int64) * H * W
            k = load_tile(k_ptr + at, offsets, in_window, in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            v = load_tile(v_ptr + at, offsets, in_window, in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            k, inverse_norm = query_key_operand(k, ACC, PRECISION, COSINE)
            v = as_operand(v, v.dtype, PRECISION)

            dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)  # n d
            dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)  # n d
            # Where a token's row and column are bits of its number, the compiler works them out ahead of the images for
            # every `start`, which takes more registers than there are.
            first_start = 0
            if (WINDOW_W & (WINDOW_W - 1)) == 0:
                first_start = here(0, image * num_heads)
            for start in range(first_start, WINDOW_AREA, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)  # m
                q_offsets, q_pixels, q_in_window, q_in_map = locate_tokens(
                    position, rows, stride_h, stride_w, H, W, windows_w, roll_h, roll_w,
                    WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
                )  # fmt: skip
                q = load_tile(
                    q_ptr + at, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD
                )  # m d
                do = load_tile(
                    do_ptr + pixels_at * C, q_pixels * C, q_in_window, q_in_map, do_ptr, HEAD_DIM, BLOCK_D, False
                )  # m d
                q = query_key_operand(q, ACC, PRECISION, COSINE)[0]
                do = as_operand(do, do.dtype, PRECISION)
                row_max, inverse_sum, delta = load_row_stats(
                    stats_ptr, delta_ptr, window, head, rows, q_in_window, num_heads, WINDOW_AREA
                )  # m
                bias_tile = load_tiled_bias_tile(
                    position_fragments_ptr, start, here(tile * BLOCK_N, image * num_heads),
                    ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS,
                )  # m n  # fmt: skip
                scores = tile_scores(
                    q, k, bias_tile, scale, mask_ptr, image, rows, cols, num_masks,
                    ACC, PRECISION, WINDOW_AREA, HAS_MASK,
                )  # fmt: skip
                p = exp_from_score(scores, row_max, scale) * inverse_sum[:, None]  # m n
                dv += tl.dot(tl.trans(as_operand(p, do.dtype, PRECISION)), do, input_precision=PRECISION, out_dtype=ACC)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
                ds = as_operand(p * (dp - delta[:, None]), q.dtype, PRECISION)  # m n
                dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC)
            store_tile(dv_ptr + pixels_at * grad_stride, dv, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
            dk, _ = through_norm(dk * scale, k, inverse_norm, ACC, COSINE)
            store_tile(dk_ptr + pixels_at * grad_stride, dk, pixels * grad_stride, in_map, HEAD_DIM, BLOCK_D)
            if NEED_DPAD:
                padded = (in_window & (in_map == 0))[:, None]  # n 1
                dpad_k += tl.sum(tl.where(padded, dk, 0.0), axis=0)
                dpad_v += tl.sum(tl.where(padded, dv, 0.0), axis=0)

    if NEED_DPAD:
        store_pad_partial(dpad_ptr, dpad_k, dpad_v, tile * shares + share, head, num_heads, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_dbias_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, fragments_ptr, mask_ptr, logit_scale_ptr, stats_ptr, do_ptr, delta_ptr, dbias_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXTENT: tl.constexpr, HAS_FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr,
    COSINE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """dbias. Grid: (num_heads * query tiles * key tiles, programs that share the windows)."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    key_tiles = tl.cdiv(WINDOW_AREA, BLOCK_N)
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    row = tile // key_tiles * BLOCK_M
    col = tile % key_tiles * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)  # m
    cols = col + tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    do_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)  # m n

    first, last = share_of(num_positions * num_images, tl.program_id(1), tl.num_programs(1))
    for position in range(first // num_images, tl.cdiv(last, num_images)):
        q_offsets, q_pixels, q_in_window, q_in_map = locate_tokens(
            position, rows, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        k_offsets, k_pixels, k_in_window, k_in_map = locate_tokens(
            position, cols, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        cut = window_cut(position, windows_w, cut_window_h, cut_window_w)
        bias_tile = load_tiled_bias_tile(
            fragments_of(fragments_ptr, cut, head, num_heads, EXTENT),
            here(row, position * num_heads), here(col, position * num_heads),
            ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS,
        )  # m n  # fmt: skip
        before = position * num_images
        first_image = tl.maximum(first - before, 0)
        end = tl.minimum(last - before, num_images)
        window = tl.cast(first_image, tl.int64) * num_positions + position
        row_max, inverse_sum, delta = load_row_stats(
            stats_ptr, delta_ptr, window, head, rows, q_in_window, num_heads, WINDOW_AREA
        )  # m
        for image in range(first_image, end):
            at = tl.cast(image, tl.int64) * stride_b
            q = load_tile(q_ptr + at, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # m d
            k = load_tile(k_ptr + at, k_offsets, k_in_window, k_in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            v = load_tile(v_ptr + at, k_offsets, k_in_window, k_in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            do = load_tile(
                do_ptr + tl.cast(image, tl.int64) * H * W * C, q_pixels * C, q_in_window, q_in_map, do_ptr,
                HEAD_DIM, BLOCK_D, False,
            )  # m d  # fmt: skip
            q = query_key_operand(q, ACC, PRECISION, COSINE)[0]
            k = query_key_operand(k, ACC, PRECISION, COSINE)[0]
            v = as_operand(v, v.dtype, PRECISION)
            do = as_operand(do, do.dtype, PRECISION)
            scores = tile_scores(
                q, k, bias_tile, scale, mask_ptr, image, rows, cols, num_masks, ACC, PRECISION, WINDOW_AREA, HAS_MASK
            )
            p = exp_from_score(scores, row_max, scale)  # m n, to be divided by the row's sum
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)  # m n
            dbias += p * (dp * inverse_sum[:, None] - (delta * inverse_sum)[:, None])
            # Fetched an image ahead, which the compiler does with what goes into a product alone.
            window = tl.cast(tl.minimum(image + 1, end - 1), tl.int64) * num_positions + position
            row_max, inverse_sum, delta = load_row_stats(
                stats_ptr, delta_ptr, window, head, rows, q_in_window, num_heads, WINDOW_AREA
            )  # m
    store_bias_partial(dbias_ptr, dbias, tl.program_id(1), head, num_heads, rows, cols, WINDOW_AREA)
