"""How each kernel is cut and compiled: measured rows where there are some, rules elsewhere.

Settings follow from the shape, the dtype and the device; nothing is timed on the user's first call.
`scripts/tune.py` times the neighbours of the settings in force, each gated on correctness, on any GPU.
"""

import functools
from typing import NamedTuple

import torch
import triton

from ..geometry import cdiv
from .launcher import INTERPRETED

KERNELS = ("forward", "forward_tiled", "backward", "backward_dq", "backward_dkdv", "backward_dbias")


class Settings(NamedTuple):
    """How one kernel is cut and compiled."""

    block_m: int  # query tokens in a tile
    block_n: int  # key tokens in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int  # how many programs share the windows, per multiprocessor
    max_registers: int | None = None  # a thread; NVIDIA's compiler alone takes it

    def options(self, device: torch.device) -> dict:
        """As a kernel takes them."""
        options = dict(
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages
        )  # fmt: skip
        if self.max_registers is not None and isinstance(target_arch(device), int):
            options["maxnreg"] = self.max_registers
        return options


# (target, kernel, cosine) -> settings for tokens of up to 64 bytes: head_dim up to 32 in 16 bits. On H200 and H100.
_MEASURED = {
    # Keys and values are fetched two tiles ahead, and four programs fit with 128 registers each.
    (90, "forward_tiled", False): Settings(64, 64, 4, num_stages=3, programs_per_sm=4, max_registers=128),
    (90, "forward_tiled", True): Settings(64, 64, 4, num_stages=3, programs_per_sm=4, max_registers=128),
    # Three programs fit with 168 registers each.
    (90, "backward_dq", False): Settings(64, 64, 4, num_stages=3, programs_per_sm=3, max_registers=168),
    (90, "backward_dq", True): Settings(64, 64, 4, num_stages=3, programs_per_sm=3, max_registers=168),
    # What is fetched ahead would take registers that there are not.
    (90, "backward_dkdv", False): Settings(64, 64, 4, num_stages=1, programs_per_sm=3, max_registers=168),
    (90, "backward_dkdv", True): Settings(64, 64, 4, num_stages=1, programs_per_sm=3, max_registers=168),
    # It has no product that waits for another one, and all its tiles can be fetched ahead.
    (90, "backward_dbias", False): Settings(64, 64, 4, num_stages=3, programs_per_sm=3, max_registers=168),
    (90, "backward_dbias", True): Settings(64, 64, 4, num_stages=3, programs_per_sm=3, max_registers=168),
}
# Where half of the last key tile or more would lie past the window's end (12x12, 14x14): narrower tiles, less in vain.
_MEASURED_NARROW = {
    (90, "forward_tiled", False): Settings(64, 32, 4, num_stages=3, programs_per_sm=5, max_registers=96),
    (90, "backward_dq", False): Settings(64, 32, 4, num_stages=3, programs_per_sm=4, max_registers=128),
    (90, "backward_dbias", False): Settings(64, 32, 4, num_stages=3, programs_per_sm=3, max_registers=168),
    (90, "backward_dbias", True): Settings(64, 32, 4, num_stages=3, programs_per_sm=3, max_registers=168),
}


@functools.cache
def settings_for(
    kernel: str, window_area: int, head_dim: int, dtype: torch.dtype, cosine: bool, device: torch.device
) -> Settings:  # fmt: skip
    """Settings of one of `KERNELS` for a shape, a dtype and a device."""
    token_bytes = block_d(head_dim) * dtype.itemsize  # what one token of one head takes in a tile
    if kernel == "forward":
        return _one_tile_forward(window_area, token_bytes, cosine, device)
    if kernel == "backward":
        return _one_tile_backward(window_area, token_bytes, device)
    if INTERPRETED:
        # A tile costs the same Python whatever its size: few, and not square, so that rows do not pass for columns.
        return Settings(128, 64, num_warps=1, num_stages=1, programs_per_sm=1)
    key = target_arch(device), kernel, cosine
    if token_bytes <= 64 and key in _MEASURED:
        measured = _MEASURED[key]
        overhang = -window_area % measured.block_n
        return _MEASURED_NARROW.get(key, measured) if overhang >= measured.block_n // 2 else measured
    if kernel == "forward_tiled":
        return _tiled_forward(window_area, token_bytes, cosine, device)
    if kernel == "backward_dbias":
        block_m = 32 if token_bytes > 256 else 64
        return Settings(block_m, 32, num_warps=4, num_stages=1, programs_per_sm=4, max_registers=255)
    return _tiled_backward(kernel, token_bytes, device)


@functools.lru_cache(maxsize=1024)
def split_in_step(num_positions: int, num_images: int, programs: int) -> tuple[int, int]:
    """(groups, lanes), groups * lanes <= `programs`, for `places_in_step`.

    Of the splits in which the busiest program has the fewest windows it is the one of the fewest programs, and of
    those the one that reads the most of an image at a time.
    """
    splits = []
    for groups in range(1, min(num_positions, programs) + 1):
        lanes = max(1, min(num_images, programs // groups))
        busiest = cdiv(num_positions, groups) * cdiv(num_images, lanes)
        splits.append((busiest, groups * lanes, -groups, lanes))
    _, _, minus_groups, lanes = min(splits)
    return -minus_groups, lanes


@functools.cache
def block_d(head_dim: int) -> int:
    """Channels of a tile: a power of two, and what a tensor core takes at least."""
    return max(16, triton.next_power_of_2(head_dim))


def _one_tile_forward(window_area: int, token_bytes: int, cosine: bool, device: torch.device) -> Settings:
    block = max(16, triton.next_power_of_2(window_area))
    warps = 8 if token_bytes > 256 else 4
    if window_area == block and not cosine and _has_wgmma(device):
        # A full tile has nothing to mask: with a little help a fourth program finds its registers.
        stages = 2 if token_bytes <= 64 else 1
        return Settings(block, block, warps, stages, programs_per_sm=4, max_registers=128 if warps == 4 else None)
    # Small tokens leave shared memory to fetch the next windows ahead of time; wide ones would crowd out programs.
    stages = 3 if token_bytes <= 64 else 1
    # Left alone, the compiler takes more registers than three programs have.
    max_registers = 168 if stages == 3 and _has_wgmma(device) else None
    return Settings(block, block, warps, stages, programs_per_sm=3, max_registers=max_registers)


def _one_tile_backward(window_area: int, token_bytes: int, device: torch.device) -> Settings:
    block = max(16, triton.next_power_of_2(window_area))
    # Four warps keep four 64x64 float32 tiles in registers; wide tokens beside them need eight. Fetching ahead pays
    # where the tensor cores read from shared memory (wgmma); elsewhere its registers are spilled ones.
    warps = 8 if token_bytes > 128 else 4
    stages = 3 if token_bytes <= 64 and _has_wgmma(device) else 1
    # Two programs are what a multiprocessor holds of this kernel: one wave, each walking through its windows.
    return Settings(block, block, warps, stages, programs_per_sm=2)


def _tiled_forward(window_area: int, token_bytes: int, cosine: bool, device: torch.device) -> Settings:
    block_m = 32 if token_bytes > 256 else 64
    if _has_wgmma(device):
        return Settings(block_m, 32, num_warps=4, num_stages=1, programs_per_sm=8)
    # Both operands of a product take registers: two images at a time would spill.
    block_n = 64 if window_area > 256 and token_bytes <= 128 and not cosine else 32
    # Left alone, the compiler spills a few registers to fit one more program in.
    return Settings(block_m, block_n, num_warps=4, num_stages=1, programs_per_sm=8, max_registers=255)


def _tiled_backward(kernel: str, token_bytes: int, device: torch.device) -> Settings:
    """dq, and dk and dv."""
    if token_bytes > 256:
        return Settings(32, 32, num_warps=4, num_stages=1, programs_per_sm=4)
    if _has_wgmma(device):
        return Settings(64, 32 if token_bytes > 128 else 64, num_warps=4, num_stages=1, programs_per_sm=4)
    if kernel == "backward_dq" and token_bytes <= 64:
        # The tile of the bias that is fetched ahead would spill from four warps.
        return Settings(64, 32, num_warps=8, num_stages=1, programs_per_sm=1, max_registers=255)
    # A 64x64 tile would spill: the side that a program is pinned to is the longer one.
    pinned, walked = 64 if token_bytes <= 64 else 32, 32
    block_m, block_n = (walked, pinned) if kernel == "backward_dkdv" else (pinned, walked)
    return Settings(block_m, block_n, num_warps=4, num_stages=1, programs_per_sm=4, max_registers=255)


def _has_wgmma(device: torch.device) -> bool:
    return target_arch(device) == 90


@functools.cache
def target_arch(device: torch.device) -> int | str:
    """What Triton compiles for: 90 for sm_90, "gfx942" for that; 0 in the interpreter."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """How many the GPU has; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
