"""Launching a kernel with next to nothing done twice: Triton's way to a launch takes longer than most kernels run."""

import functools
from collections.abc import Callable
from operator import add, or_

import torch
import triton
import triton.language as tl

from .scale import load_scale

# TRITON_INTERPRET=1 was set when the kernels were defined: they run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(load_scale, triton.runtime.JITFunction)

_MAX_REMEMBERED = 4096  # launches of each kind: sizes that come up are remembered, with a bound for ever new ones
_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
# Older launchers take other arguments than the newer ones, and always go the long way.
_REMEMBERS = _TRITON >= (3, 3)
_HAS_KNOWN_RUN = (3, 4) <= _TRITON <= (3, 8)  # the versions whose `CompiledKernel.run` was looked at
_HOOK_CHAIN = getattr(getattr(triton, "knobs", None), "HookChain", None)
_caches = []


def runner(compiled, grid: tuple[int, int, int]) -> Callable[..., None]:
    """`compiled[grid]`, loaded: called with the stream and the arguments of the kernel, it launches.

    Triton's own makes up what a profiler's hooks are told, and calls them, also where there are none, which takes as
    long as the launch.
    """
    tritons = compiled[grid]
    if not _HAS_KNOWN_RUN:
        return lambda stream, *arguments: tritons(*arguments, stream=stream)
    run, between = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)

    def launch(stream: int, *arguments) -> None:
        hooks = triton.knobs.runtime
        if _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook):
            tritons(*arguments, stream=stream)
        else:
            run(*grid, stream, *between, *arguments)

    return launch


def _is_set(hook) -> bool:
    """Whether a hook of Triton's does anything: a chain, which may be empty, or a function or None in its place."""
    return bool(hook.calls) if type(hook) is _HOOK_CHAIN else hook is not None


class Launch:
    """A kernel with its grid and all of its arguments but the tensors: called with those, it runs.

    The tensors come first among the arguments of every kernel, and their names end in `_ptr`. From call to call they
    keep their dtypes and their device, which is the current one. Triton compiles by whether an address is a multiple of
    16 bytes, so here that is all there is to look at.
    """

    def __init__(self, kernel, grid: tuple[int, int, int], arguments: dict, offsets: dict[str, int] | None = None):
        """`arguments`: by name, Triton's options among them. `offsets`: of tensors that the kernel shall see from
        another element on than their first."""
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        tensors = [name for name in kernel.arg_names if name.endswith("_ptr")]
        self._offsets = [(offsets or {}).get(name, 0) for name in tensors]
        self._numbers = [arguments[name] for name in kernel.arg_names[len(tensors) :]]
        self._bytes = None  # the offsets, once the dtypes are seen
        self._compiled = {}  # by which addresses are aligned; 0 where all are

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self._bytes is None:
            self._bytes = [offset * x.element_size() for offset, x in zip(self._offsets, tensors, strict=True)]
        # Addresses, not tensors: Triton's launcher would ask the driver about every one of those.
        addresses = list(map(add, map(torch.Tensor.data_ptr, tensors), self._bytes))
        # One look at all of them; at each only where not all are aligned.
        aligned = functools.reduce(or_, addresses) % 16 and tuple([address % 16 == 0 for address in addresses])
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled(torch._C._cuda_getCurrentRawStream(tensors[0].device.index), *addresses, *self._numbers)
            return
        shifted = [
            x.as_strided((1,), (1,), x.storage_offset() + offset) if offset else x
            for x, offset in zip(tensors, self._offsets, strict=True)
        ]
        compiled = self._kernel[self._grid](*shifted, **self._arguments)
        if _REMEMBERS and isinstance(compiled, triton.compiler.CompiledKernel):  # not so what the interpreter ran
            self._compiled[aligned] = runner(compiled, self._grid)


def remembered(build):
    """Make a function that builds a launch (or a few) build it once for each set of arguments."""
    cached = functools.lru_cache(maxsize=_MAX_REMEMBERED)(build)
    _caches.append(cached)
    return cached


def forget() -> None:
    """Build every launch anew: for who changes what they are built from, such as the settings."""
    for cached in _caches:
        cached.cache_clear()


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel takes sums of `dtype` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dtype_of(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


def dtypes_of(*tensors: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    """`dtype_of` each, without a call for each."""
    return tuple([None if x is None else x.dtype for x in tensors])
