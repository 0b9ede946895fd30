"""What a call of the attention launches: each kernel's grid, its arguments, and what becomes of its partial sums."""

from typing import NamedTuple

import torch
import triton.language as tl

from ..geometry import cdiv, num_windows, shift_cut
from . import needs_stats
from .backward import backward_dbias_kernel, backward_dkdv_kernel, backward_dq_kernel, backward_kernel
from .bias_fragments import STRIP, launch_bias_fragments
from .forward import forward_kernel, forward_tiled_kernel
from .launcher import acc_type, launch
from .scale import MAX_LOGIT_SCALE
from .settings import INTERPRETED as INTERPRETED
from .settings import Settings, block_d, multiprocessors_of, settings_for, split_in_step


class Call(NamedTuple):
    """What every kernel of one call has in common: q, k and v, views [B, H, W, num_heads, head_dim] that share their
    strides, and the geometry."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None  # [num_heads, N, N]
    mask: torch.Tensor | None  # [nW, N, N]
    pad_qkv: torch.Tensor | None  # [3 * num_heads * head_dim]
    logit_scale: torch.Tensor | None  # [num_heads]: cosine attention, and scale is not used
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    scale: float

    @property
    def cosine(self) -> bool:
        return self.logit_scale is not None

    @property
    def window_area(self) -> int:
        return self.window_size[0] * self.window_size[1]

    @property
    def windows(self) -> tuple[int, int]:
        """How many windows an image has along each axis."""
        return num_windows(self.q.shape[1:3], self.window_size)

    @property
    def num_windows(self) -> int:
        """Of all images."""
        return self.q.shape[0] * self.windows[0] * self.windows[1]

    @property
    def has_pad(self) -> bool:
        H, W = self.q.shape[1:3]
        return H % self.window_size[0] != 0 or W % self.window_size[1] != 0

    def settings(self, kernel: str) -> Settings:
        """Of one of `settings.KERNELS` for this call."""
        head_dim = self.q.shape[4]
        return settings_for(kernel, self.window_area, head_dim, self.q.dtype, self.cosine, self.q.device)

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
            logit_scale_ptr=q if self.logit_scale is None else self.logit_scale.contiguous(),
            stride_b=q.stride(0), stride_h=q.stride(1), stride_w=q.stride(2), stride_head=q.stride(3),
        )  # fmt: skip

    def scalars(self) -> dict:
        B, H, W, num_heads, _ = self.q.shape
        rows, cols = self.windows
        cut_h, cut_w = shift_cut((H, W), self.window_size, self.shift_size)
        return dict(
            H=H, W=W, windows_w=cols, num_positions=rows * cols, num_images=B,
            num_masks=1 if self.mask is None else self.mask.shape[0], num_heads=num_heads, scale=self.scale,
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
            IS_SHIFTED=any(self.shift_size), COSINE=self.cosine,
            ACC=acc_type(self.q.dtype), PRECISION=dot_precision(self.q.dtype),
            OFFSET=tl.int32 if image_extent < 2**31 else tl.int64,
        )  # fmt: skip

    def bias_fragments(self, *settings: Settings) -> dict:
        """The bias as the kernels that walk over tiles take it, wide enough for the tiles of each of the `settings`."""
        tile = max(STRIP, *(max(s.block_m, s.block_n) for s in settings))
        extent = cdiv(self.window_area, tile) * tile
        bias = self.q
        if self.bias is not None:
            bias = launch_bias_fragments(self.bias, self.scale, self.logit_scale, self.acc_dtype, extent)
        return dict(bias_ptr=bias, BIAS_EXTENT=extent)

    def shares(self, pinned: int, settings: Settings) -> int:
        """Into how many shares the windows are cut, where each takes `pinned` programs: all of them are one wave."""
        programs = multiprocessors_of(self.q.device) * settings.programs_per_sm
        return max(1, min(self.num_windows, programs // pinned))

    def programs_in_step(self, settings: Settings) -> tuple[int, int]:
        """(how many programs a head gets, how many groups they form), for the kernels of one tile."""
        windows_h, windows_w = self.windows
        groups, lanes = split_in_step(windows_h * windows_w, self.q.shape[0], self.shares(self.q.shape[3], settings))
        return groups * lanes, groups

    def placed_grid(self, pinned: int, settings: Settings) -> tuple[tuple[int, int, int], dict]:
        """(grid, what `placed_program` takes) for `pinned` programs a share, counting from multiprocessor to
        multiprocessor."""
        shares, multiprocessors = self.shares(pinned, settings), multiprocessors_of(self.q.device)
        layers = cdiv(pinned * shares, multiprocessors)
        return (multiprocessors * layers, 1, 1), dict(shares=shares, multiprocessors=multiprocessors)

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
    num_heads, head_dim = call.q.shape[3:]
    shared = dict(**call.pointers(), out_ptr=out, **call.scalars(), **call.constants())
    if needs_stats(call.window_area, head_dim, call.q.dtype):
        settings = call.settings("forward_tiled")
        grid, placed = call.placed_grid(num_heads * cdiv(call.window_area, settings.block_m), settings)
        arguments = dict(stats_ptr=out if stats is None else stats, SAVE_STATS=stats is not None)
        arguments |= shared | call.bias_fragments(settings) | placed | settings.options(call.q.device)
        launch(forward_tiled_kernel, grid, arguments)
    else:
        settings = call.settings("forward")
        programs, groups = call.programs_in_step(settings)
        arguments = dict(**shared, groups=groups, **settings.options(call.q.device))
        launch(forward_kernel, (num_heads, programs, 1), arguments)


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
    need_dlogit_scale: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Fill dq, dk, dv; return dbias [num_heads, N, N], dpad_qkv [3 * num_heads * head_dim] and dlogit_scale [num_heads]
    where needed.

    `do` and `out` are contiguous maps [B, H, W, num_heads * head_dim]; `out` and `stats` are read only where
    `needs_stats` says so. dq, dk and dv [B, H, W, num_heads, head_dim] have the strides of one another, and
    those of a contiguous map but for the distance from token to token.
    """
    num_heads, head_dim = call.q.shape[3:]
    shared = dict(**call.pointers(), do_ptr=do, **call.scalars(), **call.constants())
    grads = dict(dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, grad_stride=dq.stride(2))
    needed = need_dbias, need_dpad and call.has_pad, need_dlogit_scale
    if needs_stats(call.window_area, head_dim, call.q.dtype):
        shared.update(stats_ptr=stats, delta_ptr=torch.empty_like(stats[..., 0]))
        dbias, dpad, dlogit_scale = _launch_tiled_backward(call, shared, grads, out, *needed)
    else:
        dbias, dpad, dlogit_scale = _launch_one_tile_backward(call, shared, grads, *needed)

    dpad_qkv = None
    if need_dpad:
        dpad_qkv = do.new_zeros(3 * num_heads * head_dim, dtype=call.acc_dtype)
        if call.has_pad:
            dpad_qkv[num_heads * head_dim :] = dpad.sum(dim=0).flatten()  # a padded query has no gradient
    if need_dlogit_scale:
        dlogit_scale = dlogit_scale.sum(dim=0) * (call.logit_scale <= MAX_LOGIT_SCALE.value)
    return dbias.sum(dim=0) if need_dbias else None, dpad_qkv, dlogit_scale if need_dlogit_scale else None


def _launch_one_tile_backward(
    call: Call, shared: dict, grads: dict, need_dbias: bool, need_dpad: bool, need_dlogit_scale: bool
):
    """Partial sums of dbias, dpad and dlogit_scale."""
    N, num_heads, head_dim = call.window_area, *call.q.shape[3:]
    settings = call.settings("backward")
    programs, groups = call.programs_in_step(settings)
    dbias = call.partial_sums(need_dbias, programs, num_heads, N, N)
    dpad = call.partial_sums(need_dpad, programs, 2, num_heads * head_dim)
    dlogit_scale = call.partial_sums(need_dlogit_scale, programs, num_heads)
    arguments = dict(
        **shared, **grads, groups=groups, dbias_ptr=dbias, dpad_ptr=dpad, dlogit_scale_ptr=dlogit_scale,
        NEED_DBIAS=need_dbias, NEED_DPAD=need_dpad, NEED_DLOGIT_SCALE=need_dlogit_scale,
        **settings.options(call.q.device),
    )  # fmt: skip
    launch(backward_kernel, (num_heads, programs, 1), arguments)
    return dbias, dpad, dlogit_scale


def _launch_tiled_backward(
    call: Call, shared: dict, grads: dict, out, need_dbias: bool, need_dpad: bool, need_dlogit_scale: bool
):
    """Partial sums of dbias, dpad and dlogit_scale. The kernels run in this order: the first leaves delta to the other
    two."""
    N, num_heads, head_dim = call.window_area, *call.q.shape[3:]
    settings, dkdv_settings, dbias_settings = (call.settings(f"backward_{name}") for name in ("dq", "dkdv", "dbias"))
    shared = shared | call.bias_fragments(settings, dkdv_settings, dbias_settings)
    query_tiles = cdiv(N, settings.block_m)
    grid, placed = call.placed_grid(num_heads * query_tiles, settings)
    dlogit_scale = call.partial_sums(need_dlogit_scale, query_tiles * placed["shares"], num_heads)
    arguments = dict(
        **shared, out_ptr=out, dq_ptr=grads["dq_ptr"], grad_stride=grads["grad_stride"], **placed,
        dlogit_scale_ptr=dlogit_scale, NEED_DLOGIT_SCALE=need_dlogit_scale, **settings.options(call.q.device),
    )  # fmt: skip
    launch(backward_dq_kernel, grid, arguments)

    settings = dkdv_settings
    key_tiles = cdiv(N, settings.block_n)
    grid, placed = call.placed_grid(num_heads * key_tiles, settings)
    dpad = call.partial_sums(need_dpad, key_tiles * placed["shares"], 2, num_heads * head_dim)
    arguments = dict(
        **shared, dk_ptr=grads["dk_ptr"], dv_ptr=grads["dv_ptr"], grad_stride=grads["grad_stride"], **placed,
        dpad_ptr=dpad, NEED_DPAD=need_dpad, **settings.options(call.q.device),
    )  # fmt: skip
    launch(backward_dkdv_kernel, grid, arguments)
    if not need_dbias:
        return None, dpad, dlogit_scale

    settings = dbias_settings
    pinned = num_heads * cdiv(N, settings.block_m) * cdiv(N, settings.block_n)
    shares = call.shares(pinned, settings)
    dbias = call.partial_sums(True, shares, num_heads, N, N)
    arguments = dict(**shared, dbias_ptr=dbias, **settings.options(call.q.device))
    launch(backward_dbias_kernel, (pinned, shares, 1), arguments)
    return dbias, dpad, dlogit_scale
