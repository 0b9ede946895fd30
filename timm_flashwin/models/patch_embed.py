"""The patch embedding in inference: a convolution whose stride is its kernel's size is a Linear of the patches.

As a Linear it writes the map channels last, as all that follows reads it, and its bias needs no pass of its own.
"""

import torch
from timm.layers import PatchEmbed, is_exportable, is_scriptable
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .. import ops
from ..functional import needs_grad

_MODELS = (
    swin_transformer.SwinTransformer,
    swin_transformer_v2.SwinTransformerV2,
    swin_transformer_v2_cr.SwinTransformerV2Cr,
)


class FlashPatchProjection(nn.Conv2d):
    """The convolution of timm's `PatchEmbed`."""

    impl = "auto"  # "reference" for the convolution always; with "triton", too, it serves where a Linear would not do

    def forward(self, x: Tensor) -> Tensor:
        return patch_linear(self, x) if self.takes_linear(x) else super().forward(x)

    def takes_linear(self, x: Tensor) -> bool:
        """Whether the patches of the images `x` go through a Linear: in inference in half precision on a GPU."""
        return (
            not self.training
            and self.impl != "reference"
            and isinstance(x, Tensor)
            and x.is_cuda
            and not torch.jit.is_tracing()  # where sizes are tensors
            and ops.compute_dtype(x) in (torch.float16, torch.bfloat16)
            and not needs_grad(x, *self.parameters())
            and x.dim() == 4
            and x.shape[1] == self.in_channels
            and all([_is_multiple(size, patch) for size, patch in zip(x.shape[2:], self.kernel_size, strict=True)])
            and is_patch_projection(self)
            and not (is_exportable() or is_scriptable())
        )


def patch_linear(projection: nn.Conv2d, x: Tensor) -> Tensor:
    """`projection(x)` of an `is_patch_projection`: from images [B, 3, H, W] to a map [B, C, h, w], channels last."""
    ph, pw = projection.kernel_size
    patches = x.unfold(2, ph, ph).unfold(3, pw, pw).permute(0, 2, 3, 1, 4, 5)  # B, h, w, 3, ph, pw
    # Cast by hand: in the pass that gathers, not in one more.
    patches = patches.to(ops.compute_dtype(x), memory_format=torch.contiguous_format).flatten(3)
    return F.linear(patches, projection.weight.flatten(1), projection.bias).permute(0, 3, 1, 2)


def _is_multiple(size: int, patch: int) -> bool:
    """Whether whole patches cover `size`, which a compiler has to know: with images of any size PyTorch's guards on the
    map, from its size in patches, take it minutes."""
    return statically_known_true(size % patch == 0)


def patch_projection(model: nn.Module) -> nn.Conv2d | None:
    """The patch projection of one of timm's Swin models, where it has timm's; None of anything else."""
    embedding = getattr(model, "patch_embed", None) if isinstance(model, _MODELS) else None
    if type(embedding) not in (PatchEmbed, swin_transformer_v2_cr.PatchEmbed):
        return None
    return embedding.proj if isinstance(embedding.proj, nn.Conv2d) else None


def is_patch_projection(convolution: nn.Conv2d) -> bool:
    """Whether each of its outputs sees one patch, no two the same pixel, and its weights are tensors like others."""
    return (
        tuple(convolution.stride) == tuple(convolution.kernel_size)
        and convolution.padding in (0, (0, 0), "valid")
        and tuple(convolution.dilation) == (1, 1)
        and convolution.groups == 1
        and type(convolution.weight) in (Tensor, nn.Parameter)
    )
