"""What the forward and backward kernels share: token addresses, tile loads and the logits of one tile.

Every kernel sees q, k and v as views [B, H, W, num_heads, head_dim] that share their strides, the last of which is 1.
A windowed tensor [B_, num_heads, N, head_dim] is the map [B_, N, 1, num_heads, head_dim] with windows of
(N, 1), so one pair of kernels serves both public functions. Outputs are contiguous maps.

A program is pinned to one head (and one tile of queries and/or keys) and walks over windows. The bias tile it needs
is therefore loaded once, and what it contributes to the bias gradient stays in registers until the walk ends.

Shapes stand at the end of the line: m and n are query and key tokens of a tile, d the channels of a head.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # softmax runs on exp2: logits are kept in units of log 2
MASK_LOG2 = tl.constexpr(-100.0 * 1.4426950408889634)  # geometry.MASK_VALUE in those units


@triton.jit
def locate_tokens(
    window, tokens, stride_h, stride_w, H, W, windows_h, windows_w, roll_h, roll_w,
    cut_window_h, cut_window_w, cut_row, cut_col,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HAS_PAD: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Where the `tokens` of one window lie.

    Returns the image, the tokens' offsets in that image of q, k and v, their pixels y * W + x for the contiguous maps,
    their region (geometry.shift_cut), whether they are the window's, and whether they are the map's: a padded token is
    only the former.
    """
    image = (window // (windows_h * windows_w)).to(tl.int64)
    window_h = (window // windows_w) % windows_h
    window_w = window % windows_w
    row = tokens // WINDOW_W  # m, in the window
    col = tokens % WINDOW_W  # m
    in_window = tokens < WINDOW_H * WINDOW_W  # m
    # The cut runs through one row and one column of windows; the bits of all others are equal for all their tokens.
    cut = 2 * (window_h == cut_window_h).to(tl.int32) + (window_w == cut_window_w).to(tl.int32)
    region = (2 * (row >= cut_row).to(tl.int32) + (col >= cut_col).to(tl.int32)) & cut  # m
    row += window_h * WINDOW_H  # m, in the rolled and padded map
    col += window_w * WINDOW_W
    in_map = in_window
    if HAS_PAD:
        in_map = in_window & (row < H) & (col < W)
    y = row + roll_h  # m, in the caller's map
    y = tl.where(y >= H, y - H, y).to(OFFSET)
    x = col + roll_w
    x = tl.where(x >= W, x - W, x).to(OFFSET)
    return image, y * stride_h + x * stride_w, y * W + x, region, in_window, in_map


@triton.jit
def as_operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`x` as tl.dot shall see it: in `DTYPE`, and rounded to nearest where the tensor cores take TF32.

    Left alone they cut the surplus bits off, which is twice the error of rounding, and all of one sign.
    """
    x = x.to(DTYPE)
    if PRECISION == "tf32" and DTYPE == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN of all ones would overflow into -0
    return x


@triton.jit
def load_tile(
    ptr, offsets, in_window, in_map, pad_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens at `offsets` as an operand [m, d]: a padded token is the row at `pad_ptr`, one outside the window is 0."""
    channels = tl.arange(0, BLOCK_D)  # d
    loaded = in_map[:, None]  # m 1
    if HEAD_DIM < BLOCK_D:
        loaded = loaded & (channels < HEAD_DIM)[None, :]  # m d
    tile = tl.load(ptr + offsets[:, None] + channels[None, :], mask=loaded, other=0.0)  # m d
    if HAS_PAD:
        pad = tl.load(pad_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tile.dtype)  # d
        tile = tl.where((in_window & (in_map == 0))[:, None], pad[None, :], tile)
    return as_operand(tile, ptr.dtype.element_ty, PRECISION)  # m d


@triton.jit
def store_tile(ptr, tile, offsets, in_map, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of `tile` [m, d] that are tokens of the map; padded tokens are dropped."""
    channels = tl.arange(0, BLOCK_D)  # d
    stored = in_map[:, None]  # m 1
    if HEAD_DIM < BLOCK_D:
        stored = stored & (channels < HEAD_DIM)[None, :]  # m d
    tl.store(ptr + offsets[:, None] + channels[None, :], tile.to(ptr.dtype.element_ty), mask=stored)


@triton.jit
def load_bias_tile(
    bias_ptr, head, rows, cols, ACC: tl.constexpr, WINDOW_AREA: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """The bias of one head between query `rows` and key `cols`, in units of log 2: [m, n].

    Keys past the window's end are -inf here, once, so that no loop over windows has to mask them again.
    """
    in_window = (rows < WINDOW_AREA)[:, None] & (cols < WINDOW_AREA)[None, :]  # m n
    bias = tl.zeros(in_window.shape, dtype=ACC)
    if HAS_BIAS:
        offsets = (head * WINDOW_AREA + rows[:, None]) * WINDOW_AREA + cols[None, :]  # m n
        bias = tl.load(bias_ptr + offsets, mask=in_window, other=0.0).to(ACC) * LOG2E
    return tl.where((cols < WINDOW_AREA)[None, :], bias, float("-inf"))  # m n


@triton.jit
def tile_logits(
    q, k, bias_tile, row_region, col_region, scale, mask_ptr, window, rows, cols, num_mask_windows,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WINDOW_AREA: tl.constexpr,
    IS_SHIFTED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """q @ k^T * scale + bias + mask in units of log 2: [m, n]."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * (scale * LOG2E) + bias_tile
    if IS_SHIFTED:
        logits += tl.where(row_region[:, None] != col_region[None, :], MASK_LOG2, 0.0)
    if HAS_MASK:
        in_window = (rows < WINDOW_AREA)[:, None] & (cols < WINDOW_AREA)[None, :]  # m n
        first = (window % num_mask_windows).to(tl.int64) * WINDOW_AREA * WINDOW_AREA
        mask = tl.load(mask_ptr + first + rows[:, None] * WINDOW_AREA + cols[None, :], mask=in_window, other=0.0)  # m n
        logits += mask.to(ACC) * LOG2E
    return logits  # m n


@triton.jit
def stats_offsets(window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """Places of the query `rows` in a tensor [B * nW, num_heads, N]."""
    return (window * num_heads + head).to(tl.int64) * WINDOW_AREA + rows  # m


@triton.jit
def store_stats(ptr, row_max, inverse_sum, window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """Keep what turns logits into probabilities: [B * nW, num_heads, N, 2].

    Two numbers and not their logarithm: it would be rounded once for all keys of a row, and in float32 that error does
    not average out of the gradients.
    """
    offsets = 2 * stats_offsets(window, head, rows, num_heads, WINDOW_AREA)  # m
    tl.store(ptr + offsets, row_max, mask=rows < WINDOW_AREA)
    tl.store(ptr + offsets + 1, inverse_sum, mask=rows < WINDOW_AREA)


@triton.jit
def load_stats(ptr, window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """(row_max, inverse_sum) of the query `rows`; 0 outside the window."""
    offsets = 2 * stats_offsets(window, head, rows, num_heads, WINDOW_AREA)  # m
    row_max = tl.load(ptr + offsets, mask=rows < WINDOW_AREA, other=0.0)  # m
    return row_max, tl.load(ptr + offsets + 1, mask=rows < WINDOW_AREA, other=0.0)  # m
