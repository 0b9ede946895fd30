"""Launch settings, and the only functions that launch a kernel.

Settings follow from the shape, the dtype and the device by rule; nothing is timed on the user's first call.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import num_windows, shift_cut
from . import ONE_TILE_AREA, needs_stats
from .backward import backward_dbias_kernel, backward_dkdv_kernel, backward_dq_kernel, backward_kernel
from .forward import forward_kernel

# TRITON_INTERPRET=1 was set when the kernels were defined: they run in Triton's interpreter, on CPU tensors.
INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)


class Settings(NamedTuple):
    """How one kernel is cut and compiled."""

    block_m: int  # query tokens in a tile
    block_n: int  # key tokens in a tile
    num_warps: int
    num_stages: int
    programs_per_sm: int  # how many programs share the windows, per multiprocessor

    def options(self) -> dict:
        """As a kernel takes them."""
        return dict(
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, num_warps=self.num_warps, num_stages=self.num_stages
        )  # fmt: skip


def block_d(head_dim: int) -> int:
    """Channels of a tile: a power of two, and what a tensor core takes at least."""
    return max(16, triton.next_power_of_2(head_dim))


def _token_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """What one token of one head takes in a tile."""
    return block_d(head_dim) * dtype.itemsize


def forward_settings(window_area: int, head_dim: int, dtype: torch.dtype, is_shifted: bool) -> Settings:
    """Settings of `forward_kernel`."""
    token_bytes = _token_bytes(head_dim, dtype)
    if window_area <= ONE_TILE_AREA:
        block = max(16, triton.next_power_of_2(window_area))
        # Small tokens leave shared memory to fetch the next windows ahead of time; wide ones would crowd out programs.
        stages = 3 if token_bytes <= 64 else 1
        # As many programs as a multiprocessor holds at once, so that all are one wave: the mask's registers cost one.
        programs = 3 if is_shifted else 4
        return Settings(
            block, block, num_warps=8 if token_bytes > 256 else 4, num_stages=stages, programs_per_sm=programs
        )  # fmt: skip
    # Narrow key tiles waste little of a window that is no power of two (144, 196); from 24x24 on wide ones win.
    block_n = 64 if window_area > 256 and token_bytes <= 128 else 32
    return Settings(32 if token_bytes > 256 else 64, block_n, num_warps=4, num_stages=1, programs_per_sm=8)


def backward_settings(window_area: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """Settings of `backward_kernel`, or of the first two of the three kernels of larger windows."""
    token_bytes = _token_bytes(head_dim, dtype)
    if not needs_stats(window_area, head_dim, dtype):
        block = max(16, triton.next_power_of_2(window_area))
        # Four warps keep four 64x64 float32 tiles in registers; wide tokens beside them need eight. Fetching ahead pays
        # where the tensor cores read from shared memory (wgmma); elsewhere its registers are spilled ones.
        stages = 3 if token_bytes <= 64 and _target_arch(device) == 90 else 1
        # Two programs are what a multiprocessor holds of this kernel: one wave, each walking through its windows.
        return Settings(block, block, num_warps=8 if token_bytes > 128 else 4, num_stages=stages, programs_per_sm=2)
    if token_bytes > 256:
        return Settings(32, 32, num_warps=4, num_stages=1, programs_per_sm=4)
    # Without wgmma both operands of a product take registers: a 64x64 tile would spill.
    block_m = 64 if _target_arch(device) == 90 else 32
    return Settings(block_m, 32 if token_bytes > 128 else 64, num_warps=4, num_stages=1, programs_per_sm=4)


def dbias_settings(window_area: int, head_dim: int, dtype: torch.dtype) -> Settings:
    """Settings of `backward_dbias_kernel`, which holds a tile of the bias and one of its gradient all the time."""
    return Settings(32 if _token_bytes(head_dim, dtype) > 256 else 64, 32, num_warps=4, num_stages=1, programs_per_sm=4)


@functools.cache
def _target_arch(device: torch.device) -> int | str:
    """What Triton compiles for: 90 for sm_90, "gfx942" for that; 0 in the interpreter."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class Call(NamedTuple):
    """What every kernel of one call has in common: q, k and v, views [B, H, W, num_heads, head_dim] that share their
    strides, and the geometry."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None  # [num_heads, N, N]
    mask: torch.Tensor | None  # [nW, N, N]
    pad_qkv: torch.Tensor | None  # [3 * num_heads * head_dim]
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    scale: float

    @property
    def window_area(self) -> int:
        return self.window_size[0] * self.window_size[1]

    @property
    def windows(self) -> tuple[int, int]:
        return num_windows(self.q.shape[1:3], self.window_size)

    @property
    def num_windows(self) -> int:
        return self.q.shape[0] * self.windows[0] * self.windows[1]

    @property
    def has_pad(self) -> bool:
        H, W = self.q.shape[1:3]
        return H % self.window_size[0] != 0 or W % self.window_size[1] != 0

    def pads(self) -> torch.Tensor:
        """The qkv of a padded token, materialised: [3 * num_heads * head_dim]."""
        if self.pad_qkv is not None:
            return self.pad_qkv.contiguous()
        return self.q.new_zeros(3 * self.q.shape[3] * self.q.shape[4]) if self.has_pad else self.q

    def pointers(self) -> dict:
        q, k, v = self.q, self.k, self.v
        return dict(
            q_ptr=q, k_ptr=k, v_ptr=v, pad_ptr=self.pads(),
            bias_ptr=q if self.bias is None else self.bias.contiguous(),
            mask_ptr=q if self.mask is None else self.mask.contiguous(),
            stride_b=q.stride(0), stride_h=q.stride(1), stride_w=q.stride(2), stride_head=q.stride(3),
        )  # fmt: skip

    def scalars(self) -> dict:
        _, H, W, num_heads, _ = self.q.shape
        rows, cols = self.windows
        cut_h, cut_w = shift_cut((H, W), self.window_size, self.shift_size)
        return dict(
            H=H, W=W, windows_h=rows, windows_w=cols, num_windows=self.num_windows,
            num_mask_windows=1 if self.mask is None else self.mask.shape[0],
            num_heads=num_heads, scale=self.scale,
            # A roll by more than the map wraps around; the cut is made by the shift as given.
            roll_h=self.shift_size[0] % H, roll_w=self.shift_size[1] % W,
            cut_window_h=cut_h[0], cut_row=cut_h[1], cut_window_w=cut_w[0], cut_col=cut_w[1],
        )  # fmt: skip

    def constants(self) -> dict:
        B, H, W, num_heads, head_dim = self.q.shape
        image_extent = max(H * self.q.stride(1) + W * self.q.stride(2), 3 * H * W * num_heads * head_dim)
        return dict(
            HEAD_DIM=head_dim, WINDOW_H=self.window_size[0], WINDOW_W=self.window_size[1], BLOCK_D=block_d(head_dim),
            HAS_BIAS=self.bias is not None, HAS_MASK=self.mask is not None, HAS_PAD=self.has_pad,
            IS_SHIFTED=any(self.shift_size),
            ACC=tl.float64 if self.q.dtype == torch.float64 else tl.float32, PRECISION=dot_precision(self.q.dtype),
            OFFSET=tl.int32 if image_extent < 2**31 else tl.int64,
        )  # fmt: skip

    def programs(self, programs_a_window: int, settings: Settings) -> int:
        """How many programs share the windows, where each window needs `programs_a_window` of them."""
        wanted = _multiprocessors(self.q.device) * settings.programs_per_sm
        return max(1, min(self.num_windows, wanted // programs_a_window))

    @property
    def acc_dtype(self) -> torch.dtype:
        """What sums are taken in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def partial_sums(self, needed: bool, *shape: int) -> torch.Tensor:
        """Room for one partial sum a program; any tensor where a kernel is not going to touch it."""
        return self.q.new_empty(shape, dtype=self.acc_dtype) if needed else self.q


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's switch for CUDA matmuls; other dtypes do not look at it."""
    if dtype != torch.float32:
        return "ieee"
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer of torch's two switches was used, which forbids reading the older
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def launch_forward(call: Call, out: torch.Tensor, stats: torch.Tensor | None) -> None:
    """Fill `out`, a contiguous map [B, H, W, num_heads * head_dim], and, if given, `stats` [B*nW, num_heads, N, 2]."""
    settings = forward_settings(call.window_area, call.q.shape[4], call.q.dtype, any(call.shift_size))
    heads_and_tiles = call.q.shape[3] * triton.cdiv(call.window_area, settings.block_m)
    forward_kernel[(heads_and_tiles, call.programs(heads_and_tiles, settings))](
        **call.pointers(), out_ptr=out, stats_ptr=out if stats is None else stats, **call.scalars(), **call.constants(),
        **settings.options(), SAVE_STATS=stats is not None,
    )  # fmt: skip


def launch_backward(
    call: Call,
    do: torch.Tensor,
    out: torch.Tensor | None,
    stats: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    need_dbias: bool,
    need_dpad: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fill dq, dk, dv; return dbias [num_heads, N, N] and dpad_qkv [3 * num_heads * head_dim] where needed.

    `do` and `out` are contiguous maps [B, H, W, num_heads * head_dim]; `out` and `stats` are read only where
    `needs_stats` says so. dq, dk and dv [B, H, W, num_heads, head_dim] have the strides of one another, and
    those of a contiguous map but for the distance from token to token.
    """
    num_heads, head_dim = call.q.shape[3:]
    shared = dict(**call.pointers(), do_ptr=do, **call.scalars(), **call.constants())
    grads = dict(dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, grad_stride=dq.stride(2))
    need_dpad_sums = need_dpad and call.has_pad
    if needs_stats(call.window_area, head_dim, call.q.dtype):
        shared.update(stats_ptr=stats, delta_ptr=torch.empty_like(stats[..., 0]))
        dbias, dpad = _launch_tiled_backward(call, shared, grads, out, need_dbias, need_dpad_sums)
    else:
        dbias, dpad = _launch_one_tile_backward(call, shared, grads, need_dbias, need_dpad_sums)

    dpad_qkv = None
    if need_dpad:
        dpad_qkv = do.new_zeros(3 * num_heads * head_dim, dtype=call.acc_dtype)
        if need_dpad_sums:
            dpad_qkv[num_heads * head_dim :] = dpad.sum(dim=0).flatten()  # a padded query has no gradient
    return dbias.sum(dim=0) if need_dbias else None, dpad_qkv


def _launch_one_tile_backward(call: Call, shared: dict, grads: dict, need_dbias: bool, need_dpad: bool):
    """Partial sums of dbias and dpad."""
    N, num_heads, head_dim = call.window_area, *call.q.shape[3:]
    settings = backward_settings(N, head_dim, call.q.dtype, call.q.device)
    programs = call.programs(num_heads, settings)
    dbias = call.partial_sums(need_dbias, programs, num_heads, N, N)
    dpad = call.partial_sums(need_dpad, programs, 2, num_heads * head_dim)
    backward_kernel[(num_heads, programs)](
        **shared, **grads, dbias_ptr=dbias, dpad_ptr=dpad, NEED_DBIAS=need_dbias, NEED_DPAD=need_dpad,
        **settings.options(),
    )  # fmt: skip
    return dbias, dpad


def _launch_tiled_backward(call: Call, shared: dict, grads: dict, out, need_dbias: bool, need_dpad: bool):
    """Partial sums of dbias and dpad. The kernels run in this order: the first leaves delta to the other two."""
    N, num_heads, head_dim = call.window_area, *call.q.shape[3:]
    settings = backward_settings(N, head_dim, call.q.dtype, call.q.device)
    programs_a_window = num_heads * triton.cdiv(N, settings.block_m)
    programs = call.programs(programs_a_window, settings)
    backward_dq_kernel[(programs_a_window, programs)](
        **shared, out_ptr=out, dq_ptr=grads["dq_ptr"], grad_stride=grads["grad_stride"], **settings.options()
    )

    key_tiles = triton.cdiv(N, settings.block_n)
    programs_a_window = num_heads * key_tiles
    programs = call.programs(programs_a_window, settings)
    dpad = call.partial_sums(need_dpad, programs * key_tiles, 2, num_heads * head_dim)
    backward_dkdv_kernel[(programs_a_window, programs)](
        **shared, dk_ptr=grads["dk_ptr"], dv_ptr=grads["dv_ptr"], grad_stride=grads["grad_stride"],
        dpad_ptr=dpad, NEED_DPAD=need_dpad, **settings.options(),
    )  # fmt: skip

    if not need_dbias:
        return None, dpad
    settings = dbias_settings(N, head_dim, call.q.dtype)
    programs_a_window = num_heads * triton.cdiv(N, settings.block_m) * triton.cdiv(N, settings.block_n)
    programs = call.programs(programs_a_window, settings)
    dbias = call.partial_sums(True, programs, num_heads, N, N)
    backward_dbias_kernel[(programs_a_window, programs)](**shared, dbias_ptr=dbias, **settings.options())
    return dbias, dpad
