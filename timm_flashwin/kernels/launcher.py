"""Launching a compiled kernel again without Triton's work of finding it, which takes longer than most kernels run."""

import torch
import triton
import triton.language as tl

_MAX_KNOWN = 4096  # arguments of every size that comes up are remembered: a bound for who never sees one twice
# Older launchers take other arguments than the newer ones, and always go the long way.
_REMEMBERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_known = {}


def launch(kernel, grid: tuple[int, ...], arguments: dict) -> None:
    """`kernel[grid](**arguments)`, on the current device, which is that of the tensors.

    Triton compiles by the dtypes of tensors, by whether they begin at a multiple of 16 bytes, and by properties of the
    numbers. Here the numbers themselves are the key, so that finding the kernel is one look into a dictionary.
    """
    key = (
        kernel.fn,
        *[
            (x.dtype, x.device, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else x
            for x in arguments.values()
        ],
    )
    compiled = _known.get(key)
    if compiled is not None:
        compiled[grid](*[arguments[name] for name in kernel.arg_names])
        return
    compiled = kernel[grid](**arguments)
    if _REMEMBERS and isinstance(compiled, triton.compiler.CompiledKernel):  # what the interpreter ran is not compiled
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = compiled


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel takes sums of `dtype` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
