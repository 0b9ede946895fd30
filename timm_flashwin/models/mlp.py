"""The MLP of a block: in training with half of its activations kept, in inference with its widest map written once.

The GELU keeps its input for the backward, and the Linear after it the output: the widest maps of a block. Here the
backward makes the output from the input, in the pass over it that it takes anyway. Without a backward the first Linear
hands on what the GELU makes of its output.
"""

import torch
from timm.layers import GELU, Mlp, is_exportable, is_scriptable
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..functional import linear_gelu_serves
from .dispatch import drops, is_untouched


class FlashMlp(Mlp):
    """timm's `Mlp`, of a block on the kernels."""

    impl = "auto"  # "reference" for timm's code always; with "triton", too, it serves where there is no kernel

    def forward(self, x: Tensor) -> Tensor:
        if not self.takes_linear_gelu(x):
            return super().forward(x)
        return self.fc2(ops.linear_gelu(x, self.fc1.weight, self.fc1.bias))

    def takes_linear_gelu(self, x: Tensor) -> bool:
        """Whether the first Linear and the GELU of `x` are one operator: in inference, where nobody could tell.

        Not in training mode, also without gradients: reentrant checkpointing computes once more with them.
        """
        return (
            not self.training
            and isinstance(x, Tensor)
            and type(self.fc1) is nn.Linear
            and linear_gelu_serves(self.impl, x, self.fc1.weight, self.fc1.bias)
            and not (is_exportable() or is_scriptable())
            and is_untouched(self.fc1)
            and is_plain_mlp(self)
        )


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, for a block whose norms are fused (`norms.fuses_norms`)."""
    if not (torch.is_grad_enabled() and torch._C._get_tracing_state() is None and is_plain_mlp(module)):
        return module(x)
    if isinstance(module, FlashMlp) and module.takes_linear_gelu(x):
        return module(x)
    hidden, linear = module.fc1(x), module.fc2
    if _trains(hidden, linear.weight):
        return _GeluLinear.apply(hidden, linear.weight, linear.bias)
    return linear(module.act(hidden))


_MLPS = (Mlp, FlashMlp)


def starts_with_linear(module: nn.Module) -> bool:
    """Whether a Linear takes what timm's MLP is given, and nobody looks at it before."""
    return type(module) in _MLPS and type(module.fc1) is nn.Linear and is_untouched(module, module.fc1)


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether nothing but a GELU lies between the two Linears of timm's MLP, and nobody looks at it."""
    if type(module) not in _MLPS:
        return False
    act, norm, linear, drop1, drop2 = module.act, module.norm, module.fc2, module.drop1, module.drop2
    return (
        (type(act) is GELU or type(act) is nn.GELU and act.approximate == "none")
        and type(norm) is nn.Identity
        and type(linear) is nn.Linear
        and all([type(drop) in (nn.Dropout, nn.Identity) and not drops(drop) for drop in (drop1, drop2)])
        and is_untouched(module, act, norm, linear, drop1, drop2)
    )


def _trains(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both sides of the Linear get a gradient, so that both would be kept, and it works in the dtype of
    `hidden`."""
    dtype = ops.autocast_dtype(hidden.device.type) or weight.dtype
    return (
        hidden.requires_grad
        and weight.requires_grad
        and hidden.dtype == dtype
        and ops.is_plain(hidden)
        and ops.is_plain(weight)
    )


class _GeluLinear(torch.autograd.Function):
    """F.linear(F.gelu(x), weight, bias), in the dtype of `x`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        # Cast by hand: what autocast casts in here it would remember without its gradient.
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dx, out = ops.gelu_backward(dout @ weight, x)
        rows = dout.reshape(-1, dout.shape[-1])  # not flatten, which has no rule for is_grads_batched=True
        dweight = (rows.T @ out.reshape(-1, out.shape[-1])).to(weight_dtype)
        return dx, dweight, rows.sum(dim=0).to(bias_dtype) if ctx.needs_input_grad[2] else None
