"""The MLP of a block in training: timm's numbers with the output of its GELU not kept, and who is left alone."""

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from timm.layers import GELU, Mlp
from torch import nn
from torch.nn import functional as F

from timm_flashwin import ops
from timm_flashwin.models.mlp import _GeluLinear, mlp

HALF = torch.float16
EXTREMES = [0.0, -0.0, 1e-30, 5.0, -5.0, 40.0, -40.0, float("inf"), float("-inf"), float("nan")]


def make_mlp(act_layer=nn.GELU, **options):
    return Mlp(24, 96, act_layer=act_layer, **options).to(KERNEL_DEVICE).train()


def make_input(dtype=torch.float32):
    return torch.randn(3, 7, 24, device=KERNEL_DEVICE, dtype=dtype, requires_grad=True)


def outcome(function, module, x):
    """Output and every gradient."""
    out = function(x)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, [x, *(p for p in module.parameters() if p.requires_grad)], do)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(2500,), (3, 5, 7), (1,)])
def test_the_backward_of_the_gelu_and_its_output_are_exact(shape, dtype, poisoned):
    x, dout = (2 * torch.randn(shape, device=KERNEL_DEVICE, dtype=dtype) for _ in range(2))
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    dx, out = ops.gelu_backward(dout, x)
    assert relative_error(out, expected) < 2 * torch.finfo(dtype).eps
    assert relative_error(dx, torch.autograd.grad(expected, exact, dout.double())[0]) < 2 * torch.finfo(dtype).eps


def test_the_gelu_of_extremes_is_torchs():
    x = torch.tensor(EXTREMES, device=KERNEL_DEVICE, dtype=torch.double, requires_grad=True)
    expected = F.gelu(x)  # in float64: on a CPU torch's float32 makes NaN of infinity
    dx, out = ops.gelu_backward(torch.ones_like(x).float(), x.detach().float())
    torch.testing.assert_close(out, expected.detach().float(), equal_nan=True)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0].float(), equal_nan=True)


def test_it_reads_what_is_not_contiguous_and_takes_nothing():
    x, dout = torch.randn(2, 6, 10, device=KERNEL_DEVICE).transpose(1, 2), torch.randn(1, device=KERNEL_DEVICE)
    ours = ops.gelu_backward(dout.expand(x.shape), x)
    theirs = ops.gelu_backward(dout.expand(x.shape).contiguous(), x.contiguous())
    assert all(map(torch.equal, ours, theirs))
    assert [t.shape for t in ops.gelu_backward(x[:0], x[:0])] == [(0, 10, 6)] * 2


def test_opcheck_of_gelu_backward():
    x = torch.randn(4, 10, device=KERNEL_DEVICE)
    torch.library.opcheck(torch.ops.timm_flashwin.gelu_backward.default, (x, x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("act_layer", [nn.GELU, GELU])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_timms(bias, act_layer, autocast, ieee):
    module, x = make_mlp(act_layer, bias=bias), make_input()
    with torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast):
        ours, theirs = outcome(lambda x: mlp(module, x), module, x), outcome(module, module, x)
    assert torch.equal(ours[0], theirs[0])
    for our, timm in zip(ours[1], theirs[1], strict=True):
        assert our.dtype == timm.dtype
        assert relative_error(our, timm) < (2e-3 if autocast else 1e-5)


def test_the_output_of_the_gelu_is_not_kept():
    module, x = make_mlp(), make_input()

    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            function(x)
        return sum(sizes)

    assert kept(module) - kept(lambda x: mlp(module, x)) == x.nbytes * 4


LEFT_ALONE = {
    "another activation": lambda module: setattr(module, "act", nn.ReLU()),
    "a GELU that is approximate": lambda module: setattr(module, "act", nn.GELU("tanh")),
    "a hook on the activation": lambda module: module.act.register_forward_hook(lambda *_: None),
    "a hook on the Linear": lambda module: module.fc2.register_forward_hook(lambda *_: None),
    "a hook on the whole": lambda module: module.register_full_backward_hook(lambda *_: None),
    "dropout": lambda module: setattr(module.drop1, "p", 0.5),
    "a norm in between": lambda module: setattr(module, "norm", nn.LayerNorm(96, device=KERNEL_DEVICE)),
    "a frozen Linear": lambda module: module.fc2.weight.requires_grad_(False),
    "a Linear of another kind": lambda module: setattr(
        module, "fc2", nn.utils.parametrizations.weight_norm(module.fc2)
    ),
    "a forward of somebody's own": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_an_mlp_that_is_not_timms_keeps_timms_code(change, monkeypatch):
    module, x = make_mlp(), make_input()
    change(module)
    monkeypatch.setattr(_GeluLinear, "apply", None)
    torch.manual_seed(0)
    out = mlp(module, x)
    torch.manual_seed(0)
    assert torch.equal(out, module(x))


def test_without_a_gradient_nothing_is_kept_anyway(monkeypatch):
    module, x = make_mlp(), make_input()
    monkeypatch.setattr(_GeluLinear, "apply", None)
    with torch.no_grad():
        mlp(module, x)
    module.requires_grad_(False)
    mlp(module, x)
