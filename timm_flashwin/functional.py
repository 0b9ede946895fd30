"""The two public functions, and the bias both take: validation, and the choice of implementation."""

import functools
import importlib
import logging
import operator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import ops, reference
from .kernels import needs_stats
from .ops import compute_dtype, transforms_are_on

_logger = logging.getLogger("timm_flashwin")


def _constant(function):
    """Evaluate `function` once per arguments, also under torch.compile, which takes the result and traces nothing."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def constant(*args):
        return cached(*args)

    constant.cache_clear = cached.cache_clear
    return torch.compiler.assume_constant_result(constant)


IMPLEMENTATIONS = ("auto", "triton", "reference")
MAX_WINDOW_AREA = 24 * 24
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 128
_HALVES = (torch.float16, torch.bfloat16)
_KERNEL_DTYPES = (torch.float32, *_HALVES)
_DTYPES = (*_KERNEL_DTYPES, torch.float64)
_INFERENCE_DEVICES = ("cuda",)  # where inference has operators of its own
# A compiler would hand any other to an operator that knows nothing of it.
_PLAIN_WHILE_COMPILING = (Tensor, torch.nn.Parameter, FakeTensor)
_TABLE_LAYOUT = "[(2 * Wh - 1) * (2 * Ww - 1), num_heads]"


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    bias: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """(Shifted) window attention on an NHWC map, from the qkv projection to the input of the output projection.

    Equals, in this order: cyclic roll by `-shift_size`, padding at the bottom and right to whole windows, window
    partition, `softmax(q @ k^T * scale + bias + mask) @ v` per head, window reverse, crop and roll back. The mask is
    -100 between tokens that only the roll made neighbours. The kernels do all of this by address arithmetic: the map
    is read once and the output written once. With a `logit_scale` it is the scaled cosine attention of Swin V2: q and k
    of each head are divided by their L2 norms (1e-12 at least), and `exp(min(logit_scale, log 100))` takes the place of
    `scale`. Sources: Liu et al., "Swin Transformer" (2021), sections 3.2 and 4 (eq. 4), and "Swin Transformer V2"
    (2022), section 3.2 (eq. 2); timm/models/swin_transformer.py, `SwinTransformerBlock._attn` and
    `WindowAttention.forward`; timm/models/swin_transformer_v2.py, `WindowAttention.forward`.

    Under autocast `qkv` is cast to autocast's dtype. Products accumulate, and the softmax and the gradient of `bias`
    are taken, in float32 (float64 for float64 inputs). float32 products follow `torch.backends.cuda.matmul.allow_tf32`.

    Args:
        qkv: [B, H, W, 3 * num_heads * head_dim], as the qkv Linear leaves it; float16, bfloat16, float32 or float64.
            Any strides; a last dimension that is not dense is copied.
        num_heads: Number of heads.
        window_size: (Wh, Ww) in tokens, or one int for both. It may exceed the map, which is then padded.
        shift_size: (sh, sw) in tokens, each >= 0, or one int for both; (0, 0) is an unshifted block.
        bias: Relative position bias [num_heads, N, N] with N = Wh * Ww, any float dtype, or None.
        pad_qkv: [3 * num_heads * head_dim]: the qkv of a padded token, which is what the qkv Linear makes of zeros: its
            bias. None stands for zeros (a Linear without bias). Padded tokens are attended to.
        scale: Factor on q @ k^T, 0 or more; head_dim ** -0.5 if None.
        logit_scale: [num_heads], any float dtype: cosine attention with the logarithm of each head's factor. None:
            plain attention. Not together with `scale`.
        impl: "triton" (never falls back), "reference" (plain PyTorch), or "auto": the kernels where they can run,
            otherwise the reference, with the reason logged once.

    Returns:
        [B, H, W, num_heads * head_dim], contiguous, in the dtype of `qkv`. Differentiable in `qkv`, `bias`, `pad_qkv`
        and `logit_scale` (whose gradient is 0 above log 100).

    Raises:
        TypeError: An argument is not a tensor or has a dtype that is not supported, a size is no int or pair of ints,
            or dtypes or devices are mixed.
        ValueError: A shape, size or `impl` is not allowed, or `impl="triton"` cannot run on this device.
    """
    num_heads = _int("num_heads", num_heads)
    window_size, shift_size = _pair("window_size", window_size), _pair("shift_size", shift_size)
    scale = None if scale is None else float(scale)
    tensors = qkv, bias, pad_qkv, logit_scale
    head_dim, scale = _checked_map_call(*map(_metadata, tensors), num_heads, window_size, shift_size, scale)

    dtype, window_area = compute_dtype(qkv), window_size[0] * window_size[1]
    if _use_kernels(impl, qkv.device, dtype, head_dim, window_area):
        save_stats = needs_grad(*tensors) and needs_stats(window_area, head_dim, dtype)
        return ops.window_attention(*tensors, num_heads, window_size, shift_size, scale, save_stats)[0]
    (qkv,), context = _under_autocast(qkv)
    with context:
        return reference.window_attention(qkv, num_heads, window_size, shift_size, bias, pad_qkv, scale, logit_scale)


def windowed_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(q @ k^T * scale + bias + mask) @ v over windows that are already partitioned.

    Precision and autocast are those of `window_attention`. Source: timm/models/swin_transformer.py,
    `WindowAttention.forward`; Zhang, "Flash Window Attention" (arXiv 2501.06480).

    Args:
        q, k, v: [B_, num_heads, N, head_dim], B_ = B * nW windows of N tokens, one dtype and device; any strides (read
            in place where the three share theirs, as the views of one qkv tensor do; copied first where they do not).
        bias: Relative position bias [num_heads, N, N], any float dtype, or None.
        mask: Additive mask [nW, N, N], any float dtype, or None; window i takes `mask[i % nW]`. It gets no gradient.
        scale, logit_scale, impl: As in `window_attention`.

    Returns:
        [B_, num_heads, N, head_dim] in the dtype of `q`, laid out so that `.transpose(1, 2).flatten(2)`, the input of
        the output projection, copies nothing. Differentiable in `q`, `k`, `v`, `bias` and `logit_scale`.

    Raises:
        TypeError, ValueError: As in `window_attention`; also where q, k and v differ in shape, dtype or device, or the
            mask requires a gradient.
    """
    scale = None if scale is None else float(scale)
    scale = _checked_windows_call(*map(_metadata, (q, k, v, bias, mask, logit_scale)), scale)
    if mask is not None and mask.requires_grad:
        raise ValueError("mask requires a gradient, but gets none; detach it, or pass what is trained as bias")

    dtype, N, head_dim = compute_dtype(q), q.shape[2], q.shape[3]
    if _use_kernels(impl, q.device, dtype, head_dim, N):
        save_stats = needs_grad(q, k, v, bias, logit_scale) and needs_stats(N, head_dim, dtype)
        return ops.windowed_sdpa(q, k, v, bias, mask, logit_scale, scale, save_stats)[0]
    (q, k, v), context = _under_autocast(q, k, v)
    with context:
        return reference.windowed_sdpa(q, k, v, bias, mask, scale, logit_scale)


def relative_position_bias(table: Tensor, window_size: int | tuple[int, int], impl: str = "auto") -> Tensor:
    """The bias of every pair of tokens of a window, out of a table with one row for each distance of two tokens.

    Autocast changes nothing here. The gradient of `table` is summed in float32 (float64 for float64), in a fixed order
    in the kernels. Source: timm/models/swin_transformer.py, `get_relative_position_index` and
    `WindowAttention._get_rel_pos_bias`; Liu et al., "Swin Transformer" (2021), section 3.2.

    Args:
        table: [(2 * Wh - 1) * (2 * Ww - 1), num_heads], any float dtype: the row of the distance (dy, dx) = i - j is
            (dy + Wh - 1) * (2 * Ww - 1) + dx + Ww - 1.
        window_size: (Wh, Ww) in tokens, or one int for both.
        impl: As in `window_attention`; with "auto" a compiler gathers by itself where no gradient is needed.

    Returns:
        [num_heads, N, N] with N = Wh * Ww, contiguous, in the dtype of `table`: `bias` as the functions above take it.
        Differentiable in `table`, any number of times.

    Raises:
        TypeError, ValueError: As in `window_attention`.
    """
    window_size = _pair("window_size", window_size)
    _checked_table(_metadata(table), window_size)
    if _use_kernels(impl, table.device, table.dtype, None, window_size[0] * window_size[1]):
        # The gradient is what needs a kernel, to be summed in order. Without one a compiler calls its own code sooner.
        if impl == "triton" or needs_grad(table) or not torch.compiler.is_compiling():
            return ops.relative_position_bias(table, window_size)
    return reference.relative_position_bias(table, window_size)


# ------------------------------------------------------------------------------------------------ validation


def _int(name: str, value) -> int:
    """`value`, which has to be a whole number; checked for every call, because 3.0 and True are found as 3 and 1."""
    if type(value) is int:
        return value
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{name} is {value!r}; it must be an int")


def _pair(name: str, value) -> tuple[int, int]:
    """`7` -> `(7, 7)`; `(7, 5)` stays."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise TypeError(f"{name} is {value!r}; it must be an int, or a pair of ints (rows, columns)")
        return _int(f"{name}[0]", value[0]), _int(f"{name}[1]", value[1])
    value = _int(name, value)
    return value, value


def _metadata(x):
    """What the checks look at: (shape, dtype, device) of a tensor, None for None, and for anything else its type."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return None if x is None else type(x)


def _once(check):
    """Run `check` once for all calls alike: it looks at nothing but its arguments. What it raises is not remembered."""
    remembered = functools.lru_cache(maxsize=4096)(check)

    @functools.wraps(check)
    def checked(*arguments):
        if not torch.compiler.is_compiling():
            try:
                return remembered(*arguments)
            except TypeError:
                pass  # symbolic sizes cannot be looked up; a TypeError of the check itself comes again
        return check(*arguments)

    return checked


@_once
def _checked_map_call(qkv, bias, pad_qkv, logit_scale, num_heads, window_size, shift_size, scale) -> tuple[int, float]:
    """(head_dim, scale) of a call of `window_attention`; the tensors are here as `_metadata` describes them."""
    _check_float_tensor("qkv", qkv, 4, "[B, H, W, 3 * num_heads * head_dim]")
    _, H, W, channels = shape = qkv[0]
    if num_heads < 1 or channels % (3 * num_heads):
        raise ValueError(
            f"qkv has {channels} channels, which are not 3 * num_heads * head_dim for num_heads={num_heads}; "
            "pass the output of the qkv Linear and the number of heads it was made for"
        )
    _check_window_size(window_size)
    if min(shift_size) < 0:
        raise ValueError(f"shift_size is {shift_size}; both entries must be 0 or more (the roll is by -shift_size)")
    if min(H, W) < 1:
        raise ValueError(f"qkv has the shape {tuple(shape)}; H and W must be at least 1 (B may be 0)")
    _check_bias(bias, qkv, num_heads, window_size[0] * window_size[1])
    if pad_qkv is not None:
        _check_companion("pad_qkv", pad_qkv, qkv, (channels,), "[3 * num_heads * head_dim]")
    head_dim = channels // (3 * num_heads)
    return head_dim, _checked_scale(scale, logit_scale, qkv, num_heads, head_dim)


@_once
def _checked_windows_call(q, k, v, bias, mask, logit_scale, scale) -> float:
    """The scale of a call of `windowed_sdpa`; the tensors are here as `_metadata` describes them."""
    _check_float_tensor("q", q, 4, "[B_, num_heads, N, head_dim]")
    shape, dtype, _ = q
    _check_companion("k", k, q, tuple(shape), "the shape of q", dtype)
    _check_companion("v", v, q, tuple(shape), "the shape of q", dtype)
    B_, num_heads, N, head_dim = shape
    if num_heads < 1 or N < 1 or head_dim < 1:  # the torch.compile of torch 2.6 takes no min() of three
        raise ValueError(f"q has the shape {tuple(shape)}; only B_ may be 0")
    _check_bias(bias, q, num_heads, N)
    if mask is not None:
        _check_companion("mask", mask, q, (None, N, N), "[nW, N, N]")
        num_masks = mask[0][0]
        if num_masks < 1 or B_ % num_masks:
            raise ValueError(
                f"mask is for {num_masks} windows, which does not divide the {B_} windows of q; B_ must be B * nW"
            )
    return _checked_scale(scale, logit_scale, q, num_heads, head_dim)


@_once
def _checked_table(table, window_size) -> None:
    """Of a call of `relative_position_bias`; the table is here as `_metadata` describes it."""
    _check_window_size(window_size)
    _check_float_tensor("table", table, 2, _TABLE_LAYOUT)
    shape = table[0]
    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    if shape[0] != rows or shape[1] < 1:
        raise ValueError(
            f"table has the shape {tuple(shape)}; it must be {_TABLE_LAYOUT}, here ({rows}, 1 or more) "
            f"for window_size={window_size}"
        )


def _check_float_tensor(name: str, x, ndim: int, layout: str) -> None:
    if not isinstance(x, tuple):
        kind = "NoneType" if x is None else x.__name__
        raise TypeError(f"{name} is a {kind}; it must be a torch.Tensor {layout}")
    shape, dtype, _ = x
    if dtype not in _DTYPES:
        raise TypeError(f"{name} has the dtype {dtype}; allowed are float16, bfloat16, float32 and float64")
    if len(shape) != ndim:
        raise ValueError(f"{name} has {len(shape)} dimensions, shape {tuple(shape)}; it must be {layout}")


def _check_window_size(window_size: tuple[int, int]) -> None:
    if min(window_size) < 1:
        raise ValueError(f"window_size is {window_size}; both entries must be at least 1")


def _check_companion(name: str, x, of, shape, layout: str, dtype: torch.dtype | None = None) -> None:
    """Check an argument that must fit the main one, `of`; None in `shape` stands for any size."""
    _check_float_tensor(name, x, len(shape), layout)
    own_shape, own_dtype, device = x
    if any(want is not None and have != want for have, want in zip(own_shape, shape, strict=True)):
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has the shape {tuple(own_shape)}; it must be {layout}, here ({wanted})")
    if device != of[2]:
        raise TypeError(f"{name} is on {device} and the activations on {of[2]}; move them to one device")
    if dtype is not None and own_dtype != dtype:
        raise TypeError(f"{name} has the dtype {own_dtype} and q {dtype}; cast them to one dtype")


def _check_bias(bias, of, num_heads: int, window_area: int) -> None:
    if bias is not None:
        _check_companion("bias", bias, of, (num_heads, window_area, window_area), "[num_heads, N, N], N = Wh * Ww")


def _checked_scale(scale: float | None, logit_scale, of, num_heads: int, head_dim: int) -> float:
    """The factor on q @ k^T; 1 where `logit_scale` says it."""
    if logit_scale is None:
        if scale is not None and scale < 0:
            raise ValueError(f"scale is {scale}; it must be 0 or more (negate q for the opposite order)")
        return head_dim**-0.5 if scale is None else scale
    if scale is not None:
        raise ValueError(f"scale={scale} and a logit_scale are given; cosine attention takes logit_scale alone")
    _check_companion("logit_scale", logit_scale, of, (num_heads,), "[num_heads]")
    return 1.0


# ------------------------------------------------------------------------------------ choice of implementation


def map_options(
    qkv: tuple, position: Tensor, is_table: bool, pad_qkv: Tensor | None, logit_scale: Tensor | None, num_heads: int,
    window_size, shift_size, scale: float | None, trains: bool,
) -> tuple:  # fmt: skip
    """What `ops.window_attention` takes after its tensors, for a call that the kernels serve.

    `qkv` is (shape, dtype, device) of what will be given, `position` the bias or its table. Raises as the functions do.
    """
    window_size, shift_size = _pair("window_size", window_size), _pair("shift_size", shift_size)
    window_area = window_size[0] * window_size[1]
    bias = _metadata(position)
    if is_table:
        _checked_table(bias, window_size)
        (_, heads), *rest = bias
        bias = (heads, window_area, window_area), *rest
    head_dim, scale = _checked_map_call(
        qkv, bias, _metadata(pad_qkv), _metadata(logit_scale), num_heads, window_size, shift_size, scale
    )
    save_stats = trains and needs_stats(window_area, head_dim, qkv[1])
    return num_heads, window_size, shift_size, scale, save_stats


def _use_kernels(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, window_area: int
) -> bool:  # fmt: skip
    """Whether the kernels serve such a call; `dtype` is what it computes in, `head_dim` None where it has none."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; allowed are {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "reference":
        return False
    reason = _reason_against(impl, device, dtype, head_dim, window_area)
    if reason is None:
        return True
    if impl == "triton":
        raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="auto" or impl="reference"')
    log_fallback(reason, device.type)
    return False


def kernels_serve(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, window_area: int) -> bool:
    """Whether `impl` takes the kernels for such a call, without a word where it does not."""
    return impl != "reference" and _reason_against(impl, device, dtype, head_dim, window_area) is None


def _reason_against(impl: str, *call) -> str | None:
    """Why `impl`, "auto" or "triton", does not take the kernels for such a call; None where it does."""
    return (fallback_reason if impl == "auto" else refusal)(*call)


def fallback_reason(device: torch.device, dtype: torch.dtype, head_dim: int | None, window_area: int) -> str | None:
    """Why `impl="auto"` takes plain PyTorch for such a call, in words for the user; None where it takes the kernels."""
    if device.type == "cpu":  # Triton's interpreter, which impl="triton" may use, is for tests
        return "the tensors are on the CPU, and the kernels run on GPUs"
    return refusal(device, dtype, head_dim, window_area)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int | None, window_area: int) -> str | None:
    """Why the kernels cannot serve such a call; None where they can."""
    if transforms_are_on():
        return (
            "a torch.func transform or a forward-mode derivative is under way, and the kernels have no rule for either"
        )
    if head_dim is not None and not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"the kernels take head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {head_dim}"
    if window_area > MAX_WINDOW_AREA:
        return f"the kernels take windows of up to {MAX_WINDOW_AREA} tokens, not {window_area}"
    return _device_refusal(device, dtype)


@_constant
def _device_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on such tensors, whatever their sizes; None where they can."""
    error = _import_error()
    if error is not None:
        return f"Triton cannot be used ({error})"
    interpreted = _kernels().INTERPRETED
    if interpreted != (device.type == "cpu"):
        return f"the tensors are on {device.type!r}, and the kernels run on " + (
            "the CPU, in Triton's interpreter (TRITON_INTERPRET is set)" if interpreted else "CUDA and ROCm GPUs"
        )
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type!r}, and the kernels run on CUDA and ROCm GPUs"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if dtype not in _KERNEL_DTYPES and not (interpreted and dtype == torch.float64):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type == "cuda":
        # Found out now: in the backward, or in the middle of a compiled graph, there would be no way back.
        error = importlib.import_module(".kernels.probe", __package__).compile_error(device, dtype)
        if error is not None:
            return f"Triton cannot compile for {torch.cuda.get_device_name(device)} ({error})"
    return None


def infers_plainly(impl: str, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a result of `x` is inference in half precision on a GPU, and nobody could tell by which operators it is
    made: `impl` allows for others than timm's, nothing needs a gradient, and no transform, mode, trace or tensor
    subclass is under way."""
    given = [x, *[t for t in parameters if t is not None]]
    if x.device.type not in _INFERENCE_DEVICES or impl == "reference" or needs_grad(*given) or transforms_are_on():
        return False
    if compute_dtype(x) not in _HALVES or not all([t.is_floating_point() for t in given]):
        return False
    if torch.compiler.is_compiling():
        return all([type(t) in _PLAIN_WHILE_COMPILING for t in given])
    return not ops.is_intercepted(given)


def linear_gelu_serves(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `impl` takes `ops.linear_gelu` for F.gelu(F.linear(x, weight, bias)): where it infers plainly, on a GPU
    with a kernel for it. A compiler, too, is then asked to leave the two to it."""
    if not infers_plainly(impl, x, weight, bias):
        return False
    dtype = compute_dtype(x)
    casts = ops.autocast_dtype(x.device.type) == dtype
    fits = [
        t.device == x.device and t.dtype != torch.float64 and (casts or t.dtype == dtype)
        for t in (x, weight, bias)
        if t is not None
    ]
    return all(fits) and has_linear_gelu(x.device, dtype, weight)


def has_linear_gelu(device: torch.device, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether there is a kernel for a Linear of such a `weight` and the GELU after it."""
    limits = _linear_gelu_limits(device, dtype)
    return limits is not None and ops.fits_linear_gelu(limits, *weight.shape, dtype)


@_constant
def _linear_gelu_limits(device: torch.device, dtype: torch.dtype) -> tuple[int, int] | None:
    """As `ops.linear_gelu_limits`, where Triton can compile at all."""
    limits = ops.linear_gelu_limits(device, dtype)
    return None if limits is None or _device_refusal(device, dtype) is not None else limits


@_constant
def log_fallback(reason: str, device_type: str) -> None:
    """Log, once per reason, that plain PyTorch runs: news on a GPU, a matter of course elsewhere."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    _logger.log(level, "window attention runs in plain PyTorch: %s", reason)


@functools.cache
def _kernels():
    return importlib.import_module(".kernels.launch", __package__)


@functools.cache
def _import_error() -> str | None:
    """Why the kernels' module cannot be imported: Triton missing, or broken in one of its many ways."""
    try:
        _kernels()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _under_autocast(*activations: Tensor):
    """What the operators do under autocast, for the reference: (activations in its dtype, a context without it)."""
    dtype = compute_dtype(activations[0])
    return [x.to(dtype) for x in activations], torch.autocast(activations[0].device.type, enabled=False)
