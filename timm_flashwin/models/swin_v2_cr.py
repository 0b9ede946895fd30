"""Swin Transformer V2-CR: timm's block and attention with the attention path on the kernels.

timm's other V2 (timm/models/swin_transformer_v2_cr.py, after Christoph Reich's): cosine attention, too, but the bias is
what the MLP says, evaluated for every pair of tokens. The classes add methods and no state, as those of V1 do.
"""

import torch
from timm.layers import Mlp
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import nn

from ..functional import relative_position_bias
from .dispatch import FlashAttention, drops, is_hooked, takes_map
from .norms import fuses_norms, post_norm_branches

_ROW_BY_ROW = (Mlp, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity)  # the modules of timm's meta_mlp


class FlashSwinV2CrWindowAttention(FlashAttention, WindowMultiHeadAttention):
    """timm's `WindowMultiHeadAttention`; takes windows as timm's does, or an NHWC map where `shift_size` is given.

    timm's `sequential_attn` chooses nothing in its forward, nor does it here.
    """

    @property
    def head_dim(self) -> int:
        return self.in_features // self.num_heads

    def _scale(self) -> tuple[None, torch.Tensor]:
        return None, self.logit_scale  # num_heads

    def _position_bias(self) -> torch.Tensor:
        """timm's bias, from one row a relative position instead of one a pair of tokens where that is the same."""
        if "_relative_positional_encodings" in self.__dict__ or not self._meta_mlp_is_plain():
            return self._relative_positional_encodings().squeeze(0)
        table = self.meta_mlp(self._relative_coordinates())  # (2*Wh-1) * (2*Ww-1), num_heads
        return relative_position_bias(table, self.window_size, self.impl)

    def _meta_mlp_is_plain(self) -> bool:
        """Whether equal rows of `meta_mlp` give equal rows, and nobody counts them; active dropout draws for each."""
        return all(
            type(module) in _ROW_BY_ROW and not is_hooked(module) and not drops(module)
            for module in self.meta_mlp.modules()
        )

    def _relative_coordinates(self) -> torch.Tensor:
        """The rows of `relative_coordinates_log` without repetition, in the order of a relative position table.

        Returns:
            [(2 * Wh - 1) * (2 * Ww - 1), 2]: the coordinates depend on the difference of the rows and of the columns of
            two tokens alone. The differences to the last row (column) are 0 and below, those to the first 0 and above.
        """
        Wh, Ww = self.window_size
        pairs = self.relative_coordinates_log.view(Wh, Ww, Wh, Ww, 2)  # row and column of the query, then of the key
        rows = torch.cat([pairs[:-1, 0, -1, 0, 0], pairs[:, 0, 0, 0, 0]])  # 2*Wh - 1
        columns = torch.cat([pairs[0, :-1, 0, -1, 1], pairs[0, :, 0, 0, 1]])  # 2*Ww - 1
        return torch.cartesian_prod(rows, columns)

    def _weight_modules(self) -> tuple[nn.Module, ...]:
        return (self.attn_drop,)  # its softmax is no module


class FlashSwinTransformerV2CrBlock(SwinTransformerV2CrBlock):
    """timm's `SwinTransformerV2CrBlock` without the roll, the padding, the partition and the mask tensor, and with each
    norm and the residual add after it in one pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fuses_norms(self, x):
            return super().forward(x)
        return self.norm3(post_norm_branches(self, x)).view(x.shape)

    def _shifted_window_attn(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(self.attn, x):
            return self.attn(x, shift_size=self.shift_size)
        return super()._shifted_window_attn(x)
