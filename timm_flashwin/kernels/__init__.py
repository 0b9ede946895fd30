"""The Triton kernels: the only folder that imports triton, and that only when a kernel is needed.

What has to be known without Triton stands here.
"""

import torch

ONE_TILE_AREA = 64  # a window of up to this many tokens is one tile
_ONE_TILE_TOKEN_BYTES = 256  # wider tokens (float32 at head_dim > 64) would take more shared memory than an sm_86 has


def needs_stats(window_area: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether such a window is cut into tiles: its backward then starts from the forward's `stats` and `out`."""
    return window_area > ONE_TILE_AREA or head_dim * dtype.itemsize > _ONE_TILE_TOKEN_BYTES
