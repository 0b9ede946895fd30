"""What somebody put into a block of timm's, or onto a module of it, acts on the kernels as it does in timm."""

import copy
import io
import itertools

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from pairs import compare, make_attention_count
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import nn

import timm_flashwin

C, WINDOW = 16, 4
EVEN, PADDED = (8, 8), (7, 6)


def make_v1(**options):
    return swin_transformer.SwinTransformerBlock(C, EVEN, num_heads=2, window_size=WINDOW, shift_size=2, **options)


def make_v2(**options):
    return swin_transformer_v2.SwinTransformerV2Block(C, EVEN, num_heads=2, window_size=WINDOW, shift_size=2, **options)


def make_v2_cr(**options):
    return swin_transformer_v2_cr.SwinTransformerV2CrBlock(C, 2, EVEN, (WINDOW, WINDOW), (2, 2), **options)


FAMILIES = dict(v1=make_v1, v2=make_v2, v2_cr=make_v2_cr)


class Rescaled(nn.Module):
    """By a factor a channel."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()
        self.factor = nn.Parameter(torch.linspace(-1, 2, C, device=KERNEL_DEVICE))

    def forward(self, x):
        return self.inner(x) * self.factor


class AlwaysDrops(nn.Dropout):
    def forward(self, x):
        return x * (1 - self.p)


class OwnPrecision(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return 2 * self.inner(x)


def after(module, function):
    """Give the instance a forward of its own."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: function(forward(*args, **kwargs))


def patch_attention(block):
    forward = block.attn.forward
    block.attn.forward = lambda x, mask=None: forward(x, mask) * 2


def in_place_of(path, make):
    def change(block):
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, make(block.get_submodule(path)))

    return change


CHANGES = {
    "an adapter after the MLP": in_place_of("mlp.drop2", lambda _: Rescaled()),
    "a dropout that is never off": in_place_of("mlp.drop1", lambda _: AlwaysDrops(0.25)),
    "another attention dropout": in_place_of("attn.attn_drop", lambda _: AlwaysDrops(0.25)),
    "an attention's own forward": patch_attention,
    "a wrapped MLP": in_place_of("mlp", Rescaled),
}
CHANGES_OF_V1 = {
    "a wrapped qkv": in_place_of("attn.qkv", OwnPrecision),  # V2 takes its weight alone
    "another softmax": in_place_of("attn.softmax", lambda _: nn.Softmax(dim=-2)),
    "a softmax's own forward": lambda block: after(block.attn.softmax, lambda weights: weights.square()),
    "a qkv's own forward": lambda block: after(block.attn.qkv, lambda qkv: qkv + 1),
    "a trained scale": lambda block: setattr(block.attn, "scale", nn.Parameter(torch.ones((), device=KERNEL_DEVICE))),
    "a negative scale": lambda block: setattr(block.attn, "scale", -0.5),
}


def make_blocks(family, size=EVEN, change=lambda block: None, used_before=False):
    torch.manual_seed(3)
    stock = FAMILIES[family](dynamic_mask=size != EVEN)  # else timm makes the mask for the size it is told
    stock.to(KERNEL_DEVICE).eval()  # V2-CR's position MLP has a dropout
    if family == "v1":
        stock.attn.fused_attn = False
    else:
        with torch.no_grad():
            make_attention_count(stock)
    flash = copy.deepcopy(stock)
    timm_flashwin.accelerate(flash, impl="auto" if KERNEL_DEVICE == "cuda" else "triton")
    if used_before:
        flash(torch.randn(2, *size, C, device=KERNEL_DEVICE, requires_grad=True))
    for block in (stock, flash):
        torch.manual_seed(4)
        change(block)
    return stock, flash


def refuse_nothing(flash):
    """impl="triton" refuses what the kernels cannot do; timm's code serves it under "auto"."""
    flash.attn.__dict__.pop("impl", None)


@pytest.mark.parametrize("size, used_before", [(EVEN, False), (EVEN, True), (PADDED, False)])
@pytest.mark.parametrize(
    "family, name", [*itertools.product(FAMILIES, CHANGES), *itertools.product(["v1"], CHANGES_OF_V1)]
)
def test_a_change_acts_as_in_timm(family, name, size, used_before, ieee):
    stock, flash = make_blocks(family, size, (CHANGES | CHANGES_OF_V1)[name], used_before)
    x = torch.randn(2, *size, C, device=KERNEL_DEVICE)
    try:
        flash(x)
    except ValueError as refusal:
        assert "triton" in str(refusal)
        refuse_nothing(flash)
    compare(stock, flash, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projection_with_a_state_takes_one_step_a_call(family, ieee):
    stock, flash = make_blocks(family, PADDED, lambda block: nn.utils.spectral_norm(block.attn.qkv))
    x = torch.randn(2, *PADDED, C, device=KERNEL_DEVICE)
    for block in (stock.train(), flash.train()):
        block(x)
    assert relative_error(flash.attn.qkv.weight_u, stock.attn.qkv.weight_u) < 1e-5


@pytest.mark.parametrize("path", ["mlp", "mlp.fc1", "attn.qkv"])
def test_a_part_with_an_autocast_of_its_own_gets_timms_dtype(path, ieee):
    stock, flash = make_blocks("v1", EVEN, in_place_of(path, OwnPrecision))
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    with torch.autocast(x.device.type, dtype=torch.float16):
        assert relative_error(flash(x), stock(x)) < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_may_come_in_batches(family, ieee):
    stock, flash = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    grads = []
    for block in (stock, flash):
        out = block(x)
        batch = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        grads.append(torch.autograd.grad(out, list(block.mlp.parameters()), batch, is_grads_batched=True))
    assert all(relative_error(b, a) < 1e-5 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_in_grad_mode_can_be_saved(family):
    _, flash = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    torch.jit.save(torch.jit.trace(flash, x, check_trace=False), io.BytesIO())


@pytest.mark.parametrize("mask", [torch.ones(4, 16, 16, dtype=torch.bool), nn.Parameter(torch.randn(4, 16, 16))])
def test_a_mask_of_truths_or_to_be_trained_is_timms_affair(mask, ieee):
    stock, flash = make_blocks("v1")
    refuse_nothing(flash)
    windows, mask = torch.randn(8, 16, C, device=KERNEL_DEVICE), mask.detach().to(KERNEL_DEVICE)
    mask.requires_grad_(mask.is_floating_point())
    outs = [block.attn(windows, mask) for block in (stock, flash)]
    assert relative_error(*outs[::-1]) < 1e-5
    if mask.requires_grad:
        grads = [torch.autograd.grad(out.square().sum(), mask)[0] for out in outs]
        assert relative_error(*grads[::-1]) < 1e-5
