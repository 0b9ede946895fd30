"""Swin Transformer V1 and S3: timm's block and attention with the attention path on the kernels.

Both classes add methods and no state to timm's, so an instance changes from one to the other by its `__class__` alone
(`accelerate`), and every parameter, buffer, hook and flag stays where it is.
"""

import torch
from timm.layers import is_exportable, is_scriptable
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn

from ..functional import fallback_reason, log_fallback, window_attention, windowed_sdpa


class FlashWindowAttention(WindowAttention):
    """timm's `WindowAttention`; takes windows as timm's does, or a whole NHWC map where `shift_size` is given."""

    impl = "auto"  # as in functional.window_attention; an instance may hold its own

    def fallback(self, x: torch.Tensor) -> bool:
        """Whether timm's own code has to serve `x`, the input of the qkv projection. The reason is logged once.

        Raises:
            ValueError: It has to, and `impl="triton"` forbids it.
        """
        if is_exportable() or is_scriptable():
            reason = "timm.layers.is_exportable() or is_scriptable() asks for it"
        elif self.training and self.attn_drop.p > 0.0:
            reason = "attention dropout is on (attn_drop_rate > 0 in training), which the kernels do not have"
        elif self.impl == "auto":
            head_dim = self.qkv.out_features // (3 * self.num_heads)
            reason = fallback_reason(x.device, x.dtype, head_dim, self.window_area)
        else:
            reason = None  # what else impl="triton" cannot do, it says itself
        if reason is None:
            return False
        if self.impl == "triton":
            raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto"')
        log_fallback(reason, x.device.type)
        return True

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        shift_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Attend in windows.

        Args:
            x: Windows [B * nW, N, C], as in timm; or the map [B, H, W, C], where `shift_size` is given.
            mask: Additive mask [nW, N, N] for windows, or None. A map needs none.
            shift_size: (sh, sw) of the block: roll, padding, partition, mask and the way back are done in here.

        Returns:
            The shape of `x`.
        """
        if shift_size is not None:
            out = window_attention(
                self.qkv(x),
                self.num_heads,
                self.window_size,
                shift_size,
                bias=self._get_rel_pos_bias().squeeze(0),
                pad_qkv=self._pad_qkv(x),
                scale=self.scale,
                impl=self.impl,
            )  # B, H, W, C
        elif self.fallback(x):
            return super().forward(x, mask)
        else:
            B_, N, _ = x.shape
            q, k, v = self.qkv(x).view(B_, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self._get_rel_pos_bias().squeeze(0)
            out = windowed_sdpa(q, k, v, bias, mask, self.scale, self.impl)  # B_, num_heads, N, head_dim
            out = out.transpose(1, 2).reshape(B_, N, -1)
        return self.proj_drop(self.proj(out))

    def _pad_qkv(self, x: torch.Tensor) -> torch.Tensor | None:
        """The qkv of the zeros timm pads the map [B, H, W, C] with: [3 * C]; None where nothing is padded."""
        _, H, W, C = x.shape
        if H % self.window_size[0] == 0 and W % self.window_size[1] == 0:
            return None
        # A module that took the Linear's place (an adapter, a quantised one) tells by itself what it makes of zeros.
        return self.qkv.bias if isinstance(self.qkv, nn.Linear) else self.qkv(x.new_zeros(C))


class FlashSwinTransformerBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock` without the roll, the padding, the partition and the mask tensor."""

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        if self.attn.fallback(x):
            return super()._attn(x)
        return self.attn(x, shift_size=self.shift_size)
