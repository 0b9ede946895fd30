"""Swin Transformer V2-CR: timm's block and attention with the attention path on the kernels.

timm's other V2 (timm/models/swin_transformer_v2_cr.py, after Christoph Reich's): cosine attention, too, but the bias is
what the MLP says, evaluated for every pair of tokens. The classes add methods and no state, as those of V1 do.
"""

from collections.abc import Callable

import torch
from timm.layers import Mlp
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import nn

from ..geometry import distance_rows
from .dispatch import FlashAttention, drops, is_untouched, takes_map
from .fused_block import whole_block
from .norms import fuses_norms, post_norm_branches
from .position_mlp import mlp_table_source

_ROW_BY_ROW = (Mlp, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity)  # the modules of timm's meta_mlp


class FlashSwinV2CrWindowAttention(FlashAttention, WindowMultiHeadAttention):
    """timm's `WindowMultiHeadAttention`; takes windows as timm's does, or an NHWC map where `shift_size` is given.

    timm's `sequential_attn` chooses nothing in its forward, nor does it here.
    """

    @property
    def head_dim(self) -> int:
        return self.in_features // self.num_heads

    def scales(self) -> tuple[None, torch.Tensor]:
        return None, self.logit_scale  # num_heads

    def table_source(self) -> Callable[[], torch.Tensor] | None:
        """One row a relative position instead of one a pair of tokens, where that is the same."""
        if "_relative_positional_encodings" in self.__dict__ or not self._meta_mlp_is_plain():
            return None
        mlp = self.meta_mlp
        if type(mlp) is Mlp and type(mlp.act) is nn.ReLU and type(mlp.norm) is nn.Identity:
            others = (mlp, mlp.act, mlp.drop1, mlp.norm, mlp.drop2)
            table = mlp_table_source(self, mlp.fc1, mlp.fc2, others, self._coordinates, bounded=False)
            if table is not None:
                return table
        return lambda: mlp(distance_rows(self._coordinates(), self.window_size))

    def _coordinates(self) -> torch.Tensor:
        return self.relative_coordinates_log  # of every pair of tokens: N * N, 2

    def timms_position_bias(self) -> torch.Tensor:
        return self._relative_positional_encodings().squeeze(0)

    def _meta_mlp_is_plain(self) -> bool:
        """Whether equal rows of `meta_mlp` give equal rows, and nobody counts them; active dropout draws for each."""
        return all(
            type(module) in _ROW_BY_ROW and is_untouched(module) and not drops(module)
            for module in self.meta_mlp.modules()
        )

    def _weight_modules(self) -> tuple[nn.Module, ...]:
        return (self.attn_drop,)  # its softmax is no module


class FlashSwinTransformerV2CrBlock(SwinTransformerV2CrBlock):
    """timm's `SwinTransformerV2CrBlock` without the roll, the padding, the partition and the mask tensor, and with each
    norm and the residual add after it in one pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = whole_block(self, x, pre_norm=False)
        if out is None:
            if not fuses_norms(self, x):
                return super().forward(x)
            out = post_norm_branches(self, x, self._shifted_window_attn).view(x.shape)
        return self.norm3(out)

    def _shifted_window_attn(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(self.attn, x):
            return self.attn(x, shift_size=self.shift_size)
        return super()._shifted_window_attn(x)
