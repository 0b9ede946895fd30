"""The patch embedding in inference: a convolution whose stride is its kernel's size is a Linear of the patches.

As a Linear it writes the map channels last, as all that follows reads it, and its bias needs no pass of its own.
"""

import torch
from timm.layers import PatchEmbed, is_exportable, is_scriptable
from timm.models import swin_transformer_v2_cr
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .. import ops
from ..functional import infers_plainly

_COMPILER_TELLS_SIZES = torch.__version__ >= (2, 11)  # 2.6's cannot be asked


class FlashPatchProjection(nn.Conv2d):
    """The convolution of timm's `PatchEmbed`."""

    impl = "auto"  # "reference" for the convolution always; with "triton", too, it serves where a Linear would not do

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # read once: a parametrization makes them anew
        if self._takes_linear(x, weight, bias):
            return patch_linear(x, weight, bias)
        return self._conv_forward(x, weight, bias)

    def _takes_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the patches of the images `x` go through a Linear: where nobody could tell, and it is faster."""
        return (
            not self.training
            and isinstance(x, Tensor)
            and infers_plainly(self.impl, x, weight, bias)
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and weight.shape == (self.out_channels, self.in_channels, *self.kernel_size)
            and is_patch_projection(self)
            and (_COMPILER_TELLS_SIZES or not torch.compiler.is_compiling())
            and all([_is_multiple(size, patch) for size, patch in zip(x.shape[2:], self.kernel_size, strict=True)])
            and not (is_exportable() or is_scriptable())
        )


def patch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, stride=(ph, pw)): images [B, 3, H, W], `weight` [C, 3, ph, pw]; [B, C, h, w], channels
    last."""
    ph, pw = weight.shape[2:]
    patches = x.unfold(2, ph, ph).unfold(3, pw, pw).permute(0, 2, 3, 1, 4, 5)  # B, h, w, 3, ph, pw
    # Cast by hand: in the pass that gathers, not in one more.
    patches = patches.to(ops.compute_dtype(x), memory_format=torch.contiguous_format).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


def _is_multiple(size: int, patch: int) -> bool:
    """Whether whole patches cover `size`, which a compiler has to know: with images of any size PyTorch's guards on the
    map, from its size in patches, take it minutes."""
    return statically_known_true(size % patch == 0)


def patch_projection(module: nn.Module) -> nn.Conv2d | None:
    """The patch projection of `module`, where it has timm's patch embedding: a convolution or what has its place."""
    embedding = getattr(module, "patch_embed", None)
    return embedding.proj if type(embedding) in (PatchEmbed, swin_transformer_v2_cr.PatchEmbed) else None


def is_patch_projection(convolution: nn.Conv2d) -> bool:
    """Whether each of its outputs sees one patch, and no two the same pixel."""
    return (
        tuple(convolution.stride) == tuple(convolution.kernel_size)
        and convolution.padding in (0, (0, 0), "valid")
        and tuple(convolution.dilation) == (1, 1)
        and convolution.groups == 1
    )
