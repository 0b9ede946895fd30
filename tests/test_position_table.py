"""The MLP of the relative position bias as an operator: timm_flashwin::continuous_position_table."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import assert_as_exact_as_timm, rounding
from torch.nn import functional as F

from timm_flashwin import ops

WINDOW = (3, 4)
ROWS, HIDDEN = 5 * 7, 40


def torchs_table(coordinates, weight1, bias1, weight2, bias2, bounded):
    table = F.linear(torch.relu(F.linear(coordinates, weight1, bias1)), weight2) + bias2
    return 16 * torch.sigmoid(table) if bounded else table


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_heads", [1, 70])  # one block of heads, and more than one
def test_every_gradient_is_as_exact_as_that_of_the_two_linears(num_heads, dtype, bounded, ieee):
    coordinates = torch.randn(ROWS, 2, dtype=dtype, device=KERNEL_DEVICE)
    shapes = (HIDDEN, 2), (HIDDEN,), (num_heads, HIDDEN), (num_heads,)
    weights = [torch.randn(shape, dtype=dtype, device=KERNEL_DEVICE) * 0.3 for shape in shapes]
    dtable = torch.randn(ROWS, num_heads, dtype=dtype, device=KERNEL_DEVICE)

    def results(make, wide):
        leaves = [weight.to(wide).requires_grad_() for weight in weights]
        table = make(coordinates.to(wide), *leaves)
        return table, *torch.autograd.grad(table, leaves, dtable.to(wide))

    ours = results(lambda *tensors: ops.continuous_position_table(*tensors, WINDOW, bounded, dtype), dtype)
    torchs, exact = (results(lambda *tensors: torchs_table(*tensors, bounded), wide) for wide in (dtype, torch.float64))
    for name, *triple in zip(("table", "weight1", "bias1", "weight2", "bias2"), ours, torchs, exact, strict=True):
        assert triple[0].dtype == dtype
        if num_heads > 1 or name != "bias2":
            assert_as_exact_as_timm(name, *triple)
    # Of one head bias2 is a single sum, which may nearly cancel: the rounding of its terms is what it is judged by.
    terms = weights[-1].double().expand(ROWS, num_heads).requires_grad_()
    table = torchs_table(*(tensor.double() for tensor in (coordinates, *weights[:-1])), terms, bounded)
    (terms,) = torch.autograd.grad(table, terms, dtable.double())
    allowed = (rounding(dtype) + 4 * rounding(torch.float32)) * max(terms.norm(), exact[-1].norm())
    assert (ours[-1].double() - exact[-1]).norm() <= allowed


def test_only_the_gradients_that_are_wanted_are_given():
    coordinates, bias1 = torch.randn(ROWS, 2, device=KERNEL_DEVICE), torch.zeros(HIDDEN, device=KERNEL_DEVICE)
    weight1 = torch.randn(HIDDEN, 2, device=KERNEL_DEVICE)
    weight2 = torch.randn(2, HIDDEN, device=KERNEL_DEVICE).requires_grad_()
    table = ops.continuous_position_table(coordinates, weight1, bias1, weight2, None, WINDOW, True, torch.float32)
    table.sum().backward()
    assert weight2.grad is not None and weight1.grad is None and bias1.grad is None


def test_the_operator_and_its_gradient_are_registered_as_torch_wants_them():
    coordinates = torch.randn(ROWS, 2, device=KERNEL_DEVICE)
    shapes = (HIDDEN, 2), (HIDDEN,), (2, HIDDEN), (2,)
    weights = [torch.randn(shape, device=KERNEL_DEVICE) for shape in shapes]
    operators = torch.ops.timm_flashwin
    leaves = [weight.clone().requires_grad_() for weight in weights]
    torch.library.opcheck(
        operators.continuous_position_table.default, (coordinates, *leaves, WINDOW, True, torch.float32)
    )
    dtable = torch.randn(ROWS, 2, device=KERNEL_DEVICE)
    torch.library.opcheck(
        operators.continuous_position_table_backward.default, (dtable, coordinates, *weights, WINDOW, True)
    )
