"""What a block remembers of itself ends with any change of it, and binds nobody else."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import numpy
import pytest
import timm
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from test_own_modules import EVEN, FAMILIES, C, make_blocks
from torch import nn

import timm_flashwin
from timm_flashwin.models import fused_block
from timm_flashwin.models.snapshot import Snapshot

each_family = pytest.mark.parametrize("family", FAMILIES)


def shrink(block):
    weight = block.mlp.fc1.weight
    weight.data = weight.data[:-1]


def replace_hooks(block):
    block.mlp.fc1._forward_hooks = OrderedDict()
    block.mlp.fc1.register_forward_hook(lambda *_: None)


CHANGES = {
    "another submodule": lambda block: setattr(block.mlp, "norm", nn.Identity()),
    "another class": lambda block: setattr(block.mlp, "__class__", type("Own", (type(block.mlp),), {})),
    "another parameter": lambda block: setattr(block.norm1, "bias", nn.Parameter(block.norm1.bias.detach().clone())),
    "a parameter of another class": lambda block: setattr(
        block.norm1.bias, "__class__", type("Own", (nn.Parameter,), {})
    ),
    "no parameter": lambda block: setattr(block.attn.proj, "bias", None),
    "a buffer in other memory": lambda block: setattr(
        block.attn.relative_position_index, "data", block.attn.relative_position_index.clone()
    ),
    "an attribute": lambda block: setattr(block.attn, "num_heads", 4),
    "a new attribute": lambda block: setattr(block.mlp.fc2, "forward", block.mlp.fc2.forward),
    "a tensor as an attribute": lambda block: setattr(block.norm1, "eps", torch.ones(2)),
    "another mode": lambda block: block.mlp.drop1.train(not block.mlp.drop1.training),
    "another size of a dropout": lambda block: setattr(block.attn.proj_drop, "p", 0.25),
    "a hook": lambda block: block.mlp.fc2.register_forward_hook(lambda *_: None),
    "a hook before": lambda block: block.attn.qkv.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.norm2.register_full_backward_hook(lambda *_: None),
    "a compiled part": lambda block: block.mlp.compile(backend="eager"),
    "a hook in another dictionary": replace_hooks,
    "parameters in another dictionary": lambda block: setattr(
        block.attn.proj, "_parameters", {name: nn.Parameter(x * 3) for name, x in block.attn.proj._parameters.items()}
    ),
    "a negated view": lambda block: setattr(
        block.norm1, "weight", nn.Parameter(torch._neg_view(block.norm1.weight.detach()))
    ),
    "a frozen parameter": lambda block: block.norm2.weight.requires_grad_(False),
    "another dtype": lambda block: block.double(),
    "another device": lambda block: block.to("meta"),
    "memory of another size": shrink,
    "other memory": lambda block: setattr(block.norm2.weight, "data", torch.ones(C)),
    "a new window size": lambda block: block.attn.set_window_size((2, 2)),
    "other weights in the place of its own": lambda block: nn.utils.parametrizations.weight_norm(block.attn.proj),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    _, block = make_blocks("v1")
    block.cpu()
    snapshot = Snapshot(block)
    assert snapshot.holds(block)
    change(block)
    assert not snapshot.holds(block)


def test_a_tensor_that_is_an_attribute_may_be_another():
    _, block = make_blocks("v1")
    block.norm1.note = torch.ones(2)
    snapshot = Snapshot(block)
    assert snapshot.holds(block)
    block.norm1.note = torch.ones(2)
    assert not snapshot.holds(block)


@each_family
def test_other_values_of_the_parameters_are_no_change(family):
    _, block = make_blocks(family)
    snapshot = Snapshot(block)
    block.load_state_dict(copy.deepcopy(block.state_dict()))
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(block.parameters(), lr=0.1).step()
    block.register_forward_hook(lambda *_: None)  # its own, which it cannot help but call
    assert snapshot.holds(block)


def test_a_copy_that_shares_all_parts_is_another_module():
    _, block = make_blocks("v1")
    assert not Snapshot(block).holds(copy.copy(block))


def readings(block):
    """Those a block has remembered; None for one that never ran."""
    snapshot = vars(block).get("_flashwin_snapshot")
    return None if snapshot is None else snapshot.found


def make_map(batch=2, **options):
    return torch.randn(batch, *EVEN, C, device=KERNEL_DEVICE, **options)


@each_family
def test_a_block_reads_itself_once_for_maps_alike(family, monkeypatch):
    _, block = make_blocks(family)
    x = make_map()
    expected = block(x)
    monkeypatch.setattr(fused_block, "_read", None)
    assert torch.equal(block(x), expected)


@each_family
def test_weights_that_change_act_at_once(family, ieee):
    stock, flash = make_blocks(family)
    x = make_map()
    flash(x)
    for block in (stock, flash):
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.5)
            block.attn.proj.bias = nn.Parameter(block.attn.proj.bias + torch.linspace(-1, 1, C, device=KERNEL_DEVICE))
            block.norm1.weight.data = block.norm1.weight.data + 1
    assert relative_error(flash(x), stock(x)) < 1e-4


@each_family
def test_weights_that_are_lent_for_one_call_act_in_it_alone_and_are_not_kept(family, ieee):
    stock, flash = make_blocks(family)
    x = make_map()
    before = flash(x)
    lent = {name: parameter * 1.25 for name, parameter in flash.named_parameters()}
    ours, timms = (torch.func.functional_call(block, lent, x) for block in (stock, flash))
    assert relative_error(ours, timms) < 1e-4
    weight = weakref.ref(lent["mlp.fc1.weight"])
    del lent, ours, timms
    gc.collect()
    assert weight() is None
    assert torch.equal(flash(x), before)


@each_family
def test_each_mode_has_a_reading_of_its_own(family, ieee):
    stock, flash = make_blocks(family)
    x = make_map()
    for _ in range(2):
        assert flash(x).requires_grad
        with torch.no_grad():
            assert not flash(x).requires_grad
        with torch.autocast(KERNEL_DEVICE, torch.float16):
            halves = [block(x) for block in (stock, flash)]
        assert halves[0].dtype == halves[1].dtype and relative_error(halves[1], halves[0]) < 1e-2
        assert relative_error(flash(x[:1]), stock(x[:1])) < 1e-4


def test_ever_new_sizes_are_not_all_remembered(monkeypatch):
    monkeypatch.setattr(fused_block, "_MAX_READINGS", 2)
    _, block = make_blocks("v1")
    for batch in (1, 2, 3, 4, 5):
        block(make_map(batch))
        assert 1 <= len(readings(block)) <= 2


@each_family
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_starts_with_no_memory_and_is_right(family, duplicate):
    _, block = make_blocks(family)
    x = make_map()
    expected = block(x)
    copied = duplicate(block)
    assert len(readings(block)) == 1 and readings(copied) is None
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
    assert torch.equal(copied(x), expected)


def test_restore_leaves_nothing_behind():
    _, block = make_blocks("v1")
    names = set(vars(block))
    block(make_map())
    assert readings(block)
    timm_flashwin.restore(block)
    assert set(vars(block)) == names


def make_model(family):
    """Of one block, which has run."""
    name = dict(v1="swin_tiny_patch4_window7_224", v2="swinv2_tiny_window8_256", v2_cr="swinv2_cr_tiny_224")[family]
    model = timm.create_model(name, img_size=32, window_size=4, depths=(1,), num_heads=(1,), embed_dim=16)
    timm_flashwin.accelerate(model, impl="auto" if KERNEL_DEVICE == "cuda" else "triton")
    model.to(KERNEL_DEVICE).eval()
    model(torch.randn(1, 3, 32, 32, device=KERNEL_DEVICE))
    (block,) = [module for module in model.modules() if hasattr(module, "attn")]
    assert readings(block)
    return model, block


@each_family
def test_a_model_that_nobody_holds_is_freed_at_once(family):
    model, block = make_model(family)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()
    try:
        del model, block
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_model_that_is_held_by_a_hook_of_its_own_is_freed_by_the_garbage_collector():
    model, block = make_model("v1")
    block.mlp.register_forward_hook(lambda *_, holder=model: None)
    freed = weakref.ref(model)
    del model, block
    gc.collect()
    assert freed() is None


@each_family
def test_weights_that_are_replaced_are_free(family):
    _, block = make_blocks(family)
    block(make_map())
    weights = [weakref.ref(parameter) for parameter in block.parameters()]
    block.load_state_dict({name: tensor.clone() for name, tensor in block.state_dict().items()}, assign=True)
    assert not any(weight() is not None for weight in weights)
    weight = weakref.ref(block.mlp.fc1.weight)
    block.mlp.fc1 = nn.Sequential(nn.Linear(C, 4 * C, device=KERNEL_DEVICE))
    block(make_map())
    assert weight() is None


@each_family
def test_parameters_may_be_swapped_and_then_act(family, ieee):
    stock, flash = make_blocks(family)
    x = make_map()
    flash(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for block in (stock, flash):
            block.half()
            block.float()
            with torch.no_grad():
                torch.utils.swap_tensors(block.norm1.weight, nn.Parameter(block.norm1.weight * 2))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert relative_error(flash(x), stock(x)) < 1e-4


def test_what_is_noted_on_a_module_is_not_kept():
    _, block = make_blocks("v1")
    block.register_forward_hook(lambda module, _, out: setattr(module, "note", out))
    for _ in range(2):
        block(make_map())
    note = weakref.ref(block.note)
    block.note = None
    assert note() is None


@pytest.mark.parametrize("used_before", [False, True])
def test_a_rate_of_dropout_that_is_a_tensor_acts_when_it_changes(used_before, ieee):
    stock, flash = make_blocks("v1")
    x = make_map()
    for block in (stock, flash):
        block.attn.proj_drop = nn.Dropout().train()
        block.attn.proj_drop.p = torch.tensor(0.0)
    if used_before:
        flash(x)
    for block in (stock, flash):
        block.attn.proj_drop.p.fill_(1.0)
    assert relative_error(flash(x), stock(x)) < 1e-4


class EqualToAll(nn.Identity):
    def __eq__(self, other):
        return torch.ones(2)

    __hash__ = nn.Identity.__hash__


def test_parts_are_told_apart_by_what_they_are_and_not_by_what_they_equal():
    _, block = make_blocks("v1")
    block.mlp.drop2 = EqualToAll()
    snapshot = Snapshot(block)
    assert snapshot.holds(block)
    block.mlp.drop2 = EqualToAll()
    assert not snapshot.holds(block)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_bias_that_is_trained_in_a_frozen_block_gets_its_gradient(used_before, ieee):
    stock, flash = make_blocks("v2")
    for block in (stock.requires_grad_(False), flash.requires_grad_(False)):
        if used_before:
            block(make_map())
        block.attn.k_bias.requires_grad_()
    x = make_map()
    grads = [torch.autograd.grad(block(x).square().sum(), block.attn.k_bias)[0] for block in (stock, flash)]
    assert relative_error(grads[1], grads[0]) < 1e-3


class Scaled(nn.Module):
    def forward(self, table):
        return table * table.sigmoid()


def test_a_table_with_a_parametrization_is_made_anew_each_time(ieee):
    stock, flash = make_blocks("v1")
    for block in (stock, flash):
        nn.utils.parametrize.register_parametrization(block.attn, "relative_position_bias_table", Scaled())
    x = make_map()
    flash(x)
    with torch.no_grad():
        for block in (stock, flash):
            table = block.attn.parametrizations.relative_position_bias_table.original
            table += torch.linspace(-3, 3, len(table), device=KERNEL_DEVICE)[:, None]
    for _ in range(2):
        outs = [block(x) for block in (stock, flash)]
        assert relative_error(outs[1], outs[0]) < 1e-4
        outs[1].sum().backward()


def test_coordinates_that_change_in_place_act_at_once(ieee):
    stock, flash = make_blocks("v2")
    x = make_map()
    flash(x)
    for block in (stock, flash):
        coordinates = block.attn.relative_coords_table
        coordinates.data = coordinates.data * -3 + 1
    assert relative_error(flash(x), stock(x)) < 1e-4


@pytest.mark.parametrize("value", [lambda: numpy.zeros(3), lambda: torch.zeros(3), lambda: [torch.zeros(3)]])
def test_what_is_noted_on_a_module_may_be_anything(value):
    _, block = make_blocks("v1")
    block.register_forward_hook(lambda module, *_: setattr(module.mlp, "note", value()))
    x = make_map()
    assert torch.equal(block(x), block(x))


def test_a_parameter_without_memory_is_nobodys_affair():
    _, block = make_blocks("v1")
    block.extra = nn.Parameter(torch.eye(3).to_sparse())
    x = make_map()
    assert torch.equal(block(x), block(x))


@each_family
def test_the_weights_of_a_replica_are_its_own_and_are_not_kept(family, ieee):
    """As nn.DataParallel makes them: a shallow copy whose parameters are attributes."""
    _, block = make_blocks(family)
    x = make_map()
    block(x)
    replicas = {module: module._replicate_for_data_parallel() for module in block.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    replica = replicas[block]
    assert relative_error(replica(x), block(x)) < 1e-6
    with torch.no_grad():
        replica.norm1.weight *= 2
        block.norm1.weight *= 2
    assert relative_error(replica(x), block(x)) < 1e-6


@each_family
def test_a_block_that_calls_its_modules_finds_that_out_once(family, monkeypatch):
    _, block = make_blocks(family)
    block.mlp.fc1.register_forward_hook(lambda *_: None)
    x = make_map()
    expected = block(x)
    monkeypatch.setattr(fused_block, "_read", None)
    assert torch.equal(block(x), expected)
