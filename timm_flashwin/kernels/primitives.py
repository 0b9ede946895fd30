"""What the forward and backward kernels share: who does what, token addresses, tile loads and the logits of one tile.

Every kernel sees q, k and v as views [B, H, W, num_heads, head_dim] that share their strides, the last of which is 1.
A windowed tensor [B_, num_heads, N, head_dim] is the map [B_, N, 1, num_heads, head_dim] with windows of
(N, 1), so one set of kernels serves both public functions. Outputs are contiguous maps.

A position is a window's place in the map, the same in every image. A program is pinned to one head (and one tile of
queries and/or keys), takes one position after the other and, at each, walks through the images: addresses, padding,
bias and mask are those of the position, so they are worked out once and the walk only loads, multiplies and stores.
Windows of one tile are bound by memory: there the programs walk in step (`places_in_step`), so that what they read at
one time lies together. Larger windows are bound by arithmetic: there each takes as many windows as any other
(`share_of`).

Shapes stand at the end of the line: m and n are query and key tokens of a tile, d the channels of a head.
"""

import triton
import triton.language as tl

from .bias_fragments import load_bias_fragments
from .relative_position import table_rows
from .shift_mask import MASK_VALUE, token_region

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)  # reference.NORM_EPS
LOWEST_MASK = tl.constexpr(-(2.0**100))  # a power of two: its multiples by LOG2E, rounded or not, are equal


@triton.jit
def places_in_step(program, programs, groups):
    """Where `program` starts in the positions and in the images, and the step from one image to its next.

    A group of programs takes every `groups`-th position and shares out its images one by one.
    """
    return program % groups, program // groups, programs // groups


@triton.jit
def share_of(units, program, programs):
    """What of `units` is this program's: [first, last)."""
    each = units // programs
    rest = units % programs
    first = program * each + tl.minimum(program, rest)
    return first, first + each + (program < rest).to(tl.int32)


@triton.jit
def placed_program(shares, multiprocessors):
    """(what this program is pinned to, its share of the windows), for a grid of (multiprocessors * programs on each).

    Programs are handed to the multiprocessors in turn, or nearly so. Numbering them so that those of one multiprocessor
    come one after the other lets programs that are close in time and place walk over the same rows of the bias.
    """
    program = tl.program_id(0)
    layers = tl.num_programs(0) // multiprocessors
    number = program % multiprocessors * layers + program // multiprocessors
    return number // shares, number % shares


@triton.jit
def here(tokens, place, ALIGNMENT: tl.constexpr = 1):
    """The `tokens` as they are, in a way that the compiler takes to depend on the `place` in the walk.

    Addresses of the bias and regions of the mask do not depend on it. Worked out ahead of the walk, as the compiler
    would, they take a hundred registers all along, where one more program could run. A place is never below 0, but the
    compiler must not know: it is a position or an image times an argument of the kernel. What is known to be a multiple
    of `ALIGNMENT` stays known to be.
    """
    return tokens + tl.minimum(place, 0) * ALIGNMENT  # m


@triton.jit
def are_in_window(tokens, WINDOW_AREA: tl.constexpr):
    """Whether the `tokens` of a tile lie before the window's end: no mask at all where the tiles fill the window."""
    if ((tokens.shape[0] - 1) & WINDOW_AREA) == 0:  # a tile is a power of two
        return tl.full(tokens.shape, 1, tl.int1)  # m
    return tokens < WINDOW_AREA  # m


@triton.jit
def locate_tokens(
    position, tokens, stride_h, stride_w, H, W, windows_w, roll_h, roll_w,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HAS_PAD: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Where the `tokens` of the window at `position` lie in an image.

    Returns the tokens' offsets in q, k and v, their pixels y * W + x for the contiguous maps, whether they are the
    window's, and whether they are the map's: a padded token is only the former.
    """
    in_window = are_in_window(tokens, WINDOW_H * WINDOW_W)  # m
    row = tokens // WINDOW_W + position // windows_w * WINDOW_H  # m, in the rolled and padded map
    col = tokens % WINDOW_W + position % windows_w * WINDOW_W  # m
    in_map = in_window
    if HAS_PAD:
        in_map = in_window & (row < H) & (col < W)
    y = row + roll_h  # m, in the caller's map
    y = tl.where(y >= H, y - H, y).to(OFFSET)
    x = col + roll_w
    x = tl.where(x >= W, x - W, x).to(OFFSET)
    return y * stride_h + x * stride_w, y * W + x, in_window, in_map


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
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PAD: tl.constexpr,
):  # fmt: skip
    """Tokens at `offsets`: [m, d]. A padded token is the row at `pad_ptr`, one outside the window is 0."""
    channels = tl.arange(0, BLOCK_D)  # d
    loaded = in_map[:, None]  # m 1
    if HEAD_DIM < BLOCK_D:
        loaded = loaded & (channels < HEAD_DIM)[None, :]  # m d
    tile = tl.load(ptr + offsets[:, None] + channels[None, :], mask=loaded, other=0.0, cache_modifier=".cg")  # m d
    if HAS_PAD:
        pad = tl.load(pad_ptr + channels, mask=channels < HEAD_DIM, other=0.0).to(tile.dtype)  # d
        tile = tl.where((in_window & (in_map == 0))[:, None], pad[None, :], tile)
    return tile  # m d


@triton.jit
def inverse_norm(tile, ACC: tl.constexpr):
    """1 / max(|token|, eps) of q or k [m, d], as torch.nn.functional.normalize divides: [m]."""
    wide = tile.to(ACC)
    square = tl.maximum(tl.sum(wide * wide, axis=1), NORM_EPS * NORM_EPS)  # m
    if tile.dtype == tl.float32:  # rsqrt is an approximation, whose error a large logit_scale multiplies
        return tl.div_rn(1.0, tl.sqrt_rn(square))
    return tl.rsqrt(square)


@triton.jit
def query_key_operand(tile, ACC: tl.constexpr, PRECISION: tl.constexpr, COSINE: tl.constexpr):
    """q or k as an operand [m, d], and what it was multiplied by [m]: 1, or for cosine attention its `inverse_norm`."""
    factor = tl.full([tile.shape[0]], 1.0, dtype=ACC)  # m
    operand = tile
    if COSINE:
        factor = inverse_norm(tile, ACC)
        operand = tile.to(ACC) * factor[:, None]
    return as_operand(operand, tile.dtype, PRECISION), factor


@triton.jit
def through_norm(grad, operand, inverse_norm, ACC: tl.constexpr, COSINE: tl.constexpr):
    """The gradient of q or k [m, d] from that of its `operand`, and the part of the latter along the operand: [m].

    For u = x / max(|x|, eps) that is (du - u (u . du)) / |x|, and du / eps where |x| is below (autograd of clamp_min).
    """
    along = tl.zeros([grad.shape[0]], dtype=ACC)
    if COSINE:
        unit = operand.to(ACC)  # m d
        along = tl.sum(unit * grad, axis=1)  # m
        removed = tl.where(inverse_norm < 0.999 / NORM_EPS, along, 0.0)
        grad = (grad - unit * removed[:, None]) * inverse_norm[:, None]
    return grad, along


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
    bias_ptr, head, num_heads, place, cut, cut_row, cut_col,
    ACC: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_TABLE: tl.constexpr, IS_SHIFTED: tl.constexpr,
):  # fmt: skip
    """What is added to the logits of one head in a window of one tile: the bias, the mask between tokens that only the
    roll made neighbours, and -inf for keys past the window's end: [m, n]. See `here` for the `place`. `IS_TABLE`: what
    `bias_ptr` points to is the bias's table.
    """
    WINDOW_AREA: tl.constexpr = WINDOW_H * WINDOW_W
    tokens = tl.arange(0, BLOCK_N)  # m, and n
    if IS_SHIFTED or IS_TABLE:  # these take so many registers that addresses must not take some ahead of time
        tokens = here(tokens, place, BLOCK_N)
    in_window = tokens < WINDOW_AREA
    tile = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC) + tl.where(in_window, 0.0, float("-inf"))[None, :]
    if IS_TABLE:
        rows = table_rows(tokens[:, None], tokens[None, :], WINDOW_H, WINDOW_W)  # m n
        inside = in_window[:, None] & in_window[None, :]  # m n
        tile = tl.load(bias_ptr + rows * num_heads + head, mask=inside, other=tile).to(ACC)
    elif HAS_BIAS:
        bias_ptr += here(head.to(tl.int64) * WINDOW_AREA * WINDOW_AREA, place, BLOCK_N)
        # 64 bits, in which the compiler sees that a thread's addresses are one and a constant.
        offsets = tokens.to(tl.int64)[:, None] * WINDOW_AREA + tokens[None, :]  # m n
        if WINDOW_AREA == BLOCK_N:
            tile = tl.load(bias_ptr + offsets).to(ACC)
        else:  # rows past the end are 0: nobody needs them, but NaN would spread from there
            tile = tl.load(bias_ptr + offsets, mask=in_window[:, None] & in_window[None, :], other=tile).to(ACC)
    if IS_SHIFTED:
        if cut != 0:
            region = token_region(tokens, cut, cut_row, cut_col, WINDOW_W)  # m, and n
            tile = tl.where(region[:, None] != region[None, :], tile + MASK_VALUE, tile)
    return tile  # m n


@triton.jit
def load_tiled_bias_tile(
    fragments_ptr, row, col,
    ACC: tl.constexpr, WINDOW_AREA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTENT: tl.constexpr,
    HAS_FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """What `load_bias_tile` gives, divided by the scale, for the tile of a larger window that starts at (`row`, `col`):
    [m, n]. The fragments are those of the window's cut.
    """
    if HAS_FRAGMENTS:
        return load_bias_fragments(fragments_ptr, row, col, EXTENT, BLOCK_M, BLOCK_N)  # m n
    tile = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if WINDOW_AREA % BLOCK_N != 0:
        cols = col + tl.arange(0, BLOCK_N)  # n
        tile += tl.where(cols < WINDOW_AREA, 0.0, float("-inf"))[None, :]
    return tile  # m n


@triton.jit
def tile_logits(
    q, k, bias_tile, scale, mask_ptr, image, rows, cols, num_masks,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WINDOW_AREA: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """q @ k^T * scale + bias + mask [m, n], for one scale or one a row [m, 1]."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale + bias_tile
    if HAS_MASK:
        logits += load_mask_tile(mask_ptr, image, rows, cols, num_masks, ACC, WINDOW_AREA)
    return logits  # m n


@triton.jit
def add_apart(product, x, factor=1.0):
    """product + x * factor, as the compiler does not make `x` what the product starts from."""
    return tl.fma(x, factor, product)


@triton.jit
def tile_scores(
    q, k, bias_tile, scale, mask_ptr, image, rows, cols, num_masks,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WINDOW_AREA: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The logits divided by the scale, q @ k^T + (bias + mask) / scale [m, n]; the `bias_tile` is so already."""
    if q.dtype == tl.float32:  # a bias to start from would coarsen the rounding of every term of the product
        scores = add_apart(tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC), bias_tile)
    else:
        scores = tl.dot(q, tl.trans(k), acc=bias_tile, input_precision=PRECISION, out_dtype=ACC)
    if HAS_MASK:
        scores += load_mask_tile(mask_ptr, image, rows, cols, num_masks, ACC, WINDOW_AREA) / scale
    return scores  # m n


@triton.jit
def load_mask_tile(mask_ptr, image, rows, cols, num_masks, ACC: tl.constexpr, WINDOW_AREA: tl.constexpr):
    """The explicit mask of a window: [m, n]."""
    in_window = (rows < WINDOW_AREA)[:, None] & (cols < WINDOW_AREA)[None, :]  # m n
    first = (image % num_masks).to(tl.int64) * WINDOW_AREA * WINDOW_AREA
    mask = tl.load(mask_ptr + first + rows[:, None] * WINDOW_AREA + cols[None, :], mask=in_window, other=0.0)  # m n
    # The lowest float32 stands for -inf in many a mask: multiplied it would be that, and -inf - -inf is NaN.
    mask = mask.to(ACC)
    return tl.where(mask < LOWEST_MASK, tl.where(mask == float("-inf"), mask, LOWEST_MASK), mask)


@triton.jit
def exp_from(logits, origin):
    """exp(logits - origin) [m, n] for an `origin` a row [m], in two steps: a multiply-add and an exp2."""
    return tl.exp2(tl.fma(logits, LOG2E, -(origin * LOG2E)[:, None]))


@triton.jit
def exp_from_score(scores, origin, scale):
    """exp(scale * (scores - origin)) [m, n] for an `origin` a row [m].

    The largest of a row becomes 1 exactly. A multiply-add instead would be a step less, but it takes the origin's
    product rounded, and where logits are large that shows.
    """
    return tl.exp2((scores - origin[:, None]) * (scale * LOG2E))


@triton.jit
def stats_offsets(window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """Places of the query `rows` in a tensor [windows, num_heads, N]."""
    return (window * num_heads + head) * WINDOW_AREA + rows  # m


@triton.jit
def store_stats(ptr, row_max, inverse_sum, window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """Keep what turns scores into probabilities, the maximum and 1 / sum of every row: [windows, num_heads, N, 2].

    Two numbers and not their logarithm: it would be rounded once for all keys of a row, and in float32 that error does
    not average out of the gradients.
    """
    offsets = 2 * stats_offsets(window, head, rows, num_heads, WINDOW_AREA)  # m
    in_window = are_in_window(rows, WINDOW_AREA)  # m
    tl.store(ptr + offsets, row_max, mask=in_window)
    tl.store(ptr + offsets + 1, inverse_sum, mask=in_window)


@triton.jit
def load_stats(ptr, window, head, rows, num_heads, WINDOW_AREA: tl.constexpr):
    """(row_max, inverse_sum) of the query `rows`; outside the window those that make every probability 0."""
    offsets = 2 * stats_offsets(window, head, rows, num_heads, WINDOW_AREA)  # m
    # Not 0: with the bias of the last row, which rows past the end have too, the exponential could overflow.
    in_window = are_in_window(rows, WINDOW_AREA)  # m
    row_max = tl.load(ptr + offsets, mask=in_window, other=float("inf"))  # m
    return row_max, tl.load(ptr + offsets + 1, mask=in_window, other=0.0)  # m
