"""The relative position bias: timm's own gather, bit for bit, and its gradient against float64."""

import pytest
import torch
from conftest import GPU
from timm.models.swin_transformer import get_relative_position_index

from timm_flashwin import geometry, ops
from timm_flashwin.functional import relative_position_bias

# One and several heads, no power of two, more than a tile takes; square windows and not, one token wide or high.
CASES = [((7, 7), 4), ((8, 8), 3), ((12, 12), 2), ((2, 5), 40), ((9, 4), 2), ((1, 13), 1), ((13, 1), 5), ((1, 1), 2)]
LARGE = [((24, 24), 1)] + ([((24, 24), 32), ((16, 36), 64), ((1, 576), 64), ((576, 1), 3)] if GPU else [])
DTYPES = [torch.float32, torch.float16, torch.bfloat16 if GPU else torch.float64]
OP = torch.ops.timm_flashwin


def make_table(window_size, num_heads, dtype=torch.float32, device="cpu"):
    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    return torch.randn(rows, num_heads, device=device).to(dtype).requires_grad_()


def timms(table, window_size):
    """`WindowAttention._get_rel_pos_bias` of timm's."""
    area = window_size[0] * window_size[1]
    index = get_relative_position_index(*window_size).to(table.device)
    return table[index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("window_size, _", CASES)
def test_index_is_timms(window_size, _):
    assert torch.equal(geometry.relative_position_index(window_size), get_relative_position_index(*window_size))


def check(window_size, num_heads, dtype, impl, device):
    """The bias is timm's, and the gradient float64's."""
    table = make_table(window_size, num_heads, dtype, device)
    ours, expected = relative_position_bias(table, window_size, impl), timms(table, window_size)
    assert ours.is_contiguous() and torch.equal(ours, expected)

    dbias = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(ours, table, dbias)
    double = table.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(timms(double, window_size), double, dbias.double())
    assert grad.dtype == dtype and grad.shape == table.shape
    # Rounded once, after a sum of up to N terms of size 1 in float32.
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window_size, num_heads", CASES)
def test_bias_is_timms_and_its_gradient_exact(window_size, num_heads, dtype, impl, kernel_device, poisoned):
    check(window_size, num_heads, dtype, impl, kernel_device)


@pytest.mark.parametrize("window_size, num_heads", LARGE)
def test_large_windows(window_size, num_heads, kernel_device, poisoned):
    check(window_size, num_heads, torch.float32, "triton", kernel_device)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_strided_tables_and_gradients(impl, kernel_device):
    window_size = (5, 3)
    table = make_table(window_size, 6, device=kernel_device).detach()
    for view in (table.mT.contiguous().mT, torch.cat([table, table], dim=1)[:, :6]):
        view.requires_grad_()
        bias = relative_position_bias(view, window_size, impl)
        assert not view.is_contiguous() and torch.equal(bias, timms(table, window_size))
        (grad,) = torch.autograd.grad(bias.sum(), view)  # a gradient with strides of 0
        pairs = torch.bincount(geometry.relative_position_index(window_size).flatten())
        assert torch.equal(grad, pairs[:, None].expand(-1, 6).to(grad))


@pytest.mark.parametrize("dtype, table_dtype", [(torch.float32, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize("shift, cosine", [(0, False), (2, True)])
@pytest.mark.parametrize("window_size", [(4, 4), (3, 5), (9, 8)])
def test_attention_takes_the_table_for_the_bias(
    window_size, shift, cosine, dtype, table_dtype, kernel_device, ieee, poisoned
):
    heads, head_dim = 2, 8
    size = 2 * window_size[0] - 1, window_size[1]
    qkv = torch.randn(1, *size, 3 * heads * head_dim, device=kernel_device, dtype=dtype)
    # Not contiguous, and between what must not be read.
    table = make_table(window_size, heads + 2, table_dtype, kernel_device).detach()
    table[:, 0], table[:, -1] = float("nan"), float("nan")
    table = table[:, 1:-1]
    pad_qkv = torch.randn(3 * heads * head_dim, device=kernel_device, dtype=dtype)
    logit_scale = torch.randn(heads, device=kernel_device) if cosine else None
    others = pad_qkv, logit_scale, heads, window_size, (shift, shift), 0.3, False
    bias = ops.relative_position_bias(table, window_size)
    expected, _ = ops.window_attention(qkv, bias, *others)
    for attention in (ops.window_attention, OP.window_attention):
        assert torch.equal(attention(qkv, table, *others)[0], expected)


@pytest.mark.parametrize("trained", ["qkv", "table"])
def test_attention_by_the_table_has_no_gradient_and_says_so(trained, kernel_device):
    inputs = dict(qkv=torch.randn(1, 4, 4, 48, device=kernel_device), table=torch.randn(49, 2, device=kernel_device))
    inputs[trained].requires_grad_()
    for attention in (ops.window_attention, OP.window_attention):
        with pytest.raises(ValueError, match="no gradient where it is given the table"):
            attention(*inputs.values(), None, None, 2, (4, 4), (0, 0), 0.3, False)


@pytest.mark.parametrize("window_size", [(12, 12), (5, 20)])
def test_gradient_repeats_bit_for_bit(window_size, kernel_device):
    table = make_table(window_size, 3, device=kernel_device)
    dbias = torch.randn(3, *(window_size[0] * window_size[1],) * 2, device=kernel_device)
    first, second = (
        torch.autograd.grad(relative_position_bias(table, window_size, "triton"), table, dbias)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "impl", [pytest.param("triton", marks=pytest.mark.skipif(GPU, reason="no float64 on GPUs")), "reference"]
)
@pytest.mark.parametrize("window_size", [(3, 2), (1, 4)])
def test_first_and_second_derivative_in_float64(window_size, impl):
    table = make_table(window_size, 2, torch.float64)

    def squared(table):  # linear functions have no second derivative to get wrong
        return relative_position_bias(table, window_size, impl).square()

    assert torch.autograd.gradcheck(squared, table, fast_mode=True)
    assert torch.autograd.gradgradcheck(squared, table, fast_mode=True)


def test_opcheck(kernel_device):
    table = make_table((3, 4), 2, device=kernel_device)
    torch.library.opcheck(OP.relative_position_bias.default, (table, (3, 4)))
    dbias = torch.randn(2, 12, 12, device=kernel_device, requires_grad=True)
    torch.library.opcheck(OP.relative_position_bias_backward.default, (dbias, (3, 4)))


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_compiles_without_a_graph_break_forward_and_backward(impl, kernel_device):
    def function(table):
        return (16 * relative_position_bias(table * 2, (4, 3), impl).sigmoid()).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    table = make_table((4, 3), 3, device=kernel_device)
    expected, actual = (torch.autograd.grad(f(table), table)[0] for f in (function, compiled))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_changes_nothing(impl, kernel_device):
    table = make_table((4, 4), 2, device=kernel_device)
    with torch.autocast(kernel_device, torch.float16):
        bias = relative_position_bias(table, 4, impl)
    assert torch.equal(bias, relative_position_bias(table, 4, impl)) and bias.dtype == torch.float32


BAD = {
    "no tensor": (TypeError, "table is a list", dict(table=[1.0])),
    "integers": (TypeError, "table has the dtype torch.int64", dict(table=torch.zeros(49, 2, dtype=torch.long))),
    "rank": (ValueError, "table has 1 dimensions", dict(table=torch.zeros(49))),
    "rows": (
        ValueError,
        "\\(48, 2\\); .* here \\(49, 1 or more\\) for window_size=\\(4, 4\\)",
        dict(table=torch.zeros(48, 2)),
    ),
    "no heads": (ValueError, "table has the shape \\(49, 0\\)", dict(table=torch.zeros(49, 0))),
    "window of nothing": (ValueError, "window_size is \\(0, 4\\)", dict(window_size=(0, 4))),
    "impl": (ValueError, "'auto', 'triton', 'reference'", dict(impl="cuda")),
}


@pytest.mark.parametrize("name", BAD)
def test_it_names_what_is_wrong_with_its_input(name):
    error, message, change = BAD[name]
    with pytest.raises(error, match=message):
        relative_position_bias(**(dict(table=torch.zeros(49, 2), window_size=4) | change))


def test_windows_past_the_kernels_limit_are_gathered_all_the_same(kernel_device):
    table = make_table((25, 24), 1, device=kernel_device)
    with pytest.raises(ValueError, match="up to 576 tokens, not 600"):
        relative_position_bias(table, (25, 24), "triton")
    assert torch.equal(relative_position_bias(table, (25, 24)), timms(table, (25, 24)))
