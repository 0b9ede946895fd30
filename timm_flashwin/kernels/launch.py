"""What a call of the attention launches: each kernel's grid, its arguments, and where its partial sums go."""

from typing import NamedTuple

import torch
import triton.language as tl

from ..geometry import cdiv, num_windows, shift_cut
from . import needs_stats
from .backward import backward_dbias_kernel, backward_dkdv_kernel, backward_dq_kernel, backward_kernel
from .bias_fragments import STRIP, bias_fragments_launch
from .forward import forward_kernel, forward_tiled_kernel
from .launcher import INTERPRETED as INTERPRETED
from .launcher import Launch, acc_type, dtype_of, dtypes_of, remembered
from .partial_sums import Programs, partial_sums_launch
from .settings import Settings, block_d, multiprocessors_of, settings_for, split_in_step


class Call(NamedTuple):
    """What the launches of a call follow from: everything but the tensors themselves, so that it can be looked up."""

    shape: tuple[int, ...]  # of q, k and v: B, H, W, num_heads, head_dim
    strides: tuple[int, ...]  # of q, k and v, along all of these but the last, where it is 1
    offsets: tuple[int, int, int]  # elements from where their tensors begin to q, k and v
    dtype: torch.dtype
    device: torch.device
    bias: torch.dtype | None  # dtypes of what there is beside them
    is_table: bool  # whether the bias is given by its table; the forward takes it
    mask: torch.dtype | None
    num_masks: int
    pad: torch.dtype | None  # None where nothing is padded
    logit_scale: torch.dtype | None  # cosine attention, and scale is not used
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    scale: float
    precision: str  # of products

    @property
    def cosine(self) -> bool:
        return self.logit_scale is not None

    @property
    def window_area(self) -> int:
        return self.window_size[0] * self.window_size[1]

    @property
    def windows(self) -> tuple[int, int]:
        """How many windows an image has along each axis."""
        return num_windows(self.shape[1:3], self.window_size)

    @property
    def num_positions(self) -> int:
        """Windows of one image."""
        rows, cols = self.windows
        return rows * cols

    @property
    def cut(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """geometry.shift_cut."""
        return shift_cut(self.shape[1:3], self.window_size, self.shift_size)

    @property
    def is_shifted(self) -> bool:
        return any(self.shift_size)

    @property
    def acc_dtype(self) -> torch.dtype:
        """What sums are taken in."""
        return torch.promote_types(self.dtype, torch.float32)

    def settings(self, kernel: str) -> Settings:
        """Of one of `settings.KERNELS` for this call."""
        return settings_for(kernel, self.window_area, self.shape[4], self.dtype, self.cosine, self.device)

    def arguments(self, settings: Settings) -> dict:
        """Those that every kernel has."""
        B, H, W, num_heads, head_dim = self.shape
        rows, cols = self.windows
        cut_h, cut_w = self.cut
        image_extent = max(H * self.strides[1] + W * self.strides[2], 3 * H * W * num_heads * head_dim)
        return dict(
            stride_b=self.strides[0], stride_h=self.strides[1], stride_w=self.strides[2], stride_head=self.strides[3],
            H=H, W=W, windows_w=cols, num_positions=rows * cols, num_images=B, num_masks=self.num_masks,
            num_heads=num_heads, scale=self.scale,
            # A roll by more than the map wraps around; the cut is made by the shift as given.
            roll_h=self.shift_size[0] % H, roll_w=self.shift_size[1] % W,
            cut_window_h=cut_h[0], cut_window_w=cut_w[0],
            HEAD_DIM=head_dim, WINDOW_H=self.window_size[0], WINDOW_W=self.window_size[1], BLOCK_D=block_d(head_dim),
            HAS_MASK=self.mask is not None, HAS_PAD=self.pad is not None, COSINE=self.cosine,
            ACC=acc_type(self.dtype), PRECISION=self.precision,
            OFFSET=tl.int32 if image_extent < 2**31 else tl.int64,
            **settings.options(self.device),
        )  # fmt: skip

    def one_tile_arguments(self, kernel: str) -> tuple[int, dict]:
        """(how many programs a head gets, what every kernel of one tile has)."""
        settings = self.settings(kernel)
        programs, groups = self.programs_in_step(settings)
        (_, cut_row), (_, cut_col) = self.cut
        return programs, self.arguments(settings) | dict(
            groups=groups, cut_row=cut_row, cut_col=cut_col, HAS_BIAS=self.bias is not None, IS_SHIFTED=self.is_shifted
        )

    @property
    def has_fragments(self) -> bool:
        """Whether the tiled kernels have something to add to their scores: see `bias_fragments`."""
        return self.bias is not None or self.is_shifted

    def qkv_offsets(self) -> dict[str, int]:
        return dict(zip(("q_ptr", "k_ptr", "v_ptr"), self.offsets, strict=True))

    def bias_extent(self, *settings: Settings) -> int:
        """Of the bias fragments, wide enough for the tiles of each of the `settings`."""
        tile = max(STRIP, *(max(s.block_m, s.block_n) for s in settings))
        return cdiv(self.window_area, tile) * tile

    def shares(self, pinned: int, settings: Settings) -> int:
        """Into how many shares the windows are cut, where each takes `pinned` programs: all of them are one wave."""
        programs = multiprocessors_of(self.device) * settings.programs_per_sm
        return max(1, min(self.shape[0] * self.num_positions, programs // pinned))

    def programs_in_step(self, settings: Settings) -> tuple[int, int]:
        """(how many programs a head gets, how many groups they form), for the kernels of one tile."""
        shares = self.shares(self.shape[3], settings)
        groups, lanes = split_in_step(self.num_positions, self.shape[0], shares)
        return groups * lanes, groups

    def placed_grid(self, pinned: int, settings: Settings) -> tuple[tuple[int, int, int], dict]:
        """(grid, what `placed_program` takes) for `pinned` programs a share, counting from multiprocessor to
        multiprocessor."""
        shares, multiprocessors = self.shares(pinned, settings), multiprocessors_of(self.device)
        layers = cdiv(pinned * shares, multiprocessors)
        return (multiprocessors * layers, 1, 1), dict(shares=shares, multiprocessors=multiprocessors)


class Operands(NamedTuple):
    """The tensors that every kernel takes, in the order in which it does. Where one is not there, q stands for it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pad: torch.Tensor  # [3 * num_heads * head_dim]
    bias: torch.Tensor  # [num_heads, N, N], or its table, [(2 * Wh - 1) * (2 * Ww - 1), num_heads]
    mask: torch.Tensor  # [nW, N, N]
    logit_scale: torch.Tensor  # [num_heads]


def call_on_map(qkv, bias, pad_qkv, logit_scale, num_heads, window_size, shift_size, scale) -> tuple[Call, Operands]:
    """A call of `window_attention`."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    call = _map_call(
        qkv.shape, qkv.stride(), qkv.dtype, qkv.device, dtype_of(bias), bias is not None and bias.dim() == 2,
        dtype_of(pad_qkv), dtype_of(logit_scale), num_heads, tuple(window_size), tuple(shift_size), scale,
        dot_precision(qkv.dtype),
    )  # fmt: skip
    pad = None
    if call.pad is not None:
        pad = qkv.new_zeros(qkv.shape[-1]) if pad_qkv is None else pad_qkv.contiguous()
    return call, _operands(qkv, qkv, qkv, pad, bias, None, logit_scale)


@remembered
def _map_call(
    shape, strides, dtype, device, bias, is_table, pad_qkv, logit_scale, num_heads, window_size, shift_size, scale,
    precision,
) -> Call:  # fmt: skip
    B, H, W, three_c = shape
    C = three_c // 3
    head_dim = C // num_heads
    is_padded = H % window_size[0] or W % window_size[1]
    return Call(
        (B, H, W, num_heads, head_dim), (*strides[:3], head_dim), (0, C, 2 * C), dtype, device, bias, is_table, None, 1,
        (pad_qkv or dtype) if is_padded else None, logit_scale, window_size, shift_size, scale, precision,
    )  # fmt: skip


def call_on_windows(q, k, v, bias, mask, logit_scale, scale) -> tuple[Call, Operands]:
    """A call of `windowed_sdpa`: windows [B_, num_heads, N, head_dim] are maps of N x 1 tokens."""
    if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    call = _windows_call(
        q.shape, q.stride(), q.dtype, q.device, dtype_of(bias), dtype_of(mask), 1 if mask is None else mask.shape[0],
        dtype_of(logit_scale), scale, dot_precision(q.dtype),
    )  # fmt: skip
    return call, _operands(q, k, v, None, bias, mask, logit_scale)


@remembered
def _windows_call(shape, strides, dtype, device, bias, mask, num_masks, logit_scale, scale, precision) -> Call:
    B_, num_heads, N, head_dim = shape
    stride_b, stride_head, stride_token, _ = strides
    return Call(
        (B_, N, 1, num_heads, head_dim), (stride_b, stride_token, stride_token, stride_head), (0, 0, 0), dtype, device,
        bias, False, mask, num_masks, None, logit_scale, (N, 1), (0, 0), scale, precision,
    )  # fmt: skip


def _operands(q, k, v, *others: torch.Tensor | None) -> Operands:
    return Operands(q, k, v, *[q if x is None else x.contiguous() for x in others])


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's switch for CUDA matmuls; other dtypes do not look at it."""
    if dtype != torch.float32:
        return "ieee"
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer of torch's two switches was used, which forbids reading the older
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


# ------------------------------------------------------------------------------------------------------- forward

_FEW = 3  # windows and heads a multiprocessor: a forward has about as many programs


def reads_table(windows: int, num_heads: int, device: torch.device) -> bool:
    """Whether a forward of so many windows shall be given the table of the bias.

    It saves the launch that makes the bias, for which the host is waited for where there are few windows. Where there
    are many, programs for windows of one tile would gather from the table time and again what of a bias they read in
    rows.
    """
    return windows * num_heads <= _FEW * multiprocessors_of(device)


def launch_forward(call: Call, operands: Operands, out: torch.Tensor, stats: torch.Tensor | None) -> None:
    """Fill `out`, a contiguous map [B, H, W, num_heads * head_dim], and, if given, `stats` [B*nW, num_heads, N, 2]."""
    if not needs_stats(call.window_area, call.shape[4], call.dtype):
        _forward(call)(*operands, out)
        return
    launch, extent = _forward_tiled(call, stats is not None)
    launch(*_with_bias_fragments(call, operands, extent), out, out if stats is None else stats)


@remembered
def _forward(call: Call) -> Launch:
    programs, arguments = call.one_tile_arguments("forward")
    arguments |= dict(IS_TABLE=call.is_table)
    return Launch(forward_kernel, (call.shape[3], programs, 1), arguments, call.qkv_offsets())


@remembered
def _forward_tiled(call: Call, save_stats: bool) -> tuple[Launch, int]:
    """(launch, extent of the bias fragments)."""
    settings = call.settings("forward_tiled")
    extent = call.bias_extent(settings)
    grid, placed = call.placed_grid(call.shape[3] * cdiv(call.window_area, settings.block_m), settings)
    arguments = call.arguments(settings) | placed
    arguments |= dict(EXTENT=extent, HAS_FRAGMENTS=call.has_fragments, SAVE_STATS=save_stats)
    return Launch(forward_tiled_kernel, grid, arguments, call.qkv_offsets()), extent


def _with_bias_fragments(call: Call, operands: Operands, extent: int) -> Operands:
    """The operands of the tiled kernels: fragments in place of the bias."""
    if not call.has_fragments:
        return operands
    launch, shape = _bias_fragments(call, extent)
    fragments = operands.q.new_empty(shape, dtype=call.acc_dtype)
    launch(operands.bias, operands.logit_scale, fragments)
    return operands._replace(bias=fragments)


@remembered
def _bias_fragments(call: Call, extent: int) -> tuple[Launch, tuple[int, ...]]:
    """(launch, shape of the fragments)."""
    (_, cut_row), (_, cut_col) = call.cut
    return bias_fragments_launch(
        call.shape[3], call.window_size, (cut_row, cut_col) if call.is_shifted else None, call.scale,
        call.bias is not None, call.is_table, call.cosine, call.acc_dtype, extent,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ backward


class SharedGrads(NamedTuple):
    """The gradients of what all windows share, contiguous and of any float dtype; None where nobody asks for one."""

    dbias: torch.Tensor | None  # [num_heads, N, N]
    dpad_qkv: torch.Tensor | None  # [3 * num_heads * head_dim]
    dlogit_scale: torch.Tensor | None  # [num_heads]


class Needs(NamedTuple):
    """Which partial sums the kernels shall leave."""

    dbias: bool
    dpad: bool
    dlogit_scale: bool


def launch_backward(
    call: Call,
    operands: Operands,
    do: torch.Tensor,
    out: torch.Tensor | None,
    stats: torch.Tensor | None,
    grads: tuple[torch.Tensor, ...],
    shared_grads: SharedGrads,
) -> None:
    """Fill `grads` and those of `shared_grads` that there are.

    `do` and `out` are contiguous maps [B, H, W, num_heads * head_dim]; `out` and `stats` are read only where
    `needs_stats` says so. `grads` are contiguous maps too: dq, dk and dv, or one of 3 * num_heads * head_dim channels.
    """
    needs = Needs(
        shared_grads.dbias is not None,
        shared_grads.dpad_qkv is not None and call.pad is not None,
        shared_grads.dlogit_scale is not None,
    )
    is_packed = len(grads) == 1
    dq_dk_dv = grads * 3 if is_packed else grads
    if needs_stats(call.window_area, call.shape[4], call.dtype):
        partials, programs = _launch_tiled_backward(call, operands, do, out, stats, dq_dk_dv, is_packed, needs)
    else:
        partials, programs = _launch_one_tile_backward(call, operands, do, dq_dk_dv, is_packed, needs)
    sizes = tuple([0 if grad is None else grad.numel() for grad in shared_grads])
    if any(sizes):
        launch = _partial_sums(sizes, programs, call.acc_dtype, dtypes_of(*shared_grads), call.device)
        launch(*partials, operands.logit_scale, *[do if grad is None else grad for grad in shared_grads])


@remembered
def _partial_sums(sizes: tuple[int, ...], programs: Programs, acc_dtype: torch.dtype, dtypes: tuple, device) -> Launch:
    return partial_sums_launch(sizes, programs, acc_dtype)


def _room(call: Call, do: torch.Tensor, needed: bool, *shape: int) -> torch.Tensor:
    """Room for one partial sum a program; any tensor where a kernel is not going to touch it."""
    return do.new_empty(shape, dtype=call.acc_dtype) if needed else do


def _launch_one_tile_backward(call: Call, operands: Operands, do, dq_dk_dv, is_packed: bool, needs: Needs):
    """Partial sums of dbias, dpad and dlogit_scale, and how many of each."""
    N, num_heads, head_dim = call.window_area, *call.shape[3:]
    launch, programs = _one_tile_backward(call, is_packed, needs)
    dbias = _room(call, do, needs.dbias, programs, num_heads, N, N)
    dpad = _room(call, do, needs.dpad, programs, 2, num_heads * head_dim)
    dlogit_scale = _room(call, do, needs.dlogit_scale, programs, num_heads)
    launch(*operands, do, *dq_dk_dv, dbias, dpad, dlogit_scale)
    return (dbias, dpad, dlogit_scale), _programs(needs, programs, programs, programs)


def _programs(needs: Needs, *programs: int) -> Programs:
    """Those that leave a partial sum: none of what is not needed."""
    return Programs(*[count if need else 0 for count, need in zip(programs, needs, strict=True)])


@remembered
def _one_tile_backward(call: Call, is_packed: bool, needs: Needs) -> tuple[Launch, int]:
    """(launch, programs of a head)."""
    programs, arguments = call.one_tile_arguments("backward")
    stride, offsets = _grad_places(call, is_packed)
    arguments |= dict(
        grad_stride=stride, NEED_DBIAS=needs.dbias, NEED_DPAD=needs.dpad, NEED_DLOGIT_SCALE=needs.dlogit_scale
    )
    return Launch(backward_kernel, (call.shape[3], programs, 1), arguments, call.qkv_offsets() | offsets), programs


def _grad_places(call: Call, is_packed: bool) -> tuple[int, dict[str, int]]:
    """(elements from token to token, where dq, dk and dv begin)."""
    C = call.shape[3] * call.shape[4]
    return (3 * C, dict(dk_ptr=C, dv_ptr=2 * C)) if is_packed else (C, {})


def _launch_tiled_backward(call: Call, operands: Operands, do, out, stats, dq_dk_dv, is_packed: bool, needs: Needs):
    """Partial sums of dbias, dpad and dlogit_scale, and how many of each. The kernels run in this order: the first
    leaves delta to the other two."""
    N, num_heads, head_dim = call.window_area, *call.shape[3:]
    launches = _tiled_backward(call, is_packed, needs)
    operands = _with_bias_fragments(call, operands, launches.bias_extent)
    delta = stats.new_empty(stats.shape[:-1])
    dq, dk, dv = dq_dk_dv
    dlogit_scale = _room(call, do, needs.dlogit_scale, launches.dq_programs, num_heads)
    launches.dq(*operands, out, stats, do, delta, dq, dlogit_scale)
    dpad = _room(call, do, needs.dpad, launches.dkdv_programs, 2, num_heads * head_dim)
    launches.dkdv(*operands, stats, do, delta, dk, dv, dpad)
    dbias = _room(call, do, needs.dbias, launches.dbias_programs, num_heads, N, N)
    if needs.dbias:
        launches.dbias(*operands, stats, do, delta, dbias)
    programs = _programs(needs, launches.dbias_programs, launches.dkdv_programs, launches.dq_programs)
    return (dbias, dpad, dlogit_scale), programs


class _TiledBackward(NamedTuple):
    """The launches, and how many programs write partial sums of one head."""

    dq: Launch
    dq_programs: int
    dkdv: Launch
    dkdv_programs: int
    dbias: Launch
    dbias_programs: int
    bias_extent: int


@remembered
def _tiled_backward(call: Call, is_packed: bool, needs: Needs) -> _TiledBackward:
    N, num_heads = call.window_area, call.shape[3]
    dq, dkdv, dbias = (call.settings(f"backward_{name}") for name in ("dq", "dkdv", "dbias"))
    extent = call.bias_extent(dq, dkdv, dbias)
    stride, offsets = _grad_places(call, is_packed)
    offsets |= call.qkv_offsets()

    def launch(kernel, grid, settings, **arguments):
        arguments |= dict(EXTENT=extent, HAS_FRAGMENTS=call.has_fragments)
        return Launch(kernel, grid, call.arguments(settings) | arguments, offsets)

    query_tiles, key_tiles = cdiv(N, dq.block_m), cdiv(N, dkdv.block_n)
    dq_grid, dq_placed = call.placed_grid(num_heads * query_tiles, dq)
    dkdv_grid, dkdv_placed = call.placed_grid(num_heads * key_tiles, dkdv)
    pinned = num_heads * cdiv(N, dbias.block_m) * cdiv(N, dbias.block_n)
    shares = call.shares(pinned, dbias)
    need_dlogit_scale, need_dpad = needs.dlogit_scale, needs.dpad
    return _TiledBackward(
        launch(backward_dq_kernel, dq_grid, dq, grad_stride=stride, NEED_DLOGIT_SCALE=need_dlogit_scale, **dq_placed),
        query_tiles * dq_placed["shares"],
        launch(backward_dkdv_kernel, dkdv_grid, dkdv, grad_stride=stride, NEED_DPAD=need_dpad, **dkdv_placed),
        key_tiles * dkdv_placed["shares"],
        launch(backward_dbias_kernel, (pinned, shares, 1), dbias),
        shares,
        extent,
    )
