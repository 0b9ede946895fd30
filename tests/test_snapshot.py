"""What a block remembers of itself ends with any change of it, and binds nobody else."""

import copy
import gc
import pickle
import weakref

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


CHANGES = {
    "another submodule": lambda block: setattr(block.mlp, "norm", nn.Identity()),
    "another class": lambda block: setattr(block.mlp, "__class__", type("Own", (type(block.mlp),), {})),
    "another parameter": lambda block: setattr(block.norm1, "bias", nn.Parameter(block.norm1.bias.detach().clone())),
    "no parameter": lambda block: setattr(block.attn.proj, "bias", None),
    "an attribute": lambda block: setattr(block.attn, "num_heads", 4),
    "a new attribute": lambda block: setattr(block.mlp.fc2, "forward", block.mlp.fc2.forward),
    "a tensor as an attribute": lambda block: setattr(block.norm1, "eps", torch.ones(2)),
    "another mode": lambda block: block.mlp.drop1.train(not block.mlp.drop1.training),
    "another size of a dropout": lambda block: setattr(block.attn.proj_drop, "p", 0.25),
    "a hook": lambda block: block.mlp.fc2.register_forward_hook(lambda *_: None),
    "a hook before": lambda block: block.attn.qkv.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda block: block.norm2.register_full_backward_hook(lambda *_: None),
    "a compiled part": lambda block: block.mlp.compile(backend="eager"),
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


def reading_count(block):
    memory = block.__dict__.get(fused_block._MEMORY)
    return 0 if memory is None else len(memory.readings)


@each_family
def test_a_block_reads_itself_once_for_maps_alike(family, monkeypatch):
    _, block = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    expected = block(x)
    monkeypatch.setattr(fused_block, "_read", None)
    assert torch.equal(block(x), expected)


@each_family
def test_weights_that_change_act_at_once(family, ieee):
    stock, flash = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    flash(x)
    for block in (stock, flash):
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.mul_(1.5)
            block.attn.proj.bias = nn.Parameter(block.attn.proj.bias + 1)
            block.norm1.weight.data = block.norm1.weight.data + 1
    assert relative_error(flash(x), stock(x)) < 1e-4


@each_family
def test_weights_that_are_lent_for_one_call_act_in_it_alone_and_are_not_kept(family, ieee):
    stock, flash = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
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
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
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
        block(torch.randn(batch, *EVEN, C, device=KERNEL_DEVICE))
        assert 1 <= reading_count(block) <= 2


@each_family
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_starts_with_no_memory_and_is_right(family, duplicate):
    _, block = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    expected = block(x)
    copied = duplicate(block)
    assert reading_count(block) == 1 and reading_count(copied) == 0
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
    assert torch.equal(copied(x), expected)


def test_restore_leaves_nothing_behind():
    _, block = make_blocks("v1")
    names = set(vars(block))
    block(torch.randn(2, *EVEN, C, device=KERNEL_DEVICE))
    assert reading_count(block)
    timm_flashwin.restore(block)
    assert set(vars(block)) == names


def test_a_model_that_nobody_holds_is_freed():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224_flashwin", img_size=56, depths=(1,), num_heads=(1,), embed_dim=16
    )
    timm_flashwin.accelerate(model, impl="auto" if KERNEL_DEVICE == "cuda" else "triton")
    model.to(KERNEL_DEVICE)
    model(torch.randn(1, 3, 56, 56, device=KERNEL_DEVICE))
    block = model.layers[0].blocks[0]
    assert reading_count(block)
    block.mlp.register_forward_hook(lambda *_, holder=model: None)
    freed = weakref.ref(model)
    del model, block
    gc.collect()
    assert freed() is None
