"""A whole block as one node of autograd, with none of its modules called.

In eager mode the host decides how long a step takes: one module after the other, a cast of every weight and of its
gradient, a node of autograd for each operator and each view. Where a block is timm's down to its last module, and
nobody could tell that these are not called, its tensors go through the same operators here. Weights are cast in one
launch, gradients in another, and gradients that meet at a residual add are added where a norm's backward writes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from timm.layers import is_exportable, is_scriptable
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.nn import functional as F

from .. import ops
from ..functional import has_linear_gelu, map_options, needs_grad
from ..ops import linear_gelu_pays
from .dispatch import FlashAttention, drops, is_untouched
from .mlp import is_plain_mlp
from .norms import fuses_norms, handed_on, sample_scale
from .snapshot import snapshot_of


class _Tensors(NamedTuple):
    """What a block computes with; also, field by field, something that is known of each, as in `needs` and `dtypes`."""

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


_LINEARS = slice(_Tensors._fields.index("qkv_weight"), None)  # weights and biases
_WEIGHTS = slice(_LINEARS.start, _Tensors._fields.index("qkv_bias"))


class _Plan(NamedTuple):
    """What a block is beside its tensors."""

    pre_norm: bool  # a norm is in front of each branch (V1), or behind it (V2)
    geometry: list  # what `ops.window_attention` takes after its tensors: num_heads, window_size, shift_size, scale
    save_stats: bool  # and that
    makes_bias: bool  # whether the position bias is made from its table; else the attention takes what there is
    pads: bool  # whether the map is padded to whole windows
    eps: tuple[float, float]  # of both norms
    dtype: torch.dtype  # of the products
    casts: bool  # whether autocast asks for that dtype
    norm_dtype: torch.dtype  # in which a norm's output is rounded
    linear_gelu: bool  # whether the first Linear of the MLP makes the output of the GELU, and nothing else is kept


class _Reading(NamedTuple):
    """What was found out about a block, for maps alike; it holds until something in the block changes."""

    attention: FlashAttention
    drop_paths: tuple[nn.Module, nn.Module]
    # Where the parameters are: those of the first norm and of the second, the weights of the Linears, and their biases
    # but the first, which the attention tells. Not the parameters themselves, which may be replaced, and are free then.
    parameters: list[tuple[dict, str]]
    table: Callable[[], Tensor] | None  # of the position bias, where that is made from one
    casts: bool  # whether autocast asks for the dtype that the map is worked on in
    trains: bool
    plans: dict  # by what is known of the position bias or its table


_DEVICES = ("cuda", "cpu")  # where the operators are; others may not know of autocast
_UNREAD = object()
_MAX_READINGS = 64  # sizes that come up are remembered, with a bound for ever new ones


def whole_block(block: nn.Module, x: Tensor, pre_norm: bool) -> Tensor | None:
    """Both branches of `block` for the map `x` [B, H, W, C].

    Returns:
        [B, H, W, C]; None where the modules themselves have to be called.
    """
    if torch.compiler.is_compiling() or not is_untouched() or ops.is_intercepted([x]):
        return None
    if x.device.type not in _DEVICES:
        return None
    readings = snapshot_of(block).found
    alike = (
        x.shape, x.dtype, x.device, x.requires_grad, torch.is_grad_enabled(), ops.autocast_dtype(x.device.type),
        is_exportable(), is_scriptable(),
    )  # fmt: skip
    reading = readings.get(alike, _UNREAD)
    if reading is _UNREAD:
        if len(readings) >= _MAX_READINGS:
            readings.clear()
        reading = readings[alike] = _read(block, x)
    if reading is None:
        return None
    attention, table = reading.attention, reading.table
    position = attention.timms_position_bias() if table is None else table()
    if not ops.is_plain(position):
        return None
    scale, logit_scale = attention.scales()
    parameters = [own[name] for own, name in reading.parameters]
    norms, weights, biases = parameters[:4], parameters[4:8], [attention.projection_bias(), *parameters[8:]]
    if not reading.trains and needs_grad(position, logit_scale, biases[0]):
        return None
    known = position.shape, position.dtype, position.device
    plan = reading.plans.get(known)
    if plan is None:
        plan = _plan(block, x, pre_norm, reading, position, biases[0], scale, logit_scale)
        reading.plans[known] = plan
    # Drawn after what drops in the position bias, as in timm.
    scale1, scale2 = [sample_scale(drop_path, x, plan.norm_dtype) for drop_path in reading.drop_paths]
    tensors = _Tensors(x, scale1, scale2, *norms, position, logit_scale, *weights, *biases)
    if reading.trains:
        return _FusedBlock.apply(plan, *tensors)
    return _forward(plan, _cast_linears(plan, tensors), keep=lambda tensor: None)


def _read(block: nn.Module, x: Tensor) -> _Reading | None:
    """What `whole_block` has to know of `block`, for maps as `x`; None where its modules have to be called."""
    if not (fuses_norms(block, x) and _is_plain_block(block)):
        return None
    attention, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
    linears = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    places = [(norm._parameters, name) for norm in norms for name in ("weight", "bias")]
    places += [(linear._parameters, "weight") for linear in linears]
    places += [(linear._parameters, "bias") for linear in linears[1:]]
    if not all([name in own for own, name in places]):  # attributes, as a replica's are
        return None
    numbers, pairs = (block.norm1.eps, block.norm2.eps), (attention.window_size, block.shift_size)
    if not all([type(x) in (int, float) for x in numbers] + [type(x) is tuple for x in pairs]):  # may change inside
        return None
    parameters = [own[name] for own, name in places]
    casts = ops.autocast_dtype(x.device.type) == ops.compute_dtype(x)
    of_linears = [t for t in (*parameters[4:], attention.projection_bias()) if t is not None]
    others = [t for t in (*parameters[:4], attention.scales()[1]) if t is not None]
    if not _takes_tensors(x, of_linears, others, casts):
        return None
    trains = torch.is_grad_enabled() and all([weight.requires_grad for weight in parameters[4:8]])
    if not trains and torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return None  # where a part is frozen, modules keep less for the backward, and may end it sooner
    drop_paths = block.drop_path1, block.drop_path2
    return _Reading(attention, drop_paths, places, attention.table_source(), casts, trains, {})


def _plan(
    block: nn.Module, x: Tensor, pre_norm: bool, reading: _Reading, position: Tensor, qkv_bias: Tensor | None,
    scale: float | None, logit_scale: Tensor | None,
) -> _Plan:  # fmt: skip
    attention, trains = reading.attention, reading.trains
    dtype, is_table, pads = ops.compute_dtype(x), reading.table is not None, attention.pads(x)
    qkv = (*x.shape[:3], attention.qkv.weight.shape[0]), dtype, x.device
    *geometry, save_stats = map_options(
        qkv, position, is_table, qkv_bias if pads else None, logit_scale, attention.num_heads,
        attention.window_size, block.shift_size, scale, trains,
    )  # fmt: skip
    weight = block.mlp.fc1.weight
    linear_gelu = not (trains or block.mlp.training) and has_linear_gelu(x.device, dtype, weight)
    makes_bias = is_table and (trains or not ops.attention_reads_table(x.shape[:3], *geometry[:2], x.device))
    return _Plan(
        pre_norm, geometry, save_stats, makes_bias, pads, (block.norm1.eps, block.norm2.eps), dtype, reading.casts,
        norm_dtype=dtype if pre_norm else handed_on(x, into_linear=False),
        linear_gelu=linear_gelu and linear_gelu_pays(x, weight.shape[0]),
    )  # fmt: skip


def _is_plain_block(block: nn.Module) -> bool:
    """Whether, its norms being fused, nobody could tell that the other modules of `block` are not called."""
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
    """Whether a map, the parameters of the Linears and what else there is are such that modules would do the same."""
    if casts:
        fits = all([t.is_floating_point() and t.dtype != torch.float64 for t in linears])
    else:
        dtype = x.dtype
        fits = all([t.dtype == dtype for t in linears])
    tensors, device = [x, *linears, *others], x.device
    return fits and all([t.device == device for t in tensors]) and not ops.is_intercepted(tensors)


# -------------------------------------------------------------------------------------------------- the computation


def _forward(plan: _Plan, block: _Tensors, keep: Callable[[Tensor | None], object]) -> Tensor:
    """The block, its Linears as `_cast_linears` gives them; `keep` gets the activations the backward starts from."""
    norm1 = block.norm1_weight, block.norm1_bias, plan.eps[0]
    norm2 = block.norm2_weight, block.norm2_bias, plan.eps[1]
    x = block.x
    # One name for all that flows along a branch: what is not kept is gone with the next step.
    if plan.pre_norm:
        _, y = ops.add_layer_norm.direct(x, None, None, *norm1, plan.dtype)
    else:
        y = x.to(plan.dtype)
    keep(y)
    y = F.linear(y, block.qkv_weight, block.qkv_bias)
    keep(y)
    bias, pad_qkv = block.position, block.qkv_bias if plan.pads else None
    if plan.makes_bias:
        bias = ops.relative_position_bias.direct(bias, plan.geometry[1])
    keep(bias)
    y, stats = ops.window_attention.direct(y, bias, pad_qkv, block.logit_scale, *plan.geometry, plan.save_stats)
    keep(y)
    keep(stats if plan.save_stats else None)
    y = F.linear(y, block.proj_weight, block.proj_bias)
    if plan.pre_norm:
        x, y = ops.add_layer_norm.direct(x, y, block.scale1, *norm2, plan.dtype)
        keep(x)
    else:
        keep(y)
        x = ops.layer_norm_add.direct(x, y, block.scale1, *norm1, plan.norm_dtype)
        y = x.to(plan.dtype)
    keep(y)
    if plan.linear_gelu:
        y = ops.linear_gelu.direct(y, block.fc1_weight, block.fc1_bias)
    else:
        y = F.linear(y, block.fc1_weight, block.fc1_bias)
        keep(y)
        y = F.gelu(y)
    y = F.linear(y, block.fc2_weight, block.fc2_bias)
    if plan.pre_norm:
        keep(None)
        return x + y if block.scale2 is None else torch.addcmul(x, y, _per_sample(block.scale2))
    keep(y)
    return ops.layer_norm_add.direct(x, y, block.scale2, *norm2, plan.norm_dtype)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *tensors: Tensor | None) -> Tensor:
        activations = []
        block = _cast_linears(plan, _Tensors(*tensors))
        out = _forward(plan, block, activations.append)
        ctx.plan, ctx.dtypes = plan, _Tensors(*[None if t is None else t.dtype for t in tensors])
        kept = block._replace(
            x=block.x if plan.pre_norm else None,
            position=None,
            qkv_bias=block.qkv_bias if plan.pads else None,
            proj_bias=None,
            fc1_bias=None,
            fc2_bias=None,
        )
        ctx.save_for_backward(*kept, *activations)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        ops.refuse_tangents("a block of timm_flashwin", (dout,))
        size = len(_Tensors._fields)
        saved, needs = ctx.saved_tensors, _Tensors(*ctx.needs_input_grad[1:])
        with torch.no_grad():
            grads = _backward(ctx.plan, _Tensors(*saved[:size]), saved[size:], ctx.dtypes, needs, dout)
        if torch.is_grad_enabled():  # create_graph=True
            grads = ops.without_second_derivative(grads)
        return None, *grads


def _backward(
    plan: _Plan, block: _Tensors, activations: tuple, dtypes: _Tensors, needs: _Tensors, dout: Tensor
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the tensors of `block`, None where there is no need; its Linears are as they were cast."""
    # into_norm: norm2 of V1, norm1 of V2, the one after the attention; into_last: norm2 of V2.
    into_qkv, qkv, position_bias, attended, stats, into_norm, into_fc1, hidden, into_last = activations
    norm1 = block.norm1_weight, block.norm1_bias, plan.eps[0]
    norm2 = block.norm2_weight, block.norm2_bias, plan.eps[1]
    bias_dtypes = [dtype if need else None for dtype, need in zip(dtypes, needs, strict=True)][_WEIGHTS.stop :]
    # A batch of gradients has no rule for out= and foreach; what was saved may come back as anything from a hook.
    plain = not ops.is_intercepted([dout, *[t for t in (*block, *activations) if t is not None]])

    def call(operator, *inputs):
        return (operator.direct if plain else operator)(*inputs)

    if plan.pre_norm:
        dy = _scaled_grad(dout, block.scale2, plan.dtype, plain)
    else:
        dy, *dnorm2 = call(ops.layer_norm_add_backward, dout, into_last, block.scale2, *norm2)
    dhidden, activated = call(ops.gelu_backward, _input_grad(dy, block.fc2_weight, hidden), hidden)
    dfc2 = _parameter_grads(dy, activated, bias_dtypes[3])
    del activated  # it and dhidden are the widest maps there are
    dfc1 = _parameter_grads(dhidden, into_fc1, bias_dtypes[2])
    dy = _input_grad(dhidden, block.fc1_weight, into_fc1)
    del dhidden
    if plan.pre_norm:
        dx, dy, *dnorm2 = call(ops.add_layer_norm_backward, dout, dy, into_norm, block.scale1, *norm2, plan.dtype)
    else:
        dx = dout + dy
        dy, *dnorm1 = call(ops.layer_norm_add_backward, dx, into_norm, block.scale1, *norm1)

    dproj = _parameter_grads(dy, attended, bias_dtypes[1])
    needs_dpad_qkv = plan.pads and needs.qkv_bias
    dqkv, dposition, dpad_qkv, dlogit_scale = call(
        ops.window_attention_backward,
        _input_grad(dy, block.proj_weight, attended), qkv, position_bias, block.qkv_bias, block.logit_scale,
        attended if plan.save_stats else None, stats, *plan.geometry,
        needs.position, needs_dpad_qkv, needs.logit_scale,
    )  # fmt: skip
    if plan.makes_bias and needs.position:
        dposition = call(ops.relative_position_bias_backward, dposition, plan.geometry[1])
    dqkv_weight, dqkv_bias = _parameter_grads(dqkv, into_qkv, bias_dtypes[0])
    if needs_dpad_qkv:
        dqkv_bias += dpad_qkv
    dy = _input_grad(dqkv, block.qkv_weight, into_qkv)
    if plan.pre_norm:
        dx, _, *dnorm1 = call(ops.add_layer_norm_backward, dx, dy, block.x, None, *norm1, None)
    else:
        dx = dx.add_(dy).to(dtypes.x)

    dweights, dbiases = zip((dqkv_weight, dqkv_bias), dproj, dfc1, dfc2, strict=True)
    dweights = _cast_grads(dweights, dtypes[_WEIGHTS], plain)
    grads = (dx, None, None, *dnorm1, *dnorm2, dposition, dlogit_scale, *dweights, *dbiases)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _scaled_grad(dout: Tensor, scale: Tensor | None, dtype: torch.dtype, plain: bool) -> Tensor:
    """The gradient of a branch whose samples are scaled as they are added."""
    if scale is None:
        return dout.to(dtype)
    if not plain:
        return (dout * _per_sample(scale)).to(dtype)
    return torch.mul(dout, _per_sample(scale), out=ops.empty_like(dout, dtype))


def _input_grad(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Of a Linear of `x`."""
    return (_rows(dy) @ weight).view(x.shape)


def _parameter_grads(dy: Tensor, x: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Of weight and bias of a Linear of `x`; that of the bias where its dtype is given."""
    rows = _rows(dy)
    return rows.T @ _rows(x), None if bias_dtype is None else rows.sum(dim=0, dtype=bias_dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _per_sample(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _cast_linears(plan: _Plan, block: _Tensors) -> _Tensors:
    """The block with weights and biases as autocast would hand them to the Linears, cast in one launch."""
    if not plan.casts:
        return block
    linears = block[_LINEARS]
    others = [t for t in linears if t is not None and t.dtype != plan.dtype]
    if not others:
        return block
    flat = others[0].new_empty(sum([t.numel() for t in others]), dtype=plan.dtype)
    copies = _unflatten_dense_tensors(flat, others)
    torch._foreach_copy_(copies, others)
    copies = iter(copies)
    cast = [t if t is None or t.dtype == plan.dtype else next(copies) for t in linears]
    return _Tensors(*block[: _LINEARS.start], *cast)


def _cast_grads(grads: tuple[Tensor, ...], dtypes: tuple[torch.dtype, ...], plain: bool) -> Sequence[Tensor]:
    """Each gradient in the dtype of its weight, in memory of its own."""
    if all([grad.dtype == dtype for grad, dtype in zip(grads, dtypes, strict=True)]):
        return grads
    if not plain:
        return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    copies = [ops.empty_like(grad, dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    torch._foreach_copy_(copies, grads)
    return copies
