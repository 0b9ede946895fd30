"""The forward kernels: from q, k, v at their places in the map to the output at its place, in one pass."""

import triton
import triton.language as tl

from .bias_fragments import fragments_of
from .primitives import (
    LOG2E,
    add_apart,
    as_operand,
    exp_from,
    exp_from_score,
    inverse_norm,
    load_bias_tile,
    load_tile,
    load_tiled_bias_tile,
    locate_tokens,
    placed_program,
    places_in_step,
    query_key_operand,
    share_of,
    store_stats,
    store_tile,
    tile_logits,
    tile_scores,
)
from .scale import load_scale
from .shift_mask import window_cut


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, logit_scale_ptr, out_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col, groups,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_TABLE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr,
    IS_SHIFTED: tl.constexpr, COSINE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Windows of one tile, BLOCK_M = BLOCK_N. Grid: (num_heads, programs in step); heads vary fastest, so that
    neighbours in time share the cache lines of a token."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0)
    tokens = tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    out_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)

    first_position, first_image, step = places_in_step(tl.program_id(1), tl.num_programs(1), groups)
    for position in range(first_position, num_positions, groups):
        offsets, pixels, in_window, in_map = locate_tokens(
            position, tokens, stride_h, stride_w, H, W, windows_w, roll_h, roll_w, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET
        )
        bias_tile = load_bias_tile(
            bias_ptr, head, num_heads, position * num_heads,
            window_cut(position, windows_w, cut_window_h, cut_window_w), cut_row, cut_col,
            ACC, WINDOW_H, WINDOW_W, BLOCK_M, BLOCK_N, HAS_BIAS, IS_TABLE, IS_SHIFTED,
        )  # fmt: skip
        for image in range(first_image, num_images, step):
            at = tl.cast(image, tl.int64) * stride_b
            q = load_tile(q_ptr + at, offsets, in_window, in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            k = load_tile(k_ptr + at, offsets, in_window, in_map, k_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            v = load_tile(v_ptr + at, offsets, in_window, in_map, v_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # n d
            row_scale = scale
            if COSINE:
                row_scale = (scale * inverse_norm(q, ACC))[:, None]  # n 1
            q = as_operand(q, q.dtype, PRECISION)
            k = query_key_operand(k, ACC, PRECISION, COSINE)[0]
            v = as_operand(v, v.dtype, PRECISION)
            logits = tile_logits(
                q, k, bias_tile, row_scale, mask_ptr, image, tokens, tokens, num_masks,
                ACC, PRECISION, WINDOW_AREA, HAS_MASK,
            )  # fmt: skip
            row_max = tl.max(logits, axis=1)  # n
            p = exp_from(logits, row_max)  # n n
            inverse_sum = 1.0 / tl.sum(p, axis=1)  # n
            p = as_operand(p, v.dtype, PRECISION)
            out = tl.dot(p, v, input_precision=PRECISION, out_dtype=ACC) * inverse_sum[:, None]  # n d
            store_tile(out_ptr + tl.cast(image, tl.int64) * H * W * C, out, pixels * C, in_map, HEAD_DIM, BLOCK_D)


@triton.jit
def forward_tiled_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, fragments_ptr, mask_ptr, logit_scale_ptr, out_ptr, stats_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_w, num_positions, num_images, num_masks, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, shares, multiprocessors,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXTENT: tl.constexpr, HAS_FRAGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr,
    COSINE: tl.constexpr, SAVE_STATS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Larger windows: a loop over key tiles with an online softmax. See `placed_program` for the grid."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    slot, share = placed_program(shares, multiprocessors)
    if slot >= num_heads * tl.cdiv(WINDOW_AREA, BLOCK_M):
        return
    head = slot % num_heads
    row = slot // num_heads * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)  # m
    C = num_heads * HEAD_DIM
    q_ptr += head.to(tl.int64) * stride_head
    k_ptr += head.to(tl.int64) * stride_head
    v_ptr += head.to(tl.int64) * stride_head
    out_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    scale = load_scale(scale, logit_scale_ptr, head, ACC, COSINE)

    first, last = share_of(num_positions * num_images, share, shares)
    for position in range(first // num_images, tl.cdiv(last, num_images)):
        q_offsets, q_pixels, q_in_window, q_in_map = locate_tokens(
            position, rows, stride_h, stride_w, H, W, windows_w, roll_h, roll_w,
            WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        cut = window_cut(position, windows_w, cut_window_h, cut_window_w)
        position_fragments_ptr = fragments_of(fragments_ptr, cut, head, num_heads, EXTENT)
        bias_tile = load_tiled_bias_tile(
            position_fragments_ptr, row, 0, ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS
        )  # m n
        before = position * num_images
        for image in range(tl.maximum(first - before, 0), tl.minimum(last - before, num_images)):
            at = tl.cast(image, tl.int64) * stride_b
            q = load_tile(q_ptr + at, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD)  # m d
            q = query_key_operand(q, ACC, PRECISION, COSINE)[0]
            row_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)  # m
            row_sum = tl.zeros([BLOCK_M], dtype=ACC)  # m
            out = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)  # m d
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
                new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # m
                # A row may have met nothing but -inf so far (an explicit mask): -inf - -inf must not become NaN yet.
                origin = tl.where(new_max == float("-inf"), 0.0, new_max)  # m
                p = exp_from_score(scores, origin, scale)  # m n
                rescale = tl.exp2((row_max - origin) * (scale * LOG2E))  # m
                row_max = new_max
                row_sum = row_sum * rescale + tl.sum(p, axis=1)
                p = as_operand(p, v.dtype, PRECISION)
                # The next tile of the bias, which after the last is the next image's first: fetched while the product
                # is under way, into the registers that the scores had.
                following = tl.where(start + BLOCK_N < WINDOW_AREA, start + BLOCK_N, 0)
                bias_tile = load_tiled_bias_tile(
                    position_fragments_ptr, row, following, ACC, WINDOW_AREA, BLOCK_M, BLOCK_N, EXTENT, HAS_FRAGMENTS
                )  # m n
                if v.dtype == tl.float32:  # one long sum would be rounded more often than one a tile
                    product = tl.dot(p, v, input_precision=PRECISION, out_dtype=ACC)
                    out = add_apart(product, out, rescale[:, None])
                else:
                    out = tl.dot(p, v, acc=out * rescale[:, None], input_precision=PRECISION, out_dtype=ACC)
            inverse_sum = 1.0 / row_sum  # m
            store_tile(
                out_ptr + tl.cast(image, tl.int64) * H * W * C, out * inverse_sum[:, None], q_pixels * C, q_in_map,
                HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            if SAVE_STATS:
                window = tl.cast(image, tl.int64) * num_positions + position
                store_stats(stats_ptr, row_max, inverse_sum, window, head, rows, num_heads, WINDOW_AREA)
