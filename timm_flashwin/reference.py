"""The specification: windowed attention in readable PyTorch, on any device, in any float dtype.

The kernels are judged against these functions in float64. Nothing here is tuned, and nothing here knows the kernels.
"""

import math

import torch
from torch.nn import functional as F

from .geometry import padded_size, relative_position_index, shift_mask, window_partition, window_reverse

NORM_EPS = 1e-12  # of torch.nn.functional.normalize, which the V2 family calls with its default
MAX_LOGIT_SCALE = math.log(100.0)  # where the V2 family clamps the logarithm of its scale


def windowed_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float | None,
    logit_scale: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(q @ k^T * scale + bias + mask) @ v in each window; see `timm_flashwin.windowed_sdpa`.

    With a `logit_scale` q and k are normalised first and `scale` is not used.

    Products, softmax and sums are taken in float32 (float64 for float64 inputs) and rounded once, at the end.
    """
    dtype = q.dtype
    internal = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(internal) for t in (q, k, v))  # B_, num_heads, N, head_dim
    if logit_scale is not None:
        q, k = F.normalize(q, dim=-1, eps=NORM_EPS), F.normalize(k, dim=-1, eps=NORM_EPS)
        scale = logit_scale.to(internal).clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]  # num_heads, 1, 1
    logits = (q @ k.transpose(-2, -1)) * scale  # B_, num_heads, N, N
    if bias is not None:
        logits = logits + bias.to(internal)
    if mask is not None:
        B_, num_heads, N, _ = logits.shape
        logits = logits.view(-1, mask.shape[0], num_heads, N, N) + mask.to(internal)[:, None]
        logits = logits.view(B_, num_heads, N, N)
    return (logits.softmax(dim=-1) @ v).to(dtype)  # B_, num_heads, N, head_dim


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    bias: torch.Tensor | None,
    pad_qkv: torch.Tensor | None,
    scale: float | None,
    logit_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Roll, pad, partition, attend, and all of it back again; see `timm_flashwin.window_attention`."""
    B, H, W, three_c = qkv.shape
    Hp, Wp = padded_size((H, W), window_size)

    x = torch.roll(qkv, shifts=(-shift_size[0], -shift_size[1]), dims=(1, 2))
    pad = qkv.new_zeros(three_c) if pad_qkv is None else pad_qkv.to(qkv.dtype)
    x = torch.cat([x, pad.expand(B, H, Wp - W, three_c)], dim=2)
    x = torch.cat([x, pad.expand(B, Hp - H, Wp, three_c)], dim=1)  # B, Hp, Wp, 3C

    windows = window_partition(x, window_size)  # B*nW, N, 3C
    windows = windows.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = windows.unbind(0)  # B*nW, num_heads, N, head_dim
    mask = None
    if any(shift_size):
        mask = shift_mask((H, W), window_size, shift_size, qkv.device, torch.promote_types(qkv.dtype, torch.float32))
    out = windowed_sdpa(q, k, v, bias, mask, scale, logit_scale).transpose(1, 2).flatten(2)  # B*nW, N, C

    out = window_reverse(out, window_size, (Hp, Wp))[:, :H, :W]
    return torch.roll(out, shifts=shift_size, dims=(1, 2))  # B, H, W, C


def relative_position_bias(table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """Gather the table's rows; see `timm_flashwin.functional.relative_position_bias`.

    The way through float32 (float64 for float64) changes no value; it is the gradient that is summed there.
    """
    index = relative_position_index(window_size, table.device)  # N, N
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    return wide[index].permute(2, 0, 1).to(table.dtype).contiguous()  # num_heads, N, N
