"""Swin Transformer V2: timm's block and attention with the attention path on the kernels.

Cosine attention with a learned scale a head, and a relative position bias that a small MLP computes (Liu et al., "Swin
Transformer V2", 2022, sections 3.2 and 3.3). The classes add methods and no state, as those of V1 do.
"""

from collections.abc import Callable

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import nn
from torch.nn import functional as F

from .dispatch import FlashAttention, takes_map
from .fused_block import whole_block
from .norms import fuses_norms, post_norm_branches
from .position_mlp import mlp_table_source


class FlashSwinV2WindowAttention(FlashAttention, WindowAttention):
    """timm's V2 `WindowAttention`; takes windows as timm's does, or a whole NHWC map where `shift_size` is given."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        # timm's V2 keeps the bias outside of the Linear, and calls the Linear only where it has to.
        if self.q_bias is None:
            return self.qkv(x)
        if self.qkv_bias_separate:
            qkv = self.qkv(x)
            qkv += self.projection_bias()  # in place, and so in the dtype of qkv
            return qkv
        return F.linear(x, self.qkv.weight, self.projection_bias())

    def projection_bias(self) -> torch.Tensor | None:
        if self.q_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def qkv_is_plain(self) -> bool:
        return super().qkv_is_plain() and not self.qkv_bias_separate

    def scales(self) -> tuple[None, torch.Tensor]:
        return None, self.logit_scale.flatten()  # num_heads

    def table_source(self) -> Callable[[], torch.Tensor]:
        """timm's bias before the gather: what is elementwise is done here, where a window has fewer elements."""
        mlp = self.cpb_mlp
        if type(mlp) is nn.Sequential and tuple(map(type, mlp)) == (nn.Linear, nn.ReLU, nn.Linear):
            others = (mlp, mlp[1])
            table = mlp_table_source(self, mlp[0], mlp[2], others, self._coordinates, bounded=True)
            if table is not None:
                return table
        return lambda: 16 * torch.sigmoid(mlp(self.relative_coords_table).view(-1, self.num_heads))

    def _coordinates(self) -> torch.Tensor:
        return self.relative_coords_table.view(-1, 2)  # rows of the table, 2

    def _weight_modules(self) -> tuple[nn.Module, ...]:
        return self.softmax, self.attn_drop


class FlashSwinTransformerV2Block(SwinTransformerV2Block):
    """timm's `SwinTransformerV2Block` without the roll, the padding, the partition and the mask tensor, and with each
    norm and the residual add after it in one pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = whole_block(self, x, pre_norm=False)
        if out is not None:
            return out
        if not fuses_norms(self, x):
            return super().forward(x)
        return post_norm_branches(self, x, self._attn).view(x.shape)

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(self.attn, x):
            return self.attn(x, shift_size=self.shift_size)
        return super()._attn(x)
