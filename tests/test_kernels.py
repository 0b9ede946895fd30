"""The kernels against float64: on a GPU in every dtype they take, on the CPU the same kernels in the interpreter."""

import pytest
import torch
from conftest import GPU
from judge import assert_as_exact_as_timm, relative_error, timm_window_attention

from timm_flashwin import reference, window_attention, windowed_sdpa

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
CASES = {  # B, (H, W), num_heads, head_dim, window, shift
    "window 7": (2, (14, 14), 2, 32, (7, 7), (0, 0)),
    "window 7 shifted": (2, (14, 14), 2, 32, (7, 7), (3, 3)),
    "window 7 shifted padded": (1, (10, 16), 2, 32, (7, 7), (3, 3)),
    "window 8 shifted": (1, (16, 16), 2, 32, (8, 8), (4, 4)),
    "window 12 shifted": (1, (24, 24), 1, 32, (12, 12), (6, 6)),
    "window 12 shifted padded": (1, (13, 20), 1, 32, (12, 12), (6, 6)),
    "window 14": (1, (14, 28), 1, 32, (14, 14), (0, 0)),
    "window 16 shifted": (1, (16, 32), 1, 32, (16, 16), (8, 8)),
    "window 24 shifted padded": (1, (23, 30), 1, 32, (24, 24), (12, 12)),
    "non-square window": (2, (12, 10), 2, 32, (4, 5), (2, 2)),
    "non-square padded window": (1, (11, 13), 2, 16, (10, 9), (5, 4)),
    "shift on one axis": (2, (8, 12), 1, 16, (4, 6), (0, 3)),
    "map smaller than the window": (2, (3, 2), 1, 16, (7, 7), (3, 3)),
    "shift beyond the window": (1, (8, 12), 1, 16, (4, 4), (6, 5)),
    "one token a window": (2, (3, 3), 2, 16, (1, 1), (0, 0)),
    "head_dim 8": (1, (8, 8), 3, 8, (4, 4), (2, 2)),
    "head_dim 24": (1, (8, 8), 2, 24, (8, 8), (4, 4)),
    "head_dim 80, two tiles": (1, (10, 10), 1, 80, (10, 10), (5, 5)),
    "head_dim 128": (1, (7, 7), 1, 128, (7, 7), (3, 3)),
}
COSINE_CASES = {
    "window 8": (1, (8, 16), 2, 32, (8, 8), (0, 0)),
    "window 8 shifted padded": (3, (13, 16), 2, 32, (8, 8), (4, 4)),
    "window 12 shifted": (2, (12, 24), 1, 32, (12, 12), (6, 6)),
    "window 16 shifted, odd batch": (3, (16, 16), 1, 32, (16, 16), (8, 8)),
    "window 24 shifted padded": (1, (23, 24), 1, 32, (24, 24), (12, 12)),
    "non-square padded window": (2, (11, 13), 2, 16, (10, 9), (5, 4)),
    "head_dim 24": (1, (8, 8), 2, 24, (8, 8), (4, 4)),
}


def make_inputs(case, dtype, device, requires_grad=True, cosine=False):
    """qkv, bias, pad_qkv and, for cosine attention, logit_scale: from half a nat above 1 to past the clamp."""
    B, (H, W), num_heads, head_dim, window_size, _ = case
    N, C = window_size[0] * window_size[1], num_heads * head_dim
    qkv = torch.randn(B, H, W, 3 * C, device=device).to(dtype)
    bias = torch.randn(num_heads, N, N, device=device)
    pad_qkv = torch.randn(3 * C, device=device).to(dtype)
    logit_scale = [torch.linspace(0.5, 5.0, num_heads, device=device)] if cosine else []
    return [t.requires_grad_(requires_grad) for t in (qkv, bias, pad_qkv, *logit_scale)]


def run(function, inputs, do):
    """Output and the gradient of every input (0 where there is none)."""
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, do, allow_unused=True)
    return [out] + [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def check_against_fp64(case, dtype, device, cosine=False, draws=1):
    """`draws` are judged as one: where a sum nearly cancels in one of them, its rounding is luck, ours as timm's."""
    _, _, num_heads, head_dim, window_size, shift_size = case

    def ours(qkv, bias, pad, logit_scale=None):
        return window_attention(
            qkv, num_heads, window_size, shift_size, bias, pad, logit_scale=logit_scale, impl="triton"
        )

    def timms(qkv, bias, pad, logit_scale=None):
        return timm_window_attention(qkv, num_heads, window_size, shift_size, bias, pad, logit_scale)

    def exact(qkv, bias, pad, logit_scale=None):
        scale = None if cosine else head_dim**-0.5
        return reference.window_attention(qkv, num_heads, window_size, shift_size, bias, pad, scale, logit_scale)

    results, terms = [], []
    for _ in range(draws):
        inputs = make_inputs(case, dtype, device, cosine=cosine)
        do = torch.randn(*inputs[0].shape[:3], num_heads * head_dim, device=device).to(dtype)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        results.append((run(ours, inputs, do), run(timms, inputs, do), run(exact, doubles, do.double())))
        if cosine:
            terms.append(dlogit_scale_terms(case, doubles, do))
    names = ("out", "dqkv", "dbias", "dpad_qkv", "dlogit_scale")[: len(inputs) + 1]
    for place, name in enumerate(names):
        our, timm, expected = (torch.stack([draw[who][place] for draw in results]) for who in range(3))
        if name == "dlogit_scale":
            # One number a head, what is left of a sum that cancels, at times to nearly nothing: the roundings are those
            # of its terms.
            error = (our - expected).norm() / torch.stack(terms).norm()
            assert error < torch.finfo(dtype).eps, f"{name}: {error:.2e} of its terms"
        else:
            assert_as_exact_as_timm(name, our, timm, expected)


def dlogit_scale_terms(case, inputs, do):
    """The absolute values of what the queries add to the gradient of logit_scale, added up: [num_heads], float64."""
    _, _, num_heads, head_dim, window_size, shift_size = case
    qkv, bias, pad_qkv, logit_scale = (t.detach() for t in inputs)
    factor = logit_scale.clamp(max=reference.MAX_LOGIT_SCALE).exp()

    def normalised(x):
        q, k, v = x.unflatten(-1, (3, num_heads, head_dim)).unbind(-3)
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        return torch.stack([q * factor[:, None], k, v], dim=-3)  # ..., 3, num_heads, head_dim

    x = normalised(qkv).requires_grad_()
    pad_qkv = normalised(pad_qkv).flatten()
    out = reference.window_attention(x.flatten(-3), num_heads, window_size, shift_size, bias, pad_qkv, 1.0, None)
    (dx,) = torch.autograd.grad(out, x, do.double())
    terms = (x.detach() * dx)[..., 0, :, :].sum(-1)  # B, H, W, num_heads
    return terms.abs().sum((0, 1, 2)) * (logit_scale <= reference.MAX_LOGIT_SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_are_as_exact_as_timms(name, dtype, kernel_device, poisoned, ieee):
    check_against_fp64(CASES[name], dtype, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COSINE_CASES)
def test_cosine_attention_is_as_exact_as_timms(name, dtype, kernel_device, poisoned, ieee):
    case = COSINE_CASES[name]
    draws = 4 if dtype == torch.float32 and case[4][0] * case[4][1] <= 64 else 1  # larger windows sum more than enough
    check_against_fp64(case, dtype, kernel_device, cosine=True, draws=draws)


@pytest.mark.parametrize("window_size", [(8, 8), (9, 8)], ids=["one tile", "several tiles"])
def test_no_gradient_reaches_a_logit_scale_past_its_clamp(window_size, kernel_device):
    case = (1, window_size, 3, 16, window_size, (0, 0))
    qkv, bias, pad, logit_scale = make_inputs(case, torch.float32, kernel_device, cosine=True)
    with torch.no_grad():
        logit_scale.copy_(torch.tensor([4.6, 4.61, 50.0]))  # log 100 is 4.605
    out = window_attention(qkv, 3, window_size, 0, bias, pad, logit_scale=logit_scale, impl="triton")
    grad = torch.autograd.grad(out.square().sum(), logit_scale)[0]
    assert grad[0] != 0 and (grad[1:] == 0).all()


@pytest.mark.parametrize("window", [8, 12], ids=["one tile", "several tiles"])
def test_a_masked_key_wins_where_its_cosine_is_large_enough(window, kernel_device, ieee):
    """The mask is -100 and logits reach 100: a query that only a masked key resembles attends to it, as in timm."""
    shift, head_dim = window // 2, 16
    q, k, v = torch.randn(3, 1, window, window, head_dim, device=kernel_device)
    q[:] = torch.nn.functional.one_hot(torch.tensor(0), head_dim).to(q)
    k[:] = -q  # cosine -1 with every key ...
    k[0, shift, shift] = q[0, 0, 0]  # ... but one, which the roll makes a neighbour of the whole window
    qkv = torch.cat([q, k, v], dim=-1)
    logit_scale = torch.full([1], 9.0, device=kernel_device)  # clamped: the factor is 100
    args = (qkv, 1, window, shift, None, None, None, logit_scale)
    out = window_attention(*args, impl="triton")
    expected = window_attention(*[x.double() if isinstance(x, torch.Tensor) else x for x in args], impl="reference")
    assert relative_error(out, expected) < 1e-5
    # Tokens of another region than the winner's hold its value and no other.
    assert torch.allclose(out[0, 0, 0], v[0, shift, shift], atol=1e-4)


@pytest.mark.parametrize("window", [8, 12], ids=["one tile", "several tiles"])
def test_cosine_attention_in_half_precision_survives_inputs_at_its_limits(window, kernel_device):
    case = (1, (window, window), 2, 32, (window, window), (0, 0))
    inputs = make_inputs(case, torch.float16, kernel_device, cosine=True)
    with torch.no_grad():
        inputs[0][..., :128] *= 1e4 / inputs[0][..., :128].abs().amax()  # q and k
        inputs[0][0, 0, 0, :128] = 0  # a token without a direction
        inputs[3].fill_(5.0)
    do = torch.randn(1, window, window, 64, device=kernel_device).half()
    ours, exact = (
        run(
            lambda *x, impl=impl: window_attention(x[0], 2, window, 0, x[1] * 16, x[2], logit_scale=x[3], impl=impl),
            [x.detach().to(torch.float64 if impl == "reference" else x.dtype).requires_grad_() for x in inputs],
            do.to(torch.float64 if impl == "reference" else torch.float16),
        )
        for impl in ("triton", "reference")
    )
    for name, our, expected in zip(("out", "dqkv", "dbias"), ours, exact, strict=False):
        assert not our.isnan().any(), name
        if name == "dqkv":  # that of the token of zeros is divided by 1e-12: beyond half precision
            our, expected = our.flatten(0, 2)[1:], expected.flatten(0, 2)[1:]
        assert torch.isfinite(our).all(), name
        assert relative_error(our, expected) < 1e-2, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_tf32_is_as_exact_as_timms_tf32(name, poisoned):
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check_against_fp64(CASES[name], torch.float32, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (8, (56, 56), 4, 32, (7, 7), (3, 3)),
        (8, (14, 14), 16, 32, (7, 7), (3, 3)),
        (4, (64, 64), 4, 32, (8, 8), (4, 4)),
        (2, (96, 96), 4, 32, (12, 12), (6, 6)),
        (2, (96, 96), 4, 32, (24, 24), (12, 12)),
        (3, (61, 83), 3, 32, (7, 7), (3, 3)),
    ],
    ids=str,
)
def test_full_size_maps_are_as_exact_as_timms(case, dtype, poisoned, ieee):
    check_against_fp64(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        (4, (64, 64), 4, 32, (8, 8), (4, 4)),
        (4, (64, 64), 4, 32, (16, 16), (8, 8)),
        (2, (96, 96), 4, 32, (24, 24), (12, 12)),
        (3, (61, 83), 3, 32, (12, 12), (6, 6)),
    ],
    ids=str,
)
def test_full_size_maps_of_cosine_attention_are_as_exact_as_timms(case, dtype, poisoned, ieee):
    check_against_fp64(case, dtype, "cuda", cosine=True)


@pytest.mark.skipif(GPU, reason="float64 kernels exist in the interpreter only")
@pytest.mark.parametrize(
    "case",
    [
        (1, (3, 5), 1, 8, (2, 3), (1, 1)),
        (1, (9, 8), 1, 8, (9, 8), (0, 0)),  # 72 tokens: the kernels for windows of several tiles
    ],
    ids=["one tile, padded", "several tiles"],
)
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
def test_gradcheck_in_float64(case, cosine):
    _, _, num_heads, _, window_size, shift_size = case
    inputs = [x.detach().double().requires_grad_() for x in make_inputs(case, torch.float64, "cpu", cosine=cosine)]

    def function(qkv, bias, pad, logit_scale=None):
        return window_attention(
            qkv, num_heads, window_size, shift_size, bias, pad, logit_scale=logit_scale, impl="triton"
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("name", ["window 7 shifted padded", "window 12 shifted padded"])
def test_forward_and_backward_repeat_bit_for_bit(name, kernel_device):
    case = CASES[name]
    inputs = make_inputs(case, torch.float16, kernel_device)
    do = torch.randn(*inputs[0].shape[:3], case[2] * case[3], device=kernel_device).half()
    first, second = (
        run(lambda q, b, p: window_attention(q, case[2], case[4], case[5], b, p, impl="triton"), inputs, do)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["window 7 shifted padded", "window 12 shifted padded"])
def test_only_the_wanted_gradients_are_asked_for(name, wanted, kernel_device, poisoned):
    case = CASES[name]
    inputs = make_inputs(case, torch.float32, kernel_device, requires_grad=False)
    for index in wanted:
        inputs[index].requires_grad_()
    grads = {}
    for impl in ("triton", "reference"):
        out = window_attention(inputs[0], case[2], case[4], case[5], inputs[1], inputs[2], impl=impl)
        grads[impl] = torch.autograd.grad(out.square().sum(), [inputs[i] for i in wanted])
    for ours, expected in zip(grads["triton"], grads["reference"], strict=True):
        assert relative_error(ours, expected) < 5e-3 if GPU else 1e-5


def test_without_bias_and_padding_value(kernel_device, poisoned, ieee):
    qkv = torch.randn(2, 9, 6, 3 * 32, device=kernel_device, requires_grad=True)
    results = []
    for impl in ("triton", "reference"):
        out = window_attention(qkv, 2, 4, 2, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for ours, expected in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize(
    "view",
    {
        "slice of a wider map": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
        "transposed map": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "cropped map": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2, 3, 1))[:, 3:-1, 1:-2],
        "expanded batch": lambda x: x[:1].expand(x.shape),
    }.items(),
    ids=lambda item: item[0],
)
def test_strided_maps_are_read_as_they_lie(view, kernel_device, poisoned):
    x = view[1](torch.randn(2, 8, 12, 3 * 32, device=kernel_device).half())
    assert not x.is_contiguous()
    ours, packed = (window_attention(t, 2, (4, 6), (2, 3), impl="triton") for t in (x, x.contiguous()))
    assert torch.equal(ours, packed)


def test_gradient_of_an_expanded_output_is_right(kernel_device):
    qkv = torch.randn(1, 4, 4, 3 * 16, device=kernel_device, requires_grad=True)
    (expanded,) = torch.autograd.grad(window_attention(qkv, 1, 4, impl="triton").sum(), qkv)  # do has strides of 0
    ones = torch.ones(1, 4, 4, 16, device=kernel_device)
    (packed,) = torch.autograd.grad(window_attention(qkv, 1, 4, impl="triton"), qkv, ones)
    assert torch.equal(expanded, packed)


@pytest.mark.parametrize("N", [49, 100])
def test_empty_batch_gives_empty_output_and_zero_gradients(N, kernel_device):
    side = int(N**0.5)
    qkv = torch.randn(0, side, side, 3 * 32, device=kernel_device, requires_grad=True)
    bias = torch.randn(2, N, N, device=kernel_device, requires_grad=True)
    out = window_attention(qkv, 2, side, 0, bias, impl="triton")
    out.sum().backward()
    assert out.shape == (0, side, side, 32) and qkv.grad.shape == qkv.shape
    assert bias.grad.abs().max() == 0


# --------------------------------------------------------------------------------------------- windowed_sdpa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 16, 49, 64, 80, 144])
def test_windowed_sdpa_matches_fp64(N, dtype, kernel_device, poisoned, ieee):
    qkv = torch.randn(4, N, 3, 2, 32, device=kernel_device).to(dtype)
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0))  # views, as timm makes them
    bias = torch.randn(2, N, N, device=kernel_device, requires_grad=True)
    mask = torch.randn(2, N, N, device=kernel_device) * 3
    do = torch.randn(4, 2, N, 32, device=kernel_device).to(dtype)
    ours = run(lambda q, k, v, b: windowed_sdpa(q, k, v, b, mask, impl="triton"), [q, k, v, bias], do)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v, bias)]
    exact = run(lambda q, k, v, b: reference.windowed_sdpa(q, k, v, b, mask, 32**-0.5, None), doubles, do.double())
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, our, expected in zip(("out", "dq", "dk", "dv", "dbias"), ours, exact, strict=True):
        assert expected.norm() < 1e-9 or relative_error(our, expected) < bound, name


def test_windowed_sdpa_takes_any_strides(kernel_device):
    q, k, v = (torch.randn(2, 2, 9, 16, device=kernel_device) for _ in range(3))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.mT.contiguous().mT
    ours = windowed_sdpa(q, k, v, impl="triton")
    assert torch.equal(ours, windowed_sdpa(q, k.contiguous(), v.contiguous(), impl="triton"))


def test_output_of_windowed_sdpa_needs_no_copy_before_the_projection(kernel_device):
    q, k, v = (torch.randn(2, 2, 9, 16, device=kernel_device) for _ in range(3))
    out = windowed_sdpa(q, k, v, impl="triton")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("N", [16, 80])
def test_minus_infinity_in_the_mask_excludes_a_key_and_a_fully_masked_row_is_nan_as_in_torch(N, kernel_device):
    q, k, v = (torch.randn(1, 1, N, 16, device=kernel_device) for _ in range(3))
    mask = torch.zeros(1, N, N, device=kernel_device)
    mask[:, :, : N - 3] = float("-inf")  # the first key tile is masked as a whole
    mask[:, 5] = float("-inf")
    ours = windowed_sdpa(q, k, v, mask=mask, impl="triton")
    expected = windowed_sdpa(q, k, v, mask=mask, impl="reference")
    assert ours[0, 0, 5].isnan().all() and expected[0, 0, 5].isnan().all()
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-2 if GPU else 1e-5, atol=1e-2 if GPU else 1e-5)
