"""The mask of the cyclic shift, added between tokens that only the roll made neighbours (geometry.shift_mask)."""

import triton
import triton.language as tl

MASK_VALUE = tl.constexpr(-100.0)  # geometry.MASK_VALUE
CUTS = 4  # how many values `window_cut` has


@triton.jit
def window_cut(position, windows_w, cut_window_h, cut_window_w):
    """The axes along which the cut of the cyclic shift (geometry.shift_cut) runs through a window: 2 for h, 1 for w."""
    cut_h = tl.cast(position // windows_w == cut_window_h, tl.int32)
    return 2 * cut_h + tl.cast(position % windows_w == cut_window_w, tl.int32)


@triton.jit
def token_region(tokens, cut, cut_row, cut_col, WINDOW_W: tl.constexpr):
    """geometry.region_ids of the `tokens` of one window, as far as they differ in it: [m]."""
    region = 2 * (tokens // WINDOW_W >= cut_row).to(tl.int32) + (tokens % WINDOW_W >= cut_col).to(tl.int32)
    return region & cut
