"""Numbers at the ends of their ranges, and what is no number: what comes out, and that other windows do not notice."""

import pytest
import torch
from conftest import GPU
from judge import assert_as_exact_as_timm, relative_error, timm_window_attention

from timm_flashwin import reference, window_attention, windowed_sdpa

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: they are meant

HEADS, HEAD_DIM = 1, 16
C = HEADS * HEAD_DIM
HALF_DTYPES = [torch.float16] + ([torch.bfloat16] if GPU else [])  # the interpreter has no bfloat16 products

# One tile that is full, one with rows to spare, and windows of several tiles: the kernels differ.
WINDOWS = {"full tile": (4, 4), "one tile": (5, 4), "several tiles": (9, 8)}
each_kernel = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def run(function, inputs, do):
    """Output and gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, do)]


def attention(window, impl="triton", shift=0):
    def function(qkv, bias, logit_scale=None):
        return window_attention(qkv, HEADS, window, shift, bias, logit_scale=logit_scale, impl=impl)

    return function


def timms_attention(window, shift=(0, 0)):
    def function(qkv, bias, logit_scale=None):
        return timm_window_attention(qkv, HEADS, window, shift, bias, qkv.new_zeros(3 * C), logit_scale)

    return function


def exact_attention(window):
    def function(qkv, bias, logit_scale=None):
        scale = None if logit_scale is not None else HEAD_DIM**-0.5
        return reference.window_attention(qkv, HEADS, window, (0, 0), bias, None, scale, logit_scale)

    return function


def make_inputs(window, device, dtype=torch.float32, B=1):
    """qkv of two windows side by side, bias, do; and q, k and v as views [B, H, W, heads, head_dim] of qkv."""
    N = window[0] * window[1]
    qkv = torch.randn(B, window[0], 2 * window[1], 3 * C, device=device).to(dtype)
    do = torch.randn(B, window[0], 2 * window[1], C, device=device).to(dtype)
    return qkv, torch.randn(HEADS, N, N, device=device), do, qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(3)


# ------------------------------------------------------------------------------------------------- large and small


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@each_kernel
def test_products_past_the_range_of_half_precision_are_right(window, dtype, kernel_device):
    """q . k reaches 10^6 here, past float16: timm's matmul makes inf and NaN of it under autocast."""
    qkv, bias, do, (q, k, _) = make_inputs(window, kernel_device, dtype)
    q.copy_(q.sign() * 256)
    k.copy_(q)
    ours = run(attention(window), (qkv, bias), do)
    exact = run(exact_attention(window), (qkv.double(), bias.double()), do.double())
    for name, our, expected in zip(("out", "dqkv", "dbias"), ours, exact, strict=True):
        assert torch.isfinite(our).all(), name
        # A key like the query wins by far, so that dbias, dq and dk are 0 or nearly so beside dv.
        assert (our.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * exact[1].norm(), name


@each_kernel
def test_values_at_the_end_of_float16_come_out_and_do_not_overflow_on_the_way(window, kernel_device):
    largest = torch.finfo(torch.float16).max
    qkv, bias, do, (_, _, v) = make_inputs(window, kernel_device, torch.float16)
    v.fill_(largest)
    out = attention(window)(qkv, bias)
    assert torch.equal(out, torch.full_like(out, largest))
    do.mul_(1e-3)  # do @ v^T is then about 100, and its terms cancel
    v.copy_(torch.randn_like(v.float()).clamp(-1, 1) * largest)
    results = (
        run(attention(window), (qkv, bias), do),
        run(timms_attention(window), (qkv, bias), do),
        run(exact_attention(window), (qkv.double(), bias.double()), do.double()),
    )
    for name, ours, timms, exact in zip(("out", "dqkv", "dbias"), *results, strict=True):
        assert_as_exact_as_timm(name, ours, timms, exact)


@each_kernel
@pytest.mark.parametrize("apart", [150.0, 1e4])
def test_logits_far_apart_leave_the_larger_one_alone(apart, window, kernel_device, ieee):
    qkv, bias, do, (q, _, v) = make_inputs(window, kernel_device)
    q.zero_()
    bias.zero_()
    bias[:, :, 3] = apart  # every query attends to token 3 ...
    bias[:, 0] = -apart
    bias[:, 0, 5] = 0  # ... but the first one, to token 5
    out, dqkv, dbias = run(attention(window), (qkv, bias), do)
    values = v.unflatten(2, (2, window[1])).transpose(1, 2).flatten(2, 3)  # B, 2, N, heads, head_dim
    expected = values[:, :, [5] + [3] * (values.shape[2] - 1)].flatten(-2)
    assert torch.equal(out.unflatten(2, (2, window[1])).transpose(1, 2).flatten(2, 3), expected)
    assert torch.isfinite(dqkv).all() and dbias.abs().max() < 1e-5
    exact = run(exact_attention(window), (qkv.double(), bias.double()), do.double())
    assert relative_error(dqkv, exact[1]) < 1e-5


@each_kernel
def test_a_row_of_large_logits_is_right_forward_and_backward(window, kernel_device, ieee):
    qkv, bias, do, _ = make_inputs(window, kernel_device)
    bias[:, -1] += 100  # all logits of the last query
    ours = run(attention(window), (qkv, bias), do)
    exact = run(exact_attention(window), (qkv.double(), bias.double()), do.double())
    for name, our, expected in zip(("out", "dqkv", "dbias"), ours, exact, strict=True):
        assert relative_error(our, expected) < 1e-4, name


@each_kernel
def test_equal_logits_give_the_mean_and_a_gradient_of_the_bias_that_sums_to_nothing(window, kernel_device, ieee):
    qkv, bias, do, (_, k, v) = make_inputs(window, kernel_device)
    k.zero_()
    bias.fill_(37.0)
    out, _, dbias = run(attention(window), (qkv, bias), do)
    mean = v.unflatten(2, (2, window[1])).mean((1, 3), keepdim=True).flatten(-2)  # B, 1, 2, 1, C
    torch.testing.assert_close(out.unflatten(2, (2, window[1])), mean.expand(-1, window[0], -1, window[1], -1))
    assert dbias.sum(-1).abs().max() < 1e-5 * dbias.abs().sum(-1).max()


@each_kernel
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
def test_denormal_numbers_do_no_harm(cosine, window, kernel_device, ieee):
    qkv, bias, do, (q, k, v) = make_inputs(window, kernel_device)
    for x in (q, k):
        x.mul_(1e-39)
    logit_scale = [torch.ones(HEADS, device=qkv.device)] if cosine else []
    ours = run(attention(window), (qkv, bias, *logit_scale), do)
    exact = run(exact_attention(window), (qkv.double(), bias.double(), *(x.double() for x in logit_scale)), do.double())
    for name, our, expected in zip(("out", "dqkv", "dbias"), ours, exact, strict=False):
        assert torch.isfinite(our).all(), name
        assert relative_error(our, expected) < 1e-5, name
    v.mul_(torch.finfo(torch.float16).tiny / 8)
    half = attention(window)(qkv.half(), bias)
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps  # from one denormal to the next
    assert (
        half.any() and (half.double() - exact_attention(window)(qkv.half().double(), bias.double())).abs().max() <= step
    )


@each_kernel
@pytest.mark.parametrize("which", ["q", "k"])
def test_the_gradient_of_a_zero_vector_under_cosine_is_finite_and_timms(which, window, kernel_device, ieee):
    qkv, bias, do, views = make_inputs(window, kernel_device)
    views["qk".index(which)][:, 1, 2] = 0
    inputs = qkv, bias, torch.ones(HEADS, device=qkv.device)
    (out, dqkv, dbias, _), (timms_out, timms_dqkv, timms_dbias, _) = (
        run(function(window), inputs, do) for function in (attention, timms_attention)
    )
    assert torch.isfinite(dqkv).all()
    assert relative_error(out, timms_out) < 1e-5 and relative_error(dbias, timms_dbias) < 1e-5
    # Divided by 1e-12, this one would hide all others in a norm.
    grads = [grad.unflatten(-1, (3, HEADS, HEAD_DIM))[..., "qk".index(which), :, :] for grad in (dqkv, timms_dqkv)]
    assert grads[0][:, 1, 2].abs().max() > 1e6
    assert relative_error(*(grad[:, 1, 2] for grad in grads)) < 1e-4
    assert relative_error(*(grad[:, 2:] for grad in grads)) < 1e-4


# ------------------------------------------------------------------------------------------------------ no numbers


@each_kernel
@pytest.mark.parametrize("value, which", [("nan", "q"), ("nan", "v"), ("inf", "q"), ("-inf", "k")])
def test_what_is_no_number_stays_in_its_window_and_comes_out_where_timms_does(
    value, which, window, kernel_device, ieee
):
    qkv, bias, do, views = make_inputs(window, kernel_device, B=2)
    clean, clean_dqkv, _ = run(attention(window), (qkv, bias), do)
    views["qkv".index(which)][0, 2, 1, 0, 3] = float(value)  # one channel, of a token of the first window
    out, dqkv, dbias = run(attention(window), (qkv, bias), do)
    timms_out, timms_dqkv, timms_dbias = run(timms_attention(window), (qkv, bias), do)

    for ours, before in ((out, clean), (dqkv, clean_dqkv)):
        assert torch.equal(ours[0, :, window[1] :], before[0, :, window[1] :]), "another window of the image"
        assert torch.equal(ours[1], before[1]), "another image"
    torch.testing.assert_close(out, timms_out, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert not torch.isfinite(out).all()
    # No gradient that is wrong in timm's passes for a number here.
    assert not torch.isfinite(dqkv[~torch.isfinite(timms_dqkv)]).any()
    assert torch.equal(torch.isfinite(dbias), torch.isfinite(timms_dbias))


@each_kernel
def test_a_logit_scale_that_is_no_number_shows_in_its_head(window, kernel_device):
    qkv = torch.randn(1, *window, 3 * 2 * HEAD_DIM, device=kernel_device)
    logit_scale = torch.tensor([float("nan"), 1.0], device=kernel_device)
    out = window_attention(qkv, 2, window, logit_scale=logit_scale, impl="triton").unflatten(-1, (2, HEAD_DIM))
    assert out[..., 0, :].isnan().all() and torch.isfinite(out[..., 1, :]).all()


@pytest.mark.parametrize("N", [16, 80])
def test_a_row_masked_with_the_lowest_float32_is_the_mean_as_in_torch(N, kernel_device, ieee):
    """The lowest finite number, and not -inf, is how many masks keep a fully masked row from being NaN."""
    q, k, v = torch.randn(3, 1, 1, N, 16, device=kernel_device)
    mask = torch.zeros(1, N, N, device=kernel_device)
    mask[:, 5] = torch.finfo(torch.float32).min
    mask[:, 6, :3] = torch.finfo(torch.float32).min
    ours, expected = (windowed_sdpa(q, k, v, mask=mask, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, expected)
