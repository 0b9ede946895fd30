"""A whole block as one node of autograd: the numbers, gradients and memory of its modules, and when they are called."""

import copy

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from test_own_modules import EVEN, FAMILIES, PADDED, C, make_blocks
from timm.layers import DropPath
from torch import nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from timm_flashwin import ops
from timm_flashwin.kernels import launch
from timm_flashwin.models import fused_block
from timm_flashwin.models.snapshot import Snapshot

HALF = torch.float16
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_input(size=EVEN, batch=2):
    return torch.randn(batch, *size, C, device=KERNEL_DEVICE, requires_grad=True)


def call_modules(monkeypatch):
    """From here on blocks call their modules."""
    monkeypatch.setattr(fused_block, "snapshot_of", Snapshot)
    monkeypatch.setattr(fused_block, "_is_plain_block", lambda block: False)


def gradients(block, x, autocast=False, dout=None):
    """(output, gradients by name, that of `x` included)"""
    torch.manual_seed(1)  # stochastic depth
    with torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast):
        out = block(x)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    wanted = {"x": x} | dict(block.named_parameters())
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    return out, dict(zip(wanted, torch.autograd.grad((out * weight).sum(), [*wanted.values()]), strict=True))


@each_family
@pytest.mark.parametrize("size, drop_path", [(EVEN, 0.0), (PADDED, 0.5)])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradients_are_as_exact_as_with_modules_called(
    family, size, autocast, drop_path, monkeypatch, ieee, poisoned
):
    stock, flash = make_blocks(family, size)
    for block in (stock, flash):
        block.drop_path1, block.drop_path2 = (DropPath(drop_path).train() for _ in range(2))
        block.norm2.eps = 1e-2
    x = make_input(size, batch=4)
    whole = gradients(flash, x, autocast)
    assert type(whole[0].grad_fn) is fused_block._FusedBlock._backward_cls
    call_modules(monkeypatch)
    called = gradients(flash, x, autocast)
    exact = gradients(copy.deepcopy(stock).double(), x.detach().double().requires_grad_())

    least = 1e-3 if autocast else 1e-6
    assert whole[0].dtype == called[0].dtype
    assert relative_error(whole[0], exact[0]) < 2 * relative_error(called[0], exact[0]) + least
    for name, expected in exact[1].items():
        assert whole[1][name].dtype == called[1][name].dtype
        if expected.norm() > 1e-9:  # V2-CR's last bias has none
            errors = [relative_error(way[1][name], expected) for way in (whole, called)]
            assert errors[0] < 2 * errors[1] + least, f"{name}: {errors}"


@each_family
def test_without_gradients_the_output_is_that_of_the_modules_to_the_last_bit(family, monkeypatch, ieee):
    _, flash = make_blocks(family)
    x = make_input()
    with torch.no_grad():
        whole = flash(x)
        call_modules(monkeypatch)
        assert torch.equal(whole, flash(x))


@each_family
def test_an_empty_batch_stays_empty(family):
    _, flash = make_blocks(family)
    x = make_input(batch=0)
    out = flash(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape and not flash.mlp.fc1.weight.grad.any()


def only(*names):
    return lambda name: any(part in name for part in names)


TRAINED = {
    "the input": only(),
    "biases": only("bias"),
    "weights": only("weight"),
    "the MLP's weights": only("mlp"),
    "the norms": only("norm"),
    "the attention's scale and position": only("logit_scale", "mlp.fc", "cpb", "table"),
    "all but the input": only(""),
}


@each_family
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(family, trained, ieee):
    stock, flash = make_blocks(family, PADDED)
    for block in (stock, flash):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(trained(name))
    x = make_input(PADDED).detach().requires_grad_(not any(p.requires_grad for p in flash.parameters()))
    expected, grads = (gradients(block, x)[1] for block in (stock, flash))
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        if expected[name].norm() > 1e-6:  # V2-CR's last bias has none
            assert relative_error(grad, expected[name]) < 1e-3, name


def hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None)


LEFT_ALONE = {
    **{f"a hook on {path}": hook(path) for path in ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act")},
    "a hook before": lambda block: block.attn.proj.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.mlp.fc2.register_full_backward_hook(lambda *_: None),
    "dropout": lambda block: setattr(block.attn, "proj_drop", nn.Dropout(0.5).train()),
    "something in the dropout's place": lambda block: setattr(block.attn, "proj_drop", nn.Tanh()),
    "a compiled Linear": lambda block: block.attn.proj.compile(backend="eager"),
    "an _attn of its own": lambda block: setattr(block, "_attn", block._attn),
    "a frozen weight": lambda block: block.attn.proj.weight.requires_grad_(False),
    "a parametrised weight": lambda block: nn.utils.parametrizations.weight_norm(block.attn.proj),
    "a Linear of somebody's own": lambda block: setattr(block.mlp, "fc1", type("Own", (nn.Linear,), {})(C, 4 * C)),
    "weights in another dtype": lambda block: block.mlp.double(),
}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_modules_that_somebody_could_miss_are_called(change, used_before, monkeypatch):
    _, flash = make_blocks("v1")
    if used_before:
        assert type(flash(make_input()).grad_fn) is fused_block._FusedBlock._backward_cls
    change(flash)
    flash.to(KERNEL_DEVICE)
    monkeypatch.setattr(fused_block, "_FusedBlock", None)
    try:
        flash(make_input())
    except RuntimeError as error:  # of torch's own Linear
        assert "dtype" in str(error)


def test_a_hook_on_all_modules_sees_all_of_them():
    _, flash = make_blocks("v1")
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        flash(make_input())
    finally:
        handle.remove()
    assert {flash.attn.qkv, flash.attn.proj, flash.mlp.fc1, flash.mlp.fc2} <= seen


@each_family
def test_a_second_derivative_is_refused_and_the_first_is_right(family):
    _, flash = make_blocks(family)
    x = make_input()
    (plain,) = torch.autograd.grad(flash(x).square().sum(), x)
    (grad,) = torch.autograd.grad(flash(x).square().sum(), x, create_graph=True)
    assert torch.equal(plain, grad)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@each_family
def test_a_gradient_that_has_a_graph_may_be_changed_in_place(family):
    _, flash = make_blocks(family)
    (grad,) = torch.autograd.grad(flash(make_input()).sum(), flash.mlp.fc1.weight, create_graph=True)
    grad.mul_(2)


@each_family
def test_under_autocast_every_gradient_has_memory_of_its_own(family):
    _, flash = make_blocks(family)
    with torch.autocast(KERNEL_DEVICE, HALF):
        flash(make_input()).sum().backward()
    assert all(p.grad.untyped_storage().nbytes() == p.grad.nbytes for p in flash.mlp.parameters())


@each_family
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_may_be_mapped(family, autocast):
    _, flash = make_blocks(family)
    flash.drop_path1, flash.drop_path2 = DropPath(0.5).train(), DropPath(0.5).train()
    with torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast):
        out = flash(make_input())
    parameters = list(flash.mlp.parameters())
    batch = torch.randn(2, *out.shape, device=out.device, dtype=out.dtype)
    mapped = torch.func.vmap(lambda dout: torch.autograd.grad(out, parameters, dout, retain_graph=True))(batch)
    for i, dout in enumerate(batch):
        expected = torch.autograd.grad(out, parameters, dout, retain_graph=True)
        assert all(relative_error(a[i], b) < 1e-2 for a, b in zip(mapped, expected, strict=True))


@each_family
def test_under_a_mode_the_dropout_of_the_position_bias_draws_once(family, ieee):
    outs = []
    for block in make_blocks(family):
        torch.manual_seed(2)
        with BaseTorchFunctionMode(), torch.device(KERNEL_DEVICE):
            outs.append((block.train()(make_input()), torch.rand(1)))
    assert relative_error(outs[1][0], outs[0][0]) < 1e-4
    assert torch.equal(outs[1][1], outs[0][1])


class NamesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(torch.overrides.resolve_name(func))
        return func(*args, **(kwargs or {}))


@each_family
def test_a_default_device_is_no_reason_to_call_the_modules_and_another_mode_is(family):
    _, flash = make_blocks(family)
    x = make_input()
    plain = gradients(flash, x)
    with torch.device("meta"):
        out, grads = gradients(flash, x)
        assert type(out.grad_fn) is fused_block._FusedBlock._backward_cls
        with NamesFunctions() as mode:
            called = flash(x)
    assert torch.equal(out, plain[0])
    assert all(torch.equal(grad, plain[1][name]) for name, grad in grads.items())
    assert type(called.grad_fn) is not type(out.grad_fn)
    assert "torch.nn.functional.linear" in mode.names or "torch._C._nn.linear" in mode.names


@each_family
def test_a_profiler_in_the_forward_alone_leaves_checkpointing_alone(family):
    _, flash = make_blocks(family)
    x = make_input()
    with torch.autograd.profiler.profile():
        out = checkpoint(flash, x, use_reentrant=False)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@each_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_under_checkpointing_has_the_same_gradients(family, use_reentrant):
    _, flash = make_blocks(family)
    x = make_input()
    plain = gradients(flash, x)[1]
    checkpointed = checkpoint(flash, x, use_reentrant=use_reentrant)
    weight = torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape)
    (checkpointed * weight).sum().backward()
    assert torch.equal(x.grad, plain["x"])
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in flash.named_parameters())


@each_family
@pytest.mark.parametrize("size, autocast", [(EVEN, False), (PADDED, True)])
def test_where_windows_are_few_no_bias_is_made_and_the_output_is_the_same(family, size, autocast, monkeypatch):
    _, flash = make_blocks(family, size)
    x, made = make_input(size), []
    make_bias = ops.relative_position_bias._kernel
    monkeypatch.setattr(ops.relative_position_bias, "_kernel", lambda *inputs: made.append(1) or make_bias(*inputs))

    def output(few):
        monkeypatch.setattr(launch, "_FEW", few)
        with torch.no_grad(), torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast):
            return copy.deepcopy(flash)(x)  # a copy remembers nothing

    expected = output(0)
    assert len(made) == 1
    assert torch.equal(output(10**6), expected)
    assert len(made) == 1


def test_a_graph_that_is_retained_can_be_gone_through_again():
    _, flash = make_blocks("v1")
    x = make_input()
    out = flash(x).square().sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_hooks_on_parameters_are_called():
    _, flash = make_blocks("v1")
    called = []
    flash.mlp.fc1.weight.register_hook(lambda grad: called.append(grad.shape))
    flash.mlp.fc1.weight.register_post_accumulate_grad_hook(lambda parameter: called.append(parameter.grad.shape))
    flash(make_input()).sum().backward()
    assert called == [flash.mlp.fc1.weight.shape] * 2


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    _, flash = make_blocks("v1")
    out = flash(make_input())
    with torch.no_grad():
        flash.mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_family
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", ["", "fc2"])
def test_no_more_is_kept_than_with_modules_called(family, autocast, trained, monkeypatch):
    _, flash = make_blocks(family)
    for name, parameter in flash.named_parameters():
        parameter.requires_grad_(trained in name)
    x = make_input(batch=8).detach().requires_grad_(not trained)

    def kept():
        storages = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
                lambda t: t,
            ),
            torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast),
        ):
            out = flash(x)
        return sum(storages.values()), out  # the output keeps the storages alive, and their addresses apart

    whole, _ = kept()
    call_modules(monkeypatch)
    biases = 2 * (3 * C + C + 4 * C + C)  # cast along with the weights
    assert whole <= kept()[0] + biases
