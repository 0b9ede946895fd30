"""A Linear and the exact GELU after it in one kernel, for NVIDIA's sm_90: the widest map of a block is written once.

On Hopper a product of matrices and the arithmetic of an activation can run at the same time, but only if somebody sees
to it: this kernel is written in Gluon, where it is said which warps do what. One warp loads, two warpgroups of four
warps each take turns with the tensor cores: while one multiplies, the other activates and stores what it has.

Rows of x stay in shared memory while the weight streams past: with square tiles of both, fetching would take longer
than multiplying. That is why the product may be no longer than `MAX_IN_FEATURES`.

Shapes stand at the end of the line: m is rows of a panel, n output features of a tile, k input features of a chunk.
"""

import logging
import textwrap
from typing import NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..geometry import cdiv
from .launcher import remembered, runner
from .settings import multiprocessors_of

MAX_IN_FEATURES = 512  # more would not fit in shared memory, a panel of rows being there as a whole
ALIGNMENT = 16  # bytes: of addresses and rows, as TMA wants them

_PANEL, _TILE, _CHUNK = 128, 128, 64  # m, n, k
_STAGES = 4  # chunks of the weight in shared memory: those that are multiplied, and those that are fetched
_GROUPS = gl.constexpr(2)  # warpgroups that multiply
_REGISTERS, _LOADERS_REGISTERS = 240, 24  # a thread: a 128x128 tile takes 128 of them
# Up to here the bias goes into the sum first, which saves adding it; longer products would wait for it to be laid out.
_BIAS_FIRST_CHUNKS = gl.constexpr(4)
_WAVES = 4  # tiles a multiprocessor has to have: with fewer, cuBLAS cuts finer and is faster
_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_PROPAGATE_NAN = gl.constexpr(tl.PropagateNan.ALL)
_logger = logging.getLogger("timm_flashwin")


@gluon.jit
def gelu(x):
    """x * Phi(x), as max(x, 0) - |x| * Phi(-|x|), which leaves no difference of nearly equal numbers.

    log2(Phi(-a)) is close to a polynomial of degree 7, fitted for a of 0 to 6.5 (beyond it falls on, without a turn):
    the GELU is within 1.1e-7 and float32's roundings, Phi(-a) within 1.6e-4 of itself up to a = 6.
    """
    a = gl.minimum(gl.abs(x), 16.0)  # from where on the tail is 0, and infinity times 0 would not be
    log2_tail = 5.3511470468947664e-05 - 1.3759814692093641e-06 * a
    log2_tail = log2_tail * a - 0.0008782945806160569
    log2_tail = log2_tail * a + 0.008356270380318165
    log2_tail = log2_tail * a - 0.05376574024558067
    log2_tail = log2_tail * a - 0.45854517817497253
    log2_tail = log2_tail * a - 1.1512655019760132
    log2_tail = log2_tail * a - 0.9999873638153076
    return gl.maximum(x, 0.0, propagate_nan=_PROPAGATE_NAN) - a * gl.exp2(log2_tail)


@gluon.jit
def load_operands(
    x_desc, weight_desc, buffers, barriers, shares, shares_of_panel, tiles, CHUNKS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The loading warp: the panel chunk by chunk beside the first tile's weight, then the weight of the others."""
    x_chunks, weight_chunks, _ = buffers
    x_loaded, x_free, weight_loaded, weight_free = barriers
    PANEL: gl.constexpr = x_desc.block_type.shape[0]
    CHUNK: gl.constexpr = x_desc.block_type.shape[1]
    TILE: gl.constexpr = weight_desc.block_type.shape[0]
    stage, phase, panel_phase = 0, 1, 1  # a barrier nobody arrived at lets pass who waits for its last phase
    for share in range(gl.program_id(0), shares, gl.num_programs(0)):
        row = share // shares_of_panel * PANEL
        first = share % shares_of_panel * tiles
        for tile in range(tiles):
            for chunk in range(CHUNKS):
                if tile == 0:
                    mbarrier.wait(x_free.index(chunk), panel_phase)
                    mbarrier.expect(x_loaded.index(chunk), x_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        x_desc, [row, chunk * CHUNK], x_loaded.index(chunk), x_chunks.index(chunk)
                    )
                mbarrier.wait(weight_free.index(stage), phase)
                mbarrier.expect(weight_loaded.index(stage), weight_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    weight_desc, [(first + tile) * TILE, chunk * CHUNK], weight_loaded.index(stage),
                    weight_chunks.index(stage),
                )  # fmt: skip
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        panel_phase ^= 1


@gluon.jit
def multiply_and_activate(
    group, bias_ptr, out_desc, buffers, barriers, turns, shares, shares_of_panel, tiles, out_features,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, PANEL: gl.constexpr, TILE: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups: of every share of a panel each second tile."""
    x_chunks, weight_chunks, out_halves = buffers
    x_loaded, x_free, weight_loaded, weight_free = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )  # fmt: skip
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, layout))  # n
    BIAS_FIRST: gl.constexpr = HAS_BIAS and CHUNKS <= _BIAS_FIRST_CHUNKS
    out_half = out_halves.index(group)  # m n/2
    panels, turn = 0, 0  # how many have been before
    for share in range(gl.program_id(0), shares, gl.num_programs(0)):
        row = share // shares_of_panel * PANEL
        first = share % shares_of_panel * tiles
        for tile in range(group, tiles, _GROUPS):
            column = (first + tile) * TILE
            sums = gl.zeros([PANEL, TILE], gl.float32, layout)  # m n
            if HAS_BIAS:
                inside = column + columns < out_features
                bias = gl.load(bias_ptr + column + columns, mask=inside, other=0.0)  # n
            if BIAS_FIRST:
                sums, _ = gl.broadcast(bias.to(gl.float32)[None, :], sums)
            step = (panels * tiles + tile) * CHUNKS
            is_last = tile + _GROUPS >= tiles  # that this group makes of the panel
            # A barrier tells one phase from the next alone: who waits must not be two ahead. And the tensor cores are
            # a whole tile's at a time, so that its activation falls together with the next one's product.
            mbarrier.wait(turns.index(group), (turn ^ group ^ 1) & 1)
            for chunk in range(CHUNKS):
                stage = (step + chunk) % STAGES
                mbarrier.wait(x_loaded.index(chunk), panels & 1, pred=tile < _GROUPS)
                mbarrier.wait(weight_loaded.index(stage), (step + chunk) // STAGES & 1)
                sums = warpgroup_mma(
                    x_chunks.index(chunk), weight_chunks.index(stage).permute((1, 0)), sums,
                    use_acc=(chunk > 0) | BIAS_FIRST, is_async=True,
                )  # fmt: skip
                sums = warpgroup_mma_wait(1, deps=(sums,))  # the one before has read its chunks
                mbarrier.arrive(weight_free.index((step + chunk - 1) % STAGES), count=1, pred=chunk > 0)
                mbarrier.arrive(x_free.index(chunk - 1), count=1, pred=is_last & (chunk > 0))
            mbarrier.arrive(turns.index(1 - group), count=1)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(weight_free.index((step + CHUNKS - 1) % STAGES), count=1)
            mbarrier.arrive(x_free.index(CHUNKS - 1), count=1, pred=is_last)
            if HAS_BIAS and not BIAS_FIRST:
                sums += bias.to(gl.float32)[None, :]
            out = gelu(sums).to(out_desc.dtype)  # m n
            left, right = out.reshape(PANEL, 2, TILE // 2).permute(0, 2, 1).split()  # m n/2
            store_half(out_desc, out_half, left, row, column)
            store_half(out_desc, out_half, right, row, column + TILE // 2)
            turn += 1
        panels += 1
    tma.store_wait(0)


@gluon.jit
def store_half(out_desc, out_half, values, row, column):
    tma.store_wait(0)  # what was stored from there before has been read
    out_half.store(values)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], out_half)


# How many shares there are depends on the batch: one kernel for all of them.
@gluon.jit(do_not_specialize=["shares", "shares_of_panel", "tiles"])
def linear_gelu_kernel(
    x_desc, weight_desc, bias_ptr, out_desc, shares, shares_of_panel, tiles, out_features,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, LOADERS_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """gelu(x @ weight^T + bias).

    Grid: (programs,); each takes one share of a panel after the other: `tiles` tiles, an even number, of which those
    past the last output feature are computed in vain.
    """
    PANEL: gl.constexpr = x_desc.block_type.shape[0]
    CHUNK: gl.constexpr = x_desc.block_type.shape[1]
    TILE: gl.constexpr = weight_desc.block_type.shape[0]
    x_chunks = gl.allocate_shared_memory(x_desc.dtype, [CHUNKS, PANEL, CHUNK], x_desc.layout)
    weight_chunks = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TILE, CHUNK], weight_desc.layout)
    out_halves = gl.allocate_shared_memory(x_desc.dtype, [_GROUPS, PANEL, TILE // 2], out_desc.layout)
    barriers = (
        make_barriers(CHUNKS, 1),
        make_barriers(CHUNKS, _GROUPS),
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 1),
    )
    turns = make_barriers(_GROUPS, 1)
    buffers = (x_chunks, weight_chunks, out_halves)
    gl.warp_specialize(
        [
            (multiply_and_activate, (
                0, bias_ptr, out_desc, buffers, barriers, turns, shares, shares_of_panel, tiles, out_features,
                CHUNKS, STAGES, PANEL, TILE, HAS_BIAS,
            )),
            (multiply_and_activate, (
                1, bias_ptr, out_desc, buffers, barriers, turns, shares, shares_of_panel, tiles, out_features,
                CHUNKS, STAGES, PANEL, TILE, HAS_BIAS,
            )),
            (load_operands, (
                x_desc, weight_desc, buffers, barriers, shares, shares_of_panel, tiles, CHUNKS, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, LOADERS_REGISTERS],
    )  # fmt: skip


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers in shared memory, each of whose phases ends with so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


class LinearGelu:
    """The kernel for one shape."""

    def __init__(
        self, compiled, described: list[TensorDescriptor], numbers: tuple[int, ...], grid: tuple[int, int, int]
    ):
        self._run, self._described, self._numbers = runner(compiled, grid), described, numbers

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Fill `out` [rows, out_features] from `x` [rows, in_features]; all contiguous, at addresses that
        `ALIGNMENT` divides."""
        x_desc, weight_desc, out_desc = map(_described, self._described, (x, weight, out))
        bias_address = (x if bias is None else bias).data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        self._run(stream, x_desc, weight_desc, bias_address, out_desc, *self._numbers)


def _described(descriptor: TensorDescriptor, tensor: torch.Tensor) -> TensorDescriptor:
    """The same of `tensor`; the constructor would check once more, each time, what is known."""
    other = object.__new__(TensorDescriptor)
    other.__dict__.update(descriptor.__dict__, base=tensor)
    return other


class _StandIn(NamedTuple):
    """What a descriptor needs to know of a tensor before there is one."""

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return 0


def fills(device: torch.device, rows: int, out_features: int) -> bool:
    """Whether there are tiles enough for all of the device; with fewer, two kernels are faster."""
    return cdiv(rows, _PANEL) * cdiv(out_features, _TILE) >= _WAVES * multiprocessors_of(device)


@remembered
def linear_gelu_for(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, has_bias: bool, device: torch.device
) -> LinearGelu | None:
    """The kernel for a call that `fills` the device; None, logged, where it cannot run."""
    compiled = _compiled(in_features, out_features, dtype, has_bias, device)
    if compiled is None:
        return None
    multiprocessors = multiprocessors_of(device)
    shares, *split = _shares(rows, out_features, multiprocessors)
    numbers = shares, *split, *_constants(in_features, out_features, has_bias)
    grid = min(shares, multiprocessors), 1, 1
    return LinearGelu(compiled, _descriptors(rows, in_features, out_features, dtype), numbers, grid)


@remembered
def _compiled(in_features: int, out_features: int, dtype: torch.dtype, has_bias: bool, device: torch.device):
    """The kernel for any number of rows, loaded; None, logged, where that fails."""
    try:
        compiled = compile_linear_gelu(in_features, out_features, dtype, has_bias)
        compiled[(1, 1, 1)]  # loads it
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        _logger.warning("a Linear and its GELU run in two kernels: the one cannot be compiled or loaded (%s)", reason)
        return None
    return compiled


def compile_linear_gelu(in_features: int, out_features: int, dtype: torch.dtype, has_bias: bool):
    """The kernel, compiled for Triton's current target. Raises what Triton raises where it cannot."""
    x, weight, out = _descriptors(1, in_features, out_features, dtype)
    numbers = 1, 1, 2, *_constants(in_features, out_features, has_bias)
    return linear_gelu_kernel.warmup(x, weight, dtype, out, *numbers, grid=(1, 1, 1), num_warps=4)


def _descriptors(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> list[TensorDescriptor]:
    """Of x, weight and output, of no tensor yet."""
    sizes = (rows, in_features), (out_features, in_features), (rows, out_features)
    blocks = [_PANEL, _CHUNK], [_TILE, _CHUNK], [_PANEL, _TILE // 2]
    layouts = [gl.NVMMASharedLayout.get_default_for(block, _GLUON[dtype]) for block in blocks]
    return [
        TensorDescriptor(_StandIn(dtype), list(size), [size[1], 1], block, layout)
        for size, block, layout in zip(sizes, blocks, layouts, strict=True)
    ]


def _constants(in_features: int, out_features: int, has_bias: bool) -> tuple[int, ...]:
    """What the kernel takes after the numbers that depend on the rows."""
    return out_features, cdiv(in_features, _CHUNK), _STAGES, _REGISTERS, _LOADERS_REGISTERS, has_bias


def _shares(rows: int, out_features: int, multiprocessors: int) -> tuple[int, int, int]:
    """(shares of all panels, shares of a panel, tiles of a share): of the even cuts that after which the busiest
    multiprocessor is done first, a panel that has to be fetched costing as much as a tile."""
    panels, pairs = cdiv(rows, _PANEL), cdiv(out_features, 2 * _TILE)
    _, shares_of_panel = min(
        (cdiv(panels * shares, multiprocessors) * (2 * pairs // shares + 1), shares)
        for shares in range(1, pairs + 1)
        if pairs % shares == 0
    )
    return panels * shares_of_panel, shares_of_panel, 2 * pairs // shares_of_panel
