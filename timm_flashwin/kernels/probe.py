"""Whether Triton can compile for a GPU at all, found out before a model depends on it."""

import textwrap

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(x_ptr, out_ptr):
    """x @ x^T of a 16x16 tile: what every kernel needs of a GPU and of a dtype."""
    rows = tl.arange(0, 16)
    offsets = rows[:, None] * 16 + rows[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(x, tl.trans(x), input_precision="ieee", out_dtype=tl.float32))


def compile_error(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot compile a kernel that works on `dtype` for this GPU, in one line; None where it can.

    No tensor is made and nothing launched, so that CUDA graphs may be under capture and a compiler may be tracing. It
    takes a quarter of a second the first time on a machine, and milliseconds out of Triton's cache.
    """
    try:
        with torch.cuda.device(device):
            probe_kernel.warmup(dtype, torch.float32, grid=(1,))
    except Exception as error:  # no C compiler, no folder to write to, a GPU newer than Triton, ...
        return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
    return None
