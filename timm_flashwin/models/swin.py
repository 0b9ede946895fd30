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

    @property
    def head_dim(self) -> int:
        """Channels of a head; from the scale, because an adapter in a Linear's place need not tell its size."""
        return round(self.scale**-2)

    def fallback(self, x: torch.Tensor) -> bool:
        """Whether timm's own code has to serve `x`, the input of the qkv projection. The reason is logged once.

        Raises:
            ValueError: It has to, and `impl="triton"` forbids it.
        """
        reason = self._fallback_reason(x)
        if reason is None:
            return False
        if self.impl == "triton":
            raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto"')
        log_fallback(reason, "fx" if isinstance(x, torch.fx.Proxy) else x.device.type)
        return True

    def _fallback_reason(self, x: torch.Tensor) -> str | None:
        if isinstance(x, torch.fx.Proxy):
            return "torch.fx traces timm's code"
        if is_exportable() or is_scriptable():
            return "timm.layers.is_exportable() or is_scriptable() asks for it"
        if self._drops():
            return "attention dropout is on (attn_drop_rate > 0 in training), which the kernels do not have"
        if not self.fused_attn and (_is_hooked(self.softmax) or _is_hooked(self.attn_drop)):
            return "a hook asks for the attention weights, which the kernels never hold"
        if self.impl != "auto":
            return None  # what else impl="triton" cannot do, it says itself
        return fallback_reason(x.device, x.dtype, self.head_dim, self.window_area)

    def _drops(self) -> bool:
        """Whether timm's code would drop attention weights; its SDPA branch goes by the attention's mode."""
        if isinstance(self.attn_drop, nn.Dropout):
            return self.attn_drop.p > 0.0 and (self.training if self.fused_attn else self.attn_drop.training)
        return not isinstance(self.attn_drop, nn.Identity)

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
        if type(self.qkv) is nn.Linear and not _is_hooked(self.qkv):
            return self.qkv.bias
        # Adapted, quantised, sharded or hooked: the module tells by itself what it makes of zeros.
        return self.qkv(x.new_zeros(1, 1, 1, C)).flatten()


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FlashSwinTransformerBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock` without the roll, the padding, the partition and the mask tensor."""

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        # What somebody put in the attention's place, timm's own class included, is called as timm calls it.
        if not hasattr(self.attn, "fallback") or self.attn.fallback(x):
            return super()._attn(x)
        return self.attn(x, shift_size=self.shift_size)
