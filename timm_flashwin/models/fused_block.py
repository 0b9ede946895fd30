"""A whole block as one node of autograd, with none of its modules called.

In eager mode the host decides how long a step takes: one module after the other, a cast of every weight and of its
gradient, a node of autograd for each operator and each view. Where a block is timm's down to its last module, and
nobody could tell that these are not called, its tensors go through the same operators here. Weights are cast in one
launch, gradients in another, and gradients that meet at a residual add are added where a norm's backward writes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.nn import functional as F

from .. import ops
from ..functional import map_options
from .dispatch import FlashAttention, drops, is_untouched
from .mlp import is_plain_mlp
from .norms import handed_on, sample_scale


class _Tensors(NamedTuple):
    """What a block computes with, or, in the same order, what is known about each of it."""

    x: Tensor  # B, H, W, C
    scale1: Tensor | None  # B; stochastic depth of the attention's branch
    scale2: Tensor | None  # B; of the MLP's
    norm1_weight: Tensor  # C
    norm1_bias: Tensor  # C
    norm2_weight: Tensor  # C
    norm2_bias: Tensor  # C
    position: Tensor  # the position bias, num_heads, N, N, or its table, (2 * Wh - 1) * (2 * Ww - 1), num_heads
    logit_scale: Tensor | None  # num_heads
    # Weights come before the biases: cast side by side, they stay aligned.
    qkv_weight: Tensor  # 3 * num_heads * head_dim, C
    proj_weight: Tensor  # C, num_heads * head_dim
    fc1_weight: Tensor  # hidden, C
    fc2_weight: Tensor  # C, hidden
    qkv_bias: Tensor | None  # 3 * num_heads * head_dim
    proj_bias: Tensor | None  # C
    fc1_bias: Tensor | None  # hidden
    fc2_bias: Tensor | None  # C


_NUM_OTHERS = _Tensors._fields.index("qkv_weight")  # what is no weight or bias of a Linear


class _Plan(NamedTuple):
    """What a block is beside its tensors."""

    pre_norm: bool  # a norm is in front of each branch (V1), or behind it (V2)
    attention: tuple  # what `ops.window_attention` takes after its tensors
    is_table: bool  # whether there is a table of the position bias
    pads: bool  # whether the map is padded to whole windows
    eps: tuple[float, float]  # of both norms
    dtype: torch.dtype  # of the products
    casts: bool  # whether autocast asks for that dtype
    norm_dtype: torch.dtype  # in which a norm's output is rounded


def whole_block(block: nn.Module, x: Tensor, pre_norm: bool) -> Tensor | None:
    """Both branches of `block`, whose norms are fused for the map `x` [B, H, W, C] (`norms.fuses_norms`).

    Returns:
        [B, H, W, C]; None where the modules themselves have to be called.
    """
    if not _is_plain_block(block):
        return None
    attention, mlp, norm1, norm2 = block.attn, block.mlp, block.norm1, block.norm2
    linears = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    weights = [linear.weight for linear in linears]
    biases = [attention.projection_bias(), *[linear.bias for linear in linears[1:]]]
    norms = (norm1.weight, norm1.bias, norm2.weight, norm2.bias)
    dtype = ops.compute_dtype(x)
    casts = ops.autocast_dtype(x.device.type) == dtype
    scale, logit_scale = attention.scales()
    position = attention.position_table()
    is_table = position is not None
    if not is_table:
        position = attention.timms_position_bias()
    linears = [t for t in (*weights, *biases) if t is not None]
    if not _takes_tensors(x, linears, [t for t in (*norms, position, logit_scale) if t is not None], casts):
        return None

    norm_dtype = dtype if pre_norm else handed_on(x, into_linear=False)
    # Drawn after what drops in the position bias, as in timm.
    scale1, scale2 = [sample_scale(drop_path, x, norm_dtype) for drop_path in (block.drop_path1, block.drop_path2)]
    tensors = _Tensors(x, scale1, scale2, *norms, position, logit_scale, *weights, *biases)
    trains = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    pads = attention.pads(x)
    qkv = (*x.shape[:3], weights[0].shape[0]), dtype, x.device
    options = map_options(
        qkv, position, is_table, biases[0] if pads else None, logit_scale, attention.num_heads,
        attention.window_size, block.shift_size, scale, trains,
    )  # fmt: skip
    plan = _Plan(pre_norm, options, is_table, pads, (norm1.eps, norm2.eps), dtype, casts, norm_dtype)
    if trains:
        return _FusedBlock.apply(plan, *tensors)
    return _forward(plan, tensors, _cast_linears(tensors, plan), keep=lambda tensor: None)


def _is_plain_block(block: nn.Module) -> bool:
    """Whether nobody could tell that the modules of `block` are not called."""
    attention, mlp = block.attn, block.mlp
    proj, proj_drop = attention.proj, attention.proj_drop
    return (
        type(attention).forward is FlashAttention.forward
        and attention.qkv_is_plain()
        and type(proj) is nn.Linear
        and type(proj_drop) in (nn.Dropout, nn.Identity)
        and not drops(proj_drop)
        and is_plain_mlp(mlp)
        and type(mlp.fc1) is nn.Linear
        and is_untouched(attention, proj, proj_drop, mlp.fc1)
        and not ("_attn" in block.__dict__ or "_shifted_window_attn" in block.__dict__)
    )


def _takes_tensors(x: Tensor, linears: list[Tensor], others: list[Tensor], casts: bool) -> bool:
    """Whether a map, what its Linears have and what else there is are such that the modules would do the same."""
    if casts:
        fits = all([t.is_floating_point() and t.dtype != torch.float64 for t in linears])
    else:
        dtype = x.dtype
        fits = all([t.dtype == dtype for t in linears])
    tensors, device = [x, *linears, *others], x.device
    return fits and all([t.device == device for t in tensors]) and not ops.is_intercepted(tensors)


# -------------------------------------------------------------------------------------------------- the computation


def _forward(
    plan: _Plan, block: _Tensors, linears: Sequence[Tensor | None], keep: Callable[[Tensor | None], object]
) -> Tensor:  # fmt: skip
    """The block, its `linears` cast; `keep` gets the activations that the backward starts from."""
    qkv_weight, proj_weight, fc1_weight, fc2_weight, qkv_bias, proj_bias, fc1_bias, fc2_bias = linears
    norm1 = block.norm1_weight, block.norm1_bias, plan.eps[0]
    norm2 = block.norm2_weight, block.norm2_bias, plan.eps[1]
    x = block.x
    # One name for all that flows along a branch: what is not kept is gone with the next step.
    if plan.pre_norm:
        _, y = ops.add_layer_norm.unwatched(x, None, None, *norm1, plan.dtype)
    else:
        y = x.to(plan.dtype)
    keep(y)
    y = F.linear(y, qkv_weight, qkv_bias)
    keep(y)
    bias, pad_qkv = block.position, block.qkv_bias if plan.pads else None
    if plan.is_table:
        bias = ops.relative_position_bias.unwatched(bias, plan.attention[1])
    keep(bias)
    y, stats = ops.window_attention.unwatched(y, bias, pad_qkv, block.logit_scale, *plan.attention)
    keep(y)
    keep(stats)
    y = F.linear(y, proj_weight, proj_bias)
    if plan.pre_norm:
        x, y = ops.add_layer_norm.unwatched(x, y, block.scale1, *norm2, plan.dtype)
        keep(x)
    else:
        keep(y)
        x = ops.layer_norm_add.unwatched(x, y, block.scale1, *norm1, plan.norm_dtype)
        y = x.to(plan.dtype)
    keep(y)
    y = F.linear(y, fc1_weight, fc1_bias)
    keep(y)
    y = F.gelu(y)
    y = F.linear(y, fc2_weight, fc2_bias)
    if not plan.pre_norm:
        keep(y)
        return ops.layer_norm_add.unwatched(x, y, block.scale2, *norm2, plan.norm_dtype)
    return x + y if block.scale2 is None else torch.addcmul(x, y, _per_sample(block.scale2))


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor | None) -> Tensor:
        block = _Tensors(*tensors)
        linears = _cast_linears(block, plan)
        activations = []
        out = _forward(plan, block, linears, activations.append)
        ctx.plan, ctx.dtypes = plan, _Tensors(*[None if t is None else t.dtype for t in tensors])
        others = block._replace(x=block.x if plan.pre_norm else None, position=None)[:_NUM_OTHERS]
        ctx.save_for_backward(*activations, *others, *linears[:4], block.qkv_bias if plan.pads else None)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        ops.refuse_tangents("a block's backward", (dout,))
        saved = ctx.saved_tensors
        size = len(_Tensors._fields) - 3  # three biases need not be known
        with torch.no_grad():
            grads = _backward(
                ctx.plan, saved[:-size], _Tensors(*saved[-size:], None, None, None), ctx.dtypes,
                _Tensors(*ctx.needs_input_grad[1:]), dout,
            )  # fmt: skip
        if torch.is_grad_enabled():  # create_graph=True
            grads = ops.without_second_derivative(grads, (dout, *saved))
        return None, *grads


def _backward(plan: _Plan, activations, block: _Tensors, dtypes: _Tensors, needs: _Tensors, dout: Tensor) -> list:
    """The gradients of a block's tensors, None where not needed. The weights of its Linears are as they were cast."""
    into_qkv, qkv, position_bias, attended, stats, normed, into_fc1, hidden, *into_norm2 = activations
    norm1 = block.norm1_weight, block.norm1_bias, plan.eps[0]
    norm2 = block.norm2_weight, block.norm2_bias, plan.eps[1]
    if plan.pre_norm:
        dy = _of_branch(dout, block.scale2, plan.dtype)
    else:
        dy, *dnorm2 = ops.layer_norm_add_backward(dout, *into_norm2, block.scale2, *norm2)

    dhidden, activated = ops.gelu_backward(_of_input(dy, block.fc2_weight, hidden), hidden)
    dfc2 = _of_parameters(dy, activated, needs.fc2_weight, needs.fc2_bias and dtypes.fc2_bias)
    del activated  # it and dhidden are the widest maps there are
    dfc1 = _of_parameters(dhidden, into_fc1, needs.fc1_weight, needs.fc1_bias and dtypes.fc1_bias)
    dy = _of_input(dhidden, block.fc1_weight, into_fc1)
    del dhidden
    if plan.pre_norm:
        dx, dy, *dnorm2 = ops.add_layer_norm_backward(dout, dy, normed, block.scale1, *norm2, plan.dtype)
    else:
        dx = dout + dy
        dy, *dnorm1 = ops.layer_norm_add_backward(dx, normed, block.scale1, *norm1)

    dproj = _of_parameters(dy, attended, needs.proj_weight, needs.proj_bias and dtypes.proj_bias)
    *geometry, save_stats = plan.attention
    needs_dpad_qkv = plan.pads and needs.qkv_bias
    dqkv, dposition, dpad_qkv, dlogit_scale = ops.window_attention_backward(
        _of_input(dy, block.proj_weight, attended), qkv, position_bias, block.qkv_bias, block.logit_scale,
        attended if save_stats else None, stats if save_stats else None, *geometry,
        needs.position, needs_dpad_qkv, needs.logit_scale,
    )  # fmt: skip
    if plan.is_table and needs.position:
        dposition = ops.relative_position_bias_backward(dposition, geometry[1])
    dqkv_weight, dqkv_bias = _of_parameters(dqkv, into_qkv, needs.qkv_weight, needs.qkv_bias and dtypes.qkv_bias)
    if needs_dpad_qkv:
        dqkv_bias += dpad_qkv
    dy = _of_input(dqkv, block.qkv_weight, into_qkv)
    if plan.pre_norm:
        dx, _, *dnorm1 = ops.add_layer_norm_backward(dx, dy, block.x, None, *norm1, None)
    else:
        dx = dx.add_(dy).to(dtypes.x)

    dweights = (dqkv_weight, dproj[0], dfc1[0], dfc2[0])
    dweights = _cast(dweights, dtypes[_NUM_OTHERS : _NUM_OTHERS + 4])
    dbiases = (dqkv_bias, dproj[1], dfc1[1], dfc2[1])
    grads = (dx, None, None, *dnorm1, *dnorm2, dposition, dlogit_scale, *dweights, *dbiases)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _of_branch(dout: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch whose samples are scaled before they are added: in one launch, without a branch."""
    if scale is None:
        return dout.to(dtype)
    if not ops.is_plain(dout):
        return (dout * _per_sample(scale)).to(dtype)
    return torch.mul(dout, _per_sample(scale), out=dout.new_empty(dout.shape, dtype=dtype))


def _of_input(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of the input `x` of a Linear."""
    return (_rows(dy) @ weight).view(x.shape)


def _of_parameters(dy: Tensor, x: Tensor, needs_weight: bool, bias_dtype: torch.dtype | bool) -> tuple:
    """The gradients of weight and bias of a Linear whose input is `x`; `bias_dtype` is False where there is no bias."""
    rows = _rows(dy)
    dweight = rows.T @ _rows(x) if needs_weight else None
    return dweight, rows.sum(dim=0, dtype=bias_dtype) if bias_dtype else None


def _cast_linears(block: _Tensors, plan: _Plan) -> Sequence[Tensor | None]:
    linears = block[_NUM_OTHERS:]
    return _cast(linears, [plan.dtype] * len(linears)) if plan.casts else linears


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _per_sample(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _cast(tensors, dtypes) -> list[Tensor | None]:
    """Each of `tensors` in its dtype, where it has another one: in one launch where that is one dtype for all."""
    others = [(x, dtype) for x, dtype in zip(tensors, dtypes, strict=True) if x is not None and x.dtype != dtype]
    if len({dtype for _, dtype in others}) != 1 or not all([ops.is_plain(x) for x, _ in others]):
        return [None if x is None else x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    sources = [x for x, _ in others]
    flat = sources[0].new_empty(sum([x.numel() for x in sources]), dtype=others[0][1])
    copies = _unflatten_dense_tensors(flat, sources)
    torch._foreach_copy_(copies, sources)
    copies = iter(copies)
    return [x if x is None or x.dtype == dtype else next(copies) for x, dtype in zip(tensors, dtypes, strict=True)]
