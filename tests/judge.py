"""Who judges: float64 of the same rounded inputs, with timm's own error in the same dtype beside ours."""

import torch
from timm.models import swin_transformer, swin_transformer_v2_cr
from torch import nn

from timm_flashwin import geometry


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the L2 norm; NaN where either has one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


TF32_ROUNDING = 2**-11


def rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding once to `dtype`; under TF32 to the operands of a product."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return TF32_ROUNDING
    return torch.finfo(dtype).eps / 2


def assert_as_exact_as_timm(name: str, ours: torch.Tensor, timms: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error is at most twice timm's, plus one rounding. A gradient that is exactly 0 has to be 0."""
    if exact.abs().max() == 0:
        assert ours.abs().max() == 0, name
        return
    our_error, timm_error = relative_error(ours, exact), relative_error(timms, exact)
    assert our_error <= 2 * timm_error + rounding(ours.dtype), (
        f"{name}: {our_error:.2e} against timm's {timm_error:.2e}"
    )


class Projected(nn.Module):
    """In the place of a qkv projection whose result is known."""

    def __init__(self, qkv):
        super().__init__()
        self.result = qkv

    def forward(self, x):
        return self.result


def timm_window_attention(qkv, num_heads, window_size, shift_size, bias, pad_qkv, logit_scale=None):
    """window_attention by timm's own code: its partition, its WindowAttention (projections taken out), its reverse;
    half precision as under autocast. With a logit_scale the attention is V2-CR's, whose bias can be given."""
    B, H, W, three_c = qkv.shape
    if logit_scale is None:
        attention = swin_transformer.WindowAttention(three_c // 3, num_heads, window_size=window_size)
        attention.fused_attn = False
        attention._get_rel_pos_bias = lambda: bias.unsqueeze(0)
    else:
        attention = swin_transformer_v2_cr.WindowMultiHeadAttention(three_c // 3, num_heads, window_size)
        attention._relative_positional_encodings = lambda: bias.unsqueeze(0)
        del attention.logit_scale
        attention.logit_scale = logit_scale
    attention.proj = nn.Identity()

    Hp, Wp = geometry.padded_size((H, W), window_size)
    x = torch.roll(qkv, shifts=(-shift_size[0], -shift_size[1]), dims=(1, 2))
    x = torch.cat([x, pad_qkv.to(x.dtype).expand(B, H, Wp - W, three_c)], dim=2)
    x = torch.cat([x, pad_qkv.to(x.dtype).expand(B, Hp - H, Wp, three_c)], dim=1)
    windows = swin_transformer.window_partition(x, window_size).flatten(1, 2)
    attention.qkv = Projected(windows)
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(qkv.device.type, dtype=qkv.dtype if half else None, enabled=half):
        out = attention(windows[..., : three_c // 3], mask=timm_mask((H, W), window_size, shift_size, qkv))
    out = swin_transformer.window_reverse(out.unflatten(1, window_size), window_size, Hp, Wp)[:, :H, :W]
    return torch.roll(out, shifts=shift_size, dims=(1, 2)).to(qkv.dtype)


def timm_mask(size, window_size, shift_size, like):
    """timm's mask for a map of `size`, as its block builds it; None without a shift."""
    block = swin_transformer.SwinTransformerBlock(
        8, size, num_heads=1, window_size=window_size, shift_size=shift_size, always_partition=True
    )
    mask = block.get_attn_mask()
    return None if mask is None else mask.to(like.device, torch.promote_types(like.dtype, torch.float32))
