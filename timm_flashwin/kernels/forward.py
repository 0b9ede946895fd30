"""The forward kernel: from q, k, v at their places in the map to the output at its place, in one pass."""

import triton
import triton.language as tl

from .primitives import as_operand, load_bias_tile, load_tile, locate_tokens, store_stats, store_tile, tile_logits


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, bias_ptr, mask_ptr, out_ptr, stats_ptr,
    stride_b, stride_h, stride_w, stride_head,
    H, W, windows_h, windows_w, num_windows, num_mask_windows, num_heads, scale,
    roll_h, roll_w, cut_window_h, cut_window_w, cut_row, cut_col,
    HEAD_DIM: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_PAD: tl.constexpr, IS_SHIFTED: tl.constexpr,
    SAVE_STATS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid: (num_heads * query tiles, programs that share the windows); heads vary fastest, so that neighbours in
    time share the cache lines of a token."""
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    rows = tl.program_id(0) // num_heads * BLOCK_M + tl.arange(0, BLOCK_M)  # m
    cols = tl.arange(0, BLOCK_N)  # n
    C = num_heads * HEAD_DIM
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    out_ptr += head * HEAD_DIM
    q_pad_ptr = pad_ptr + head * HEAD_DIM
    k_pad_ptr = q_pad_ptr + C
    v_pad_ptr = k_pad_ptr + C
    if WINDOW_AREA <= BLOCK_N:
        bias_tile = load_bias_tile(bias_ptr, head, rows, cols, ACC, WINDOW_AREA, HAS_BIAS)  # m n

    for window in range(tl.program_id(1), num_windows, tl.num_programs(1)):
        image, q_offsets, q_pixels, q_region, q_in_window, q_in_map = locate_tokens(
            window, rows, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
            cut_window_h, cut_window_w, cut_row, cut_col, WINDOW_H, WINDOW_W, HAS_PAD, OFFSET,
        )  # fmt: skip
        q = load_tile(
            q_ptr + image * stride_b, q_offsets, q_in_window, q_in_map, q_pad_ptr, HEAD_DIM, BLOCK_D, HAS_PAD, PRECISION
        )  # m d
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)  # m
        row_sum = tl.zeros([BLOCK_M], dtype=ACC)  # m
        out = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)  # m d

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
            if WINDOW_AREA > BLOCK_N:
                bias_tile = load_bias_tile(bias_ptr, head, rows, start + cols, ACC, WINDOW_AREA, HAS_BIAS)  # m n
            logits = tile_logits(
                q, k, bias_tile, q_region, k_region, scale, mask_ptr, window, rows, start + cols, num_mask_windows,
                ACC, PRECISION, WINDOW_AREA, IS_SHIFTED, HAS_MASK,
            )  # fmt: skip

            tile_max = tl.max(logits, axis=1)  # m
            if WINDOW_AREA <= BLOCK_N:  # every key is in this tile
                row_max = tile_max
                p = tl.exp2(logits - row_max[:, None])  # m n
                row_sum = tl.sum(p, axis=1)
                p = as_operand(p, v.dtype, PRECISION)
                out = tl.dot(p, v, input_precision=PRECISION, out_dtype=ACC)
            else:
                new_max = tl.maximum(row_max, tile_max)  # m
                # A row may have met nothing but -inf so far (an explicit mask): -inf - -inf must not become NaN yet.
                origin = tl.where(new_max == float("-inf"), 0.0, new_max)  # m
                p = tl.exp2(logits - origin[:, None])  # m n
                rescale = tl.exp2(row_max - origin)  # m
                row_sum = row_sum * rescale + tl.sum(p, axis=1)
                p = as_operand(p, v.dtype, PRECISION)
                out = out * rescale[:, None] + tl.dot(p, v, input_precision=PRECISION, out_dtype=ACC)
                row_max = new_max

        store_tile(
            out_ptr + image * H * W * C, out * (1.0 / row_sum)[:, None], q_pixels * C, q_in_map, HEAD_DIM, BLOCK_D
        )  # fmt: skip
        if SAVE_STATS:
            store_stats(stats_ptr, row_max, 1.0 / row_sum, window, head, rows, num_heads, WINDOW_AREA)
