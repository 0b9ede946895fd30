"""Swin Transformer V1 and S3: timm's block and attention with the attention path on the kernels.

Both classes add methods and no state to timm's, but for what a block remembers of itself (`snapshot`), so an instance
changes from one to the other by its `__class__` (`accelerate`), and every parameter, buffer, hook and flag stays where
it is.
"""

from collections.abc import Callable

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import nn

from .dispatch import FlashAttention, is_untouched, takes_map
from .fused_block import whole_block
from .mlp import mlp, starts_with_linear
from .norms import add_layer_norm, fuses_norms, layer_norm


class FlashWindowAttention(FlashAttention, WindowAttention):
    """timm's `WindowAttention`; takes windows as timm's does, or a whole NHWC map where `shift_size` is given."""

    @property
    def head_dim(self) -> int:
        """Channels of a head; from the scale where an adapter in the Linear's place does not tell its size."""
        channels = getattr(self.qkv, "out_features", None)
        return channels // (3 * self.num_heads) if isinstance(channels, int) else round(self.scale**-2)

    def _fallback_reason(self, x: torch.Tensor, mask: torch.Tensor | None) -> str | None:
        if not isinstance(self.scale, (int, float)) or self.scale < 0:
            return "attn.scale is no number of 0 or more"
        return super()._fallback_reason(x, mask)

    def scales(self) -> tuple[float, None]:
        return self.scale, None

    def table_source(self) -> Callable[[], torch.Tensor] | None:
        somebodys_own = "_get_rel_pos_bias" in self.__dict__
        return None if somebodys_own else lambda: self.relative_position_bias_table

    def timms_position_bias(self) -> torch.Tensor:
        return self._get_rel_pos_bias().squeeze(0)

    def _weight_modules(self) -> tuple[nn.Module, ...]:
        return () if self.fused_attn else (self.softmax, self.attn_drop)

    def _drops(self) -> bool:
        if self.fused_attn and isinstance(
            self.attn_drop, nn.Dropout
        ):  # timm's SDPA branch goes by the attention's mode
            return self.training and self.attn_drop.p > 0.0
        return super()._drops()


class FlashSwinTransformerBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock` without the roll, the padding, the partition and the mask tensor, and with its
    norms, the residual add between them and their casts in one pass each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = whole_block(self, x, pre_norm=True)
        if out is not None:
            return out
        if not fuses_norms(self, x):
            return super().forward(x)
        into_qkv = self.attn.qkv_is_plain() and is_untouched(self.attn)
        into_fc1 = starts_with_linear(self.mlp)
        x, *normed = add_layer_norm(
            self.norm2, x, self._attn(layer_norm(self.norm1, x, into_qkv)), self.drop_path1, into_fc1
        )
        # Popped: a name for it here would hold its memory until the block is done.
        return x + self.drop_path2(mlp(self.mlp, normed.pop().flatten(1, 2))).view(x.shape)

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(self.attn, x):
            return self.attn(x, shift_size=self.shift_size)
        return super()._attn(x)
