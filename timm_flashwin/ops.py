"""The kernels as PyTorch operators: schema, fake kernel, autograd, autocast and FLOP counts.

Triton is imported on the first launch.

`timm_flashwin::window_attention` works on the NHWC map, `timm_flashwin::windowed_sdpa` on partitioned windows,
`timm_flashwin::relative_position_bias` makes the bias of both, from a table which `continuous_position_table` makes for
the V2 family. `timm_flashwin::add_layer_norm` and `timm_flashwin::layer_norm_add` are the residual add with the norm
after or before it. Each has a `_backward` beside it. `timm_flashwin::gelu_backward` gives the output of the GELU along,
and `timm_flashwin::linear_gelu` is a Linear with the GELU after it, for inference.
They take what their callers have validated.
"""

import contextlib
import functools
import importlib
import math
import sys

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._device import DeviceContext

from .geometry import num_windows

_GEOMETRY = "int num_heads, int[2] window_size, int[2] shift_size, float scale"
_library = torch.library.Library("timm_flashwin", "DEF")
_library.define(
    f"window_attention(Tensor qkv, Tensor? bias, Tensor? pad_qkv, Tensor? logit_scale, {_GEOMETRY}, bool save_stats) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "window_attention_backward(Tensor do, Tensor qkv, Tensor? bias, Tensor? pad_qkv, Tensor? logit_scale, Tensor? out, "
    f"Tensor? stats, {_GEOMETRY}, bool need_dbias, bool need_dpad_qkv, bool need_dlogit_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "windowed_sdpa(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? logit_scale, float scale, "
    "bool save_stats) -> (Tensor, Tensor)"
)
_library.define(
    "windowed_sdpa_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? logit_scale, "
    "Tensor? out, Tensor? stats, float scale, bool need_dbias, bool need_dlogit_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("relative_position_bias(Tensor table, int[2] window_size) -> Tensor")
_library.define("relative_position_bias_backward(Tensor dbias, int[2] window_size) -> Tensor")
_library.define(
    "continuous_position_table(Tensor coordinates, Tensor weight1, Tensor bias1, Tensor weight2, Tensor? bias2, "
    "int[2] window_size, bool bounded, ScalarType dtype) -> Tensor"
)
_library.define(
    "continuous_position_table_backward(Tensor dtable, Tensor coordinates, Tensor weight1, Tensor bias1, "
    "Tensor weight2, Tensor? bias2, int[2] window_size, bool bounded) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "add_layer_norm(Tensor x, Tensor? y, Tensor? y_scale, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "add_layer_norm_backward(Tensor? dsum, Tensor dout, Tensor sum, Tensor? y_scale, Tensor weight, Tensor bias, "
    "float eps, ScalarType? y_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_norm_add(Tensor x, Tensor y, Tensor? y_scale, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
    "-> Tensor"
)
_library.define(
    "layer_norm_add_backward(Tensor dout, Tensor y, Tensor? y_scale, Tensor weight, Tensor bias, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define("gelu_backward(Tensor dout, Tensor x) -> (Tensor, Tensor)")
_library.define("linear_gelu(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

_WAY_OUT = 'use impl="reference", by timm_flashwin.accelerate(model, impl="reference") for a model'


def _implement(name: str, kernel, fake, backward=None, setup_context=None, num_activations: int = 0) -> "_Operator":
    """Register an operator; the first `num_activations` of its inputs follow autocast.

    `kernel` and `fake` may return None for an output that nobody asked for.
    """
    # "CPU" is for Triton's interpreter; functional sends no CPU tensor here without it.
    for dispatch_key in ("CUDA", "CPU"):
        _library.impl(name, _without_none(kernel), dispatch_key)
    torch.library.register_fake(f"timm_flashwin::{name}", _without_none(fake), lib=_library)

    def without_tangents(ctx, *grads):
        refuse_tangents(f"timm_flashwin::{name}", grads)
        return backward(ctx, *grads)

    torch.library.register_autograd(
        f"timm_flashwin::{name}", without_tangents, setup_context=setup_context, lib=_library
    )
    operator = _Operator(name, num_activations, kernel, without_tangents, setup_context)
    if num_activations:

        def autocast(*inputs):
            cast = _in_autocasts_dtype(inputs, num_activations)
            with torch.autocast(inputs[0].device.type, enabled=False):
                return operator._dispatched(*cast)

        for dispatch_key in ("AutocastCUDA", "AutocastCPU"):
            _library.impl(name, autocast, dispatch_key)
    return operator


def _without_none(function):
    """The dispatcher takes tensors, never None: an empty one stands for it."""

    def tensors_of(*inputs):
        outputs = function(*inputs)
        if isinstance(outputs, Tensor):
            return outputs
        like = next(x for x in inputs if isinstance(x, Tensor))
        return tuple(like.new_empty(0) if x is None else x for x in outputs)

    return tensors_of


def refuse_tangents(name: str, grads) -> None:
    """Raise where `name` would lose a tangent of the gradients that its backward is given."""
    if forward_ad._current_level >= 0 and any(
        grad is not None and forward_ad.unpack_dual(grad).tangent is not None for grad in grads
    ):
        raise NotImplementedError(f"{name} has no forward-mode derivative; " + _WAY_OUT)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the kernels of timm_flashwin have no second derivative; " + _WAY_OUT)


class _Underived(torch.autograd.Function):
    """A tensor whose derivative is refused."""

    @staticmethod
    def forward(ctx, x: Tensor, _: Tensor):
        return x.clone()

    backward = staticmethod(_no_second_derivative)


def without_second_derivative(grads: list[Tensor | None]) -> list[Tensor | None]:
    """`grads`, such that a derivative of theirs is refused and not taken for zero."""
    trained = torch.empty((), requires_grad=True)
    return [None if x is None else _Underived.apply(x, trained) for x in grads]


@functools.cache
def _kernels(name: str):
    """A module of `kernels`, which import Triton."""
    return importlib.import_module(f".kernels.{name}", __package__)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this kind of device, None where autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype `x` is worked on in: its own, or autocast's."""
    autocast = autocast_dtype(x.device.type)
    return x.dtype if autocast is None or x.dtype == torch.float64 else autocast


@torch.compiler.assume_constant_result  # torch.compile guards on both by itself
def transforms_are_on() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    The operators have no rules for them: under a dual level they would lose the tangents and say nothing.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Operator:
    """An operator as Python calls it.

    PyTorch's dispatcher leaves the schema, autograd and autocast of a Python operator to Python, which takes longer
    than the launch does. Where nobody looks on who could tell the difference, the call goes past it.
    """

    def __init__(self, name: str, num_activations: int, kernel, backward, setup_context):
        self._dispatched = getattr(torch.ops.timm_flashwin, name)
        self._num_activations = num_activations
        self._kernel = kernel

        def forward(ctx, *inputs):
            output = kernel(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
        # A gradient of a gradient operator is the dispatcher's affair.
        self._function = type(name, (torch.autograd.Function,), methods) if setup_context else None

    def __call__(self, *inputs):
        if torch.compiler.is_compiling():
            return self._dispatched(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if _is_watched(tensors):
            return self._dispatched(*inputs)
        if self._num_activations:
            inputs = _in_autocasts_dtype(inputs, self._num_activations)
        if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):
            return self._kernel(*inputs)
        return (self._function.apply if self._function else self._dispatched)(*inputs)

    def direct(self, *inputs):
        """Without a node, for who has asked `is_intercepted`, and has cast what autocast wants cast."""
        return (self._dispatched if torch.autograd._profiler_enabled() else self._kernel)(*inputs)


def _is_watched(tensors: list[Tensor]) -> bool:
    """Whether more is under way than eager execution: a profiler, a mode, tracing, a transform, a tensor subclass."""
    return torch.autograd._profiler_enabled() or is_intercepted(tensors)


def is_intercepted(tensors: list[Tensor]) -> bool:
    """Whether somebody has to see the operators a step is made of: as `_is_watched`, but for a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or _has_function_mode()
        or torch._C._get_tracing_state() is not None
        or transforms_are_on()
        or not all([is_plain(x) for x in tensors])
    )


def _has_function_mode() -> bool:
    """Whether a mode sees the functions of PyTorch that are called: any but a default device, which changes nothing
    where there are tensors."""
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and not all([type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(modes)])


def is_plain(x: Tensor) -> bool:
    """Whether `x` has memory that a kernel can be pointed to, and that holds its values.

    What `is_grads_batched=True` hands over has none, and a negated view holds other values.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not x.is_neg() and not is_legacy_batchedtensor(x)
    )


def _in_autocasts_dtype(inputs, num_activations: int):
    """The activations, which come first, as timm's matmuls run them; the bias keeps its dtype: logits are float32."""
    if autocast_dtype(inputs[0].device.type) is None:
        return inputs
    activations = [None if x is None else x.to(compute_dtype(x)) for x in inputs[:num_activations]]
    return *activations, *inputs[num_activations:]


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous; `x.new_empty(x.shape)` takes the host twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _promoted(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if x.dtype == dtype else torch.promote_types(x.dtype, dtype)


def _acc_dtype(x: Tensor) -> torch.dtype:
    return _promoted(x, torch.float32)


def _where_needed(grads, needed) -> tuple[Tensor | None, ...]:
    """What autograd takes: None where nobody asked."""
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _empty_where_needed(inputs, needed) -> tuple[Tensor | None, ...]:
    return tuple(empty_like(x) if need else None for x, need in zip(inputs, needed, strict=True))


def _zeros_where_needed(inputs, needed) -> tuple[Tensor | None, ...]:
    return tuple(x.new_zeros(x.shape) if need else None for x, need in zip(inputs, needed, strict=True))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


_NO_GUARD = contextlib.nullcontext()


@functools.cache
def _is_the_only_device() -> bool:
    return torch.cuda.device_count() == 1


def _device_guard(x: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if not x.is_cuda or _is_the_only_device() or x.device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device_of(x)


def _save(ctx, tensors, output, save_stats: bool) -> None:
    """Of an attention, for its backward: its tensors, and the output with its stats where it starts from these."""
    out, stats = output
    if stats is not None:
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *((out, stats) if save_stats else (None, None)))


# ------------------------------------------------------------------------------------------ window_attention


def _window_attention(qkv, bias, pad_qkv, logit_scale, *geometry_and_save_stats):
    inputs = (qkv, bias, pad_qkv, logit_scale)
    *geometry, save_stats = geometry_and_save_stats
    out, stats = _window_attention_fake(*inputs, *geometry, save_stats)
    if out.numel():
        launch = _kernels("launch")
        with _device_guard(qkv):
            launch.launch_forward(*launch.call_on_map(*inputs, *geometry), out, stats)
    return out, stats


def _window_attention_fake(
    qkv, bias, pad_qkv, logit_scale, num_heads, window_size, shift_size, scale, save_stats
):  # fmt: skip
    B, H, W, three_c = qkv.shape
    out = qkv.new_empty(B, H, W, three_c // 3)
    if not save_stats:
        return out, None
    rows, cols = num_windows((H, W), window_size)
    window_area = window_size[0] * window_size[1]
    return out, qkv.new_empty(B * rows * cols, num_heads, window_area, 2, dtype=_acc_dtype(qkv))


def attention_reads_table(map_size: tuple[int, int, int], num_heads: int, window_size, device: torch.device) -> bool:
    """Whether to give `window_attention` of a map [B, H, W, ...] the table of the bias, [(2 * Wh - 1) * (2 * Ww - 1),
    num_heads], in place of the bias; it takes it where nothing needs a gradient."""
    B, *size = map_size
    return _kernels("launch").reads_table(B * math.prod(num_windows(size, window_size)), num_heads, device)


def _window_attention_setup_context(ctx, inputs, output):
    *tensors, num_heads, window_size, shift_size, scale, save_stats = inputs
    if tensors[1] is not None and tensors[1].dim() == 2:
        raise ValueError(
            "timm_flashwin::window_attention has no gradient where it is given the table of the bias; "
            "give it relative_position_bias(table, window_size)"
        )
    ctx.geometry = num_heads, window_size, shift_size, scale
    _save(ctx, tensors, output, save_stats)


def _window_attention_autograd(ctx, do, _):
    if do is None:
        return (None,) * 9
    _, *needed = ctx.needs_input_grad[:4]
    grads = window_attention_backward(do, *ctx.saved_tensors, *ctx.geometry, *needed)
    return *_where_needed(grads, (True, *needed)), None, None, None, None, None


def _window_attention_backward(
    do, qkv, bias, pad_qkv, logit_scale, out, stats, num_heads, window_size, shift_size, scale, *needed
):  # fmt: skip
    dqkv = empty_like(qkv)
    inputs = (bias, pad_qkv, logit_scale)
    if not do.numel():
        return dqkv, *_zeros_where_needed(inputs, needed)
    shared_grads = _empty_where_needed(inputs, needed)
    launch = _kernels("launch")
    with _device_guard(qkv):
        if out is not None:  # a hook on saved tensors may give them back in another layout
            out, stats = out.contiguous(), stats.contiguous()
        call = launch.call_on_map(qkv, *inputs, num_heads, window_size, shift_size, scale)
        do = do.to(qkv.dtype).contiguous()
        launch.launch_backward(*call, do, out, stats, (dqkv,), launch.SharedGrads(*shared_grads))
    return dqkv, *shared_grads


def _window_attention_backward_fake(
    do, qkv, bias, pad_qkv, logit_scale, out, stats, num_heads, window_size, shift_size, scale, *needed
):  # fmt: skip
    dqkv = empty_like(qkv)
    return dqkv, *_empty_where_needed((bias, pad_qkv, logit_scale), needed)


window_attention = _implement(
    "window_attention",
    _window_attention,
    _window_attention_fake,
    _window_attention_autograd,
    _window_attention_setup_context,
    num_activations=1,
)
window_attention_backward = _implement(
    "window_attention_backward", _window_attention_backward, _window_attention_backward_fake, _no_second_derivative
)


# --------------------------------------------------------------------------------------------- windowed_sdpa


def _windowed_sdpa(q, k, v, bias, mask, logit_scale, scale, save_stats):
    out, stats = _windowed_sdpa_fake(q, k, v, bias, mask, logit_scale, scale, save_stats)
    if out.numel():
        launch = _kernels("launch")
        with _device_guard(q):
            call = launch.call_on_windows(q, k, v, bias, mask, logit_scale, scale)
            launch.launch_forward(*call, out, stats)
    return out, stats


def _windowed_sdpa_fake(q, k, v, bias, mask, logit_scale, scale, save_stats):
    B_, num_heads, N, head_dim = q.shape
    out = q.new_empty(B_, N, num_heads, head_dim).transpose(1, 2)  # dense as [B_, N, C], which is what comes next
    return out, q.new_empty(B_, num_heads, N, 2, dtype=_acc_dtype(q)) if save_stats else None


def _windowed_sdpa_setup_context(ctx, inputs, output):
    *tensors, ctx.scale, save_stats = inputs
    _save(ctx, tensors, output, save_stats)


def _windowed_sdpa_autograd(ctx, do, _):
    if do is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    *dqkv, dbias, dlogit_scale = windowed_sdpa_backward(do, *ctx.saved_tensors, ctx.scale, *needed)
    dbias, dlogit_scale = _where_needed((dbias, dlogit_scale), needed)
    return *dqkv, dbias, None, dlogit_scale, None, None


def _windowed_sdpa_backward(do, q, k, v, bias, mask, logit_scale, out, stats, scale, *needed):
    B_, num_heads, N, head_dim = q.shape
    dq, dk, dv = (q.new_empty(B_, N, num_heads, head_dim).transpose(1, 2) for _ in range(3))
    inputs = (bias, logit_scale)
    if not do.numel():
        return dq, dk, dv, *_zeros_where_needed(inputs, needed)
    do = do.to(q.dtype).transpose(1, 2).contiguous()  # B_, N, num_heads, head_dim
    if out is not None:  # a hook on saved tensors may give them back in another layout
        out, stats = out.transpose(1, 2).contiguous(), stats.contiguous()
    dbias, dlogit_scale = _empty_where_needed(inputs, needed)
    launch = _kernels("launch")
    with _device_guard(q):
        call = launch.call_on_windows(q, k, v, bias, mask, logit_scale, scale)
        shared_grads = launch.SharedGrads(dbias, None, dlogit_scale)
        launch.launch_backward(*call, do, out, stats, (dq, dk, dv), shared_grads)
    return dq, dk, dv, dbias, dlogit_scale


def _windowed_sdpa_backward_fake(do, q, k, v, bias, mask, logit_scale, out, stats, scale, *needed):
    B_, num_heads, N, head_dim = q.shape
    dq, dk, dv = (q.new_empty(B_, N, num_heads, head_dim).transpose(1, 2) for _ in range(3))
    return dq, dk, dv, *_empty_where_needed((bias, logit_scale), needed)


windowed_sdpa = _implement(
    "windowed_sdpa",
    _windowed_sdpa,
    _windowed_sdpa_fake,
    _windowed_sdpa_autograd,
    _windowed_sdpa_setup_context,
    num_activations=3,
)
windowed_sdpa_backward = _implement(
    "windowed_sdpa_backward", _windowed_sdpa_backward, _windowed_sdpa_backward_fake, _no_second_derivative
)


# ------------------------------------------------------------------------------------ relative_position_bias


def _relative_position_bias(table, window_size):
    bias = _relative_position_bias_fake(table, window_size)
    with _device_guard(table):
        _kernels("relative_position").launch_relative_position_bias(table.contiguous(), bias, tuple(window_size))
    return bias


def _relative_position_bias_fake(table, window_size):
    N = window_size[0] * window_size[1]
    return table.new_empty(table.shape[1], N, N)


def _relative_position_bias_backward(dbias, window_size):
    dtable = _relative_position_bias_backward_fake(dbias, window_size)
    with _device_guard(dbias):
        _kernels("relative_position").launch_relative_position_bias_backward(
            dbias.contiguous(), dtable, tuple(window_size)
        )
    return dtable


def _relative_position_bias_backward_fake(dbias, window_size):
    return dbias.new_empty((2 * window_size[0] - 1) * (2 * window_size[1] - 1), dbias.shape[0])


def _relative_position_bias_setup_context(ctx, inputs, output):
    _, ctx.window_size = inputs


def _relative_position_bias_autograd(ctx, dbias):
    return relative_position_bias_backward(dbias, ctx.window_size), None


def _relative_position_bias_double_autograd(ctx, ddtable):
    """The two operators are linear, and one is the other's transpose."""
    return relative_position_bias(ddtable, ctx.window_size), None


relative_position_bias = _implement(
    "relative_position_bias",
    _relative_position_bias,
    _relative_position_bias_fake,
    _relative_position_bias_autograd,
    _relative_position_bias_setup_context,
)
relative_position_bias_backward = _implement(
    "relative_position_bias_backward",
    _relative_position_bias_backward,
    _relative_position_bias_backward_fake,
    _relative_position_bias_double_autograd,
    _relative_position_bias_setup_context,
)


# --------------------------------------------------------------------------------- continuous_position_table


def _continuous_position_table(coordinates, weight1, bias1, weight2, bias2, window_size, bounded, dtype):
    inputs = (coordinates, weight1, bias1, weight2, bias2)
    table = _continuous_position_table_fake(*inputs, window_size, bounded, dtype)
    with _device_guard(weight1):
        _kernels("continuous_position").launch_continuous_position_table(
            *_contiguous(*inputs), table, tuple(window_size), bounded
        )
    return table


def _continuous_position_table_fake(coordinates, weight1, bias1, weight2, bias2, window_size, bounded, dtype):
    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    return weight1.new_empty(rows, weight2.shape[0], dtype=dtype)


def _continuous_position_table_setup_context(ctx, inputs, output):
    *tensors, ctx.window_size, ctx.bounded, _ = inputs
    ctx.save_for_backward(*tensors)


def _continuous_position_table_autograd(ctx, dtable):
    grads = continuous_position_table_backward(dtable, *ctx.saved_tensors, ctx.window_size, ctx.bounded)
    return None, *_where_needed(grads, ctx.needs_input_grad[1:5]), None, None, None


def _continuous_position_table_backward(dtable, coordinates, weight1, bias1, weight2, bias2, window_size, bounded):
    inputs = (coordinates, weight1, bias1, weight2, bias2)
    table = dtable
    if bounded:  # once more, and not rounded: near its bounds the gradient follows from the last digits
        table = _continuous_position_table(*inputs, window_size, bounded, _acc_dtype(weight1))
    tensors = _contiguous(dtable, coordinates, weight1, bias1, weight2)
    grads = _continuous_position_table_backward_fake(dtable, *inputs, window_size, bounded)
    with _device_guard(weight1):
        _kernels("continuous_position").launch_continuous_position_table_backward(
            *tensors, table, grads, tuple(window_size), bounded
        )
    return grads


def _continuous_position_table_backward_fake(dtable, coordinates, *weights_and_options):
    weights = weights_and_options[:4]
    return tuple([None if x is None else empty_like(x) for x in weights])


continuous_position_table = _implement(
    "continuous_position_table",
    _continuous_position_table,
    _continuous_position_table_fake,
    _continuous_position_table_autograd,
    _continuous_position_table_setup_context,
)
continuous_position_table_backward = _implement(
    "continuous_position_table_backward",
    _continuous_position_table_backward,
    _continuous_position_table_backward_fake,
    _no_second_derivative,
)


# ------------------------------------------------------------------------------------------- add_layer_norm


def _add_layer_norm(x, y, y_scale, weight, bias, eps, dtype):
    total, out = _add_layer_norm_fake(x, y, y_scale, weight, bias, eps, dtype)
    if out.numel():
        tensors = _contiguous(x, y, y_scale, weight, bias)
        with _device_guard(x):
            _kernels("layer_norm").launch_add_layer_norm(*tensors, total, out, eps)
    return total, out


def _add_layer_norm_fake(x, y, y_scale, weight, bias, eps, dtype):
    return None if y is None else empty_like(x, _promoted(x, y.dtype)), empty_like(x, dtype)


def _add_layer_norm_setup_context(ctx, inputs, output):
    x, y, y_scale, weight, bias, ctx.eps, _ = inputs
    ctx.y_dtype = None if y is None else y.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if y is None else output[0], y_scale, weight, bias)


def _add_layer_norm_autograd(ctx, dsum, dout):
    if dout is None and dsum is None:
        return (None,) * 7
    total, *rest = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total)
    dx, dy, dweight, dbias = add_layer_norm_backward(dsum, dout, total, *rest, ctx.eps, ctx.y_dtype)
    return dx, dy if ctx.y_dtype is not None else None, None, dweight, dbias, None, None


def _add_layer_norm_backward(dsum, dout, total, y_scale, weight, bias, eps, y_dtype):
    dx, dy = _empty_dx_dy(total, y_dtype)
    if not total.numel():
        return dx, dy, torch.zeros_like(weight), torch.zeros_like(bias)
    dsum, dout, total, y_scale, scale = _contiguous(dsum, dout, total, y_scale, weight)
    with _device_guard(total):
        sums = _kernels("layer_norm").launch_layer_norm_backward(dsum, dout, total, y_scale, scale, dx, dy, eps)
    return dx, dy, *(each.to(like.dtype) for each, like in zip(sums, (weight, bias), strict=True))


def _add_layer_norm_backward_fake(dsum, dout, total, y_scale, weight, bias, eps, y_dtype):
    return *_empty_dx_dy(total, y_dtype), empty_like(weight), empty_like(bias)


def _empty_dx_dy(total, y_dtype):
    return empty_like(total), None if y_dtype is None else empty_like(total, y_dtype)


add_layer_norm = _implement(
    "add_layer_norm",
    _add_layer_norm,
    _add_layer_norm_fake,
    _add_layer_norm_autograd,
    _add_layer_norm_setup_context,
)
add_layer_norm_backward = _implement(
    "add_layer_norm_backward", _add_layer_norm_backward, _add_layer_norm_backward_fake, _no_second_derivative
)


# ------------------------------------------------------------------------------------------- layer_norm_add


def _layer_norm_add(x, y, y_scale, weight, bias, eps, dtype):
    out = _layer_norm_add_fake(x, y, y_scale, weight, bias, eps, dtype)
    if out.numel():
        tensors = _contiguous(x, y, y_scale, weight, bias)
        with _device_guard(x):
            _kernels("layer_norm").launch_layer_norm_add(*tensors, out, eps, dtype)
    return out


def _layer_norm_add_fake(x, y, y_scale, weight, bias, eps, dtype):
    return empty_like(x, _promoted(x, dtype))


def _layer_norm_add_setup_context(ctx, inputs, output):
    x, y, y_scale, weight, bias, ctx.eps, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(y, y_scale, weight, bias)


def _layer_norm_add_autograd(ctx, dout):
    dy, dweight, dbias = layer_norm_add_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dout.to(ctx.x_dtype), dy, None, dweight, dbias, None, None


def _layer_norm_add_backward(dout, y, y_scale, weight, bias, eps):
    dy = empty_like(y)
    if not y.numel():
        return dy, torch.zeros_like(weight), torch.zeros_like(bias)
    dout, y, y_scale, scale = _contiguous(dout, y, y_scale, weight)
    with _device_guard(y):
        sums = _kernels("layer_norm").launch_layer_norm_backward(None, dout, y, y_scale, scale, dy, None, eps)
    return dy, *(each.to(like.dtype) for each, like in zip(sums, (weight, bias), strict=True))


def _layer_norm_add_backward_fake(dout, y, y_scale, weight, bias, eps):
    return empty_like(y), empty_like(weight), empty_like(bias)


layer_norm_add = _implement(
    "layer_norm_add", _layer_norm_add, _layer_norm_add_fake, _layer_norm_add_autograd, _layer_norm_add_setup_context
)
layer_norm_add_backward = _implement(
    "layer_norm_add_backward", _layer_norm_add_backward, _layer_norm_add_backward_fake, _no_second_derivative
)


# -------------------------------------------------------------------------------------------- gelu_backward


def _gelu_backward(dout, x):
    dx, out = _gelu_backward_fake(dout, x)
    if x.numel():
        with _device_guard(x):
            _kernels("gelu").launch_gelu_backward(dout.contiguous(), x.contiguous(), dx, out)
    return dx, out


def _gelu_backward_fake(dout, x):
    return empty_like(x), empty_like(x)


gelu_backward = _implement("gelu_backward", _gelu_backward, _gelu_backward_fake, _no_second_derivative)


# -------------------------------------------------------------------------------------------- linear_gelu


@functools.cache
def linear_gelu_limits(device: torch.device, dtype: torch.dtype) -> tuple[int, int] | None:
    """(the most input features, what the bytes of a row are a multiple of) of the kernel for tensors on `device`; None
    where there is none."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        kernels = _kernels("linear_gelu")
    except Exception:  # no Triton, or one without Gluon as it is here
        return None
    return kernels.MAX_IN_FEATURES, kernels.ALIGNMENT


def _linear_gelu(x, weight, bias):
    kernel = _linear_gelu_kernel(x, weight, bias)
    if kernel is None:
        return F.gelu(F.linear(x, weight, bias))
    out = _linear_gelu_fake(x, weight, bias)
    alignment = _kernels("linear_gelu").ALIGNMENT
    operands = _contiguous(x, weight, bias)
    with _device_guard(x):
        kernel(*[t.clone() if t is not None and t.data_ptr() % alignment else t for t in operands], out)
    return out


def _linear_gelu_kernel(x, weight, bias):
    """The kernel for such a call; None where PyTorch's two take it, or say what is wrong with it.

    An exported program may run on another device than the one it was exported on.
    """
    limits = linear_gelu_limits(x.device, x.dtype)
    if limits is None or not x.numel():
        return None
    out_features, in_features = weight.shape
    others = [weight] if bias is None else [weight, bias]
    if (
        x.shape[-1] != in_features
        or bias is not None
        and bias.shape != (out_features,)
        or any([t.dtype != x.dtype or t.device != x.device for t in others])
        or not fits_linear_gelu(limits, out_features, in_features, x.dtype)
        or not linear_gelu_pays(x, out_features)
    ):
        return None
    with _device_guard(x):
        return _kernels("linear_gelu").linear_gelu_for(
            math.prod(x.shape[:-1]), in_features, out_features, x.dtype, bias is not None, x.device
        )


def linear_gelu_pays(x: Tensor, out_features: int) -> bool:
    """Whether the kernel is faster than PyTorch's two on so many rows."""
    return _kernels("linear_gelu").fills(x.device, math.prod(x.shape[:-1]), out_features)


def fits_linear_gelu(limits: tuple[int, int], out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether a Linear of such sizes is within the `linear_gelu_limits`."""
    most, multiple = limits
    size = dtype.itemsize
    return in_features <= most and in_features * size % multiple == 0 and out_features * size % multiple == 0


def _linear_gelu_fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_gelu_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_gelu_autograd(ctx, dout):
    """For programs that were exported for inference, and are trained: as the two operators, of what they keep."""
    x, weight, bias = ctx.saved_tensors
    dhidden, _ = gelu_backward(dout, F.linear(x, weight, bias))
    rows = dhidden.reshape(-1, dhidden.shape[-1])
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = dhidden @ weight if needs_x else None
    dweight = rows.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    return dx, dweight, rows.sum(dim=0) if needs_bias else None


linear_gelu = _implement(
    "linear_gelu",
    _linear_gelu,
    _linear_gelu_fake,
    _linear_gelu_autograd,
    _linear_gelu_setup_context,
    num_activations=3,
)


# ------------------------------------------------------------------------------------------------ FLOP counts


def _product_flops(windows: int, num_heads: int, N: int, head_dim: int) -> int:
    """Of one product of an N x N matrix a window and head, padded windows and masked pairs included."""
    return 2 * windows * num_heads * N * N * head_dim


def _map_product_flops(qkv_shape, num_heads: int, window_size) -> int:
    B, H, W, three_c = qkv_shape
    rows, cols = num_windows((H, W), window_size)
    head_dim = three_c // (3 * num_heads)
    return _product_flops(B * rows * cols, num_heads, window_size[0] * window_size[1], head_dim)


def _register_flop_formulas() -> None:
    """As torch counts its own fused attention: two products forward, and five backward, one of them the logits again.

    The counter's module imports Triton. timm has done so where Triton can be used; this must not be the import that
    does, and without Triton there is nothing to count.
    """
    if "triton" not in sys.modules:
        return
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.timm_flashwin

    @register_flop_formula(ops.window_attention)
    def window_attention_flops(qkv_shape, bias, pad_qkv, logit_scale, num_heads, window_size, *_, **__) -> int:
        return 2 * _map_product_flops(qkv_shape, num_heads, window_size)

    @register_flop_formula(ops.window_attention_backward)
    def window_attention_backward_flops(
        do, qkv_shape, bias, pad_qkv, logit_scale, out, stats, num_heads, window_size, *_, **__
    ) -> int:  # fmt: skip
        return 5 * _map_product_flops(qkv_shape, num_heads, window_size)

    @register_flop_formula(ops.linear_gelu)
    def linear_gelu_flops(x_shape, weight_shape, *_, **__) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]

    @register_flop_formula(ops.windowed_sdpa)
    def windowed_sdpa_flops(q_shape, *_, **__) -> int:
        return 2 * _product_flops(*q_shape)

    @register_flop_formula(ops.windowed_sdpa_backward)
    def windowed_sdpa_backward_flops(do, q_shape, *_, **__) -> int:
        return 5 * _product_flops(*q_shape)


_register_flop_formulas()
