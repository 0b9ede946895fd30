"""The norms of a block and the residual adds beside them: timm's numbers, its random draws, and who is left alone."""

import pytest
import timm
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from pairs import make_pair
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from timm_flashwin import accelerate, ops
from timm_flashwin.models import norms

HALF = torch.float16
DTYPES = {"float32": (torch.float32, torch.float32), "autocast": (torch.float32, HALF), "half": (HALF, HALF)}
each_dtype = pytest.mark.parametrize("x_dtype, y_dtype", DTYPES.values(), ids=DTYPES)
each_width = pytest.mark.parametrize("C", [96, 128, 200])
each_scale = pytest.mark.parametrize("scales", [None, [0.0, 1.25, 1.25]], ids=["whole", "stochastic depth"])


def make_inputs(C, x_dtype, y_dtype, scales):
    x = torch.randn(3, 5, 4, C, device=KERNEL_DEVICE, dtype=x_dtype)
    y = (2 * torch.randn(3, 5, 4, C, device=KERNEL_DEVICE) + 3).to(y_dtype)
    weight, bias = torch.randn(2, C, device=KERNEL_DEVICE)
    scale = None if scales is None else torch.tensor(scales, device=KERNEL_DEVICE, dtype=y_dtype)
    return [t.requires_grad_() for t in (x, y, weight, bias)], scale


def scaled(y, scale):
    return y if scale is None else y * scale.double().view(-1, 1, 1, 1)


def check(function, reference, inputs):
    """Outputs and gradients against float64; half precision may be a few roundings off."""
    outs = function(*inputs)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exacts = reference(*doubles)
    dos = [torch.randn_like(out) for out in outs]
    grads = torch.autograd.grad(outs, inputs, dos)
    exact_grads = torch.autograd.grad(exacts, doubles, [do.double() for do in dos])
    for our, exact in zip([*outs, *grads], [*exacts, *exact_grads], strict=True):
        least = min((t.dtype for t in (*outs, *inputs)), key=lambda dtype: torch.finfo(dtype).bits)
        assert relative_error(our, exact) < 4 * torch.finfo(least).eps


@each_dtype
@each_width
@each_scale
def test_the_sum_its_norm_and_every_gradient_are_exact(C, x_dtype, y_dtype, scales, poisoned):
    inputs, scale = make_inputs(C, x_dtype, y_dtype, scales)

    def reference(x, y, weight, bias):
        total = x + scaled(y, scale)
        return total, F.layer_norm(total, (C,), weight, bias, 1e-5)

    check(lambda x, y, w, b: ops.add_layer_norm(x, y, scale, w, b, 1e-5, y_dtype), reference, inputs)


@each_dtype
@each_width
@each_scale
def test_the_sum_with_the_norm_and_every_gradient_are_exact(C, x_dtype, y_dtype, scales, poisoned):
    inputs, scale = make_inputs(C, x_dtype, y_dtype, scales)

    def reference(x, y, weight, bias):
        return (x + scaled(F.layer_norm(y, (C,), weight, bias, 1e-5), scale),)

    check(lambda x, y, w, b: (ops.layer_norm_add(x, y, scale, w, b, 1e-5, x_dtype),), reference, inputs)


def test_a_norm_alone_reads_what_is_not_contiguous(poisoned):
    x = torch.randn(2, 96, 5, 4, device=KERNEL_DEVICE).permute(0, 2, 3, 1)
    norm = nn.LayerNorm(96, device=KERNEL_DEVICE)
    torch.testing.assert_close(norms.layer_norm(norm, x, into_linear=True), norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_are_rows(rows):
    x = torch.randn(rows, 96, device=KERNEL_DEVICE, requires_grad=True)
    norm = nn.LayerNorm(96, device=KERNEL_DEVICE)
    out = norms.layer_norm_add(norm, x, x, nn.Identity())
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape and torch.isfinite(norm.weight.grad).all()


@pytest.mark.parametrize("arch", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_stochastic_depth_drops_what_timms_drops(arch, ieee):
    narrow = dict(img_size=64, window_size=4, embed_dim=16, depths=(2,), num_heads=(1,), num_classes=3)
    stock, flash = make_pair(arch, **narrow, drop_path_rate=0.5)
    accelerate(flash, impl="triton")
    x = torch.randn(4, 3, 64, 64, device=KERNEL_DEVICE)
    outs = []
    for model in (stock.train(), flash.train()):
        torch.manual_seed(1)
        outs.append(model(x))
    assert relative_error(outs[1], outs[0]) < 1e-4


@pytest.mark.parametrize("norm_first", [False, True], ids=["add, then norm", "norm, then add"])
def test_under_autocast_samples_are_scaled_in_the_dtype_in_which_timm_scales_them(norm_first):
    norm, drop_path = nn.LayerNorm(96, device=KERNEL_DEVICE), DropPath(0.1).train()  # 1 / 0.9 is another number in half
    x, y = torch.randn(8, 6, 96, device=KERNEL_DEVICE), torch.randn(8, 6, 96, device=KERNEL_DEVICE, dtype=HALF)
    with torch.autocast(KERNEL_DEVICE, HALF):
        torch.manual_seed(0)
        expected = x + drop_path(norm(y.float()) if norm_first else y)  # float32 as on a GPU, where autocast sees to it
        torch.manual_seed(0)
        if norm_first:
            ours = norms.layer_norm_add(norm, x, y, drop_path)
        else:
            ours, _ = norms.add_layer_norm(norm, x, y, drop_path, into_linear=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def make_block():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1,), num_heads=(1,), embed_dim=16)
    accelerate(model, impl="triton")
    return model.to(KERNEL_DEVICE).layers[0].blocks[0], torch.randn(1, 14, 14, 16, device=KERNEL_DEVICE)


def test_a_plain_block_is_fused():
    assert norms.fuses_norms(*make_block())


LEFT_ALONE = {
    "a norm of somebody's own": lambda block: setattr(block, "norm1", nn.GroupNorm(1, 16)),
    "a norm without weights": lambda block: setattr(block, "norm2", nn.LayerNorm(16, elementwise_affine=False)),
    "a hook on a norm": lambda block: block.norm2.register_forward_hook(lambda *_: None),
    "a norm over more than the channels": lambda block: setattr(block, "norm1", nn.LayerNorm((14, 14, 16))),
    "a backward hook on a norm": lambda block: block.norm1.register_full_backward_hook(lambda *_: None),
    "a forward of somebody's own": lambda block: setattr(block.norm2, "forward", block.norm2.forward),
    "a hook on stochastic depth": lambda block: block.drop_path1.register_forward_hook(lambda *_: None),
    "timm's fast norm": lambda block: setattr(block.norm1, "_fast_norm", True),
    "the reference": lambda block: accelerate(block, impl="reference"),
}


@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_a_block_that_is_not_timms_keeps_timms_code(change):
    block, x = make_block()
    change(block)
    assert not norms.fuses_norms(block, x)


@pytest.mark.skipif(KERNEL_DEVICE == "cuda", reason="float64 runs in the kernels in the interpreter alone")
def test_under_autocast_float64_stays_float64():
    block, x = make_block()
    with torch.autocast(KERNEL_DEVICE, HALF):
        assert block.double()(x.double()).dtype == torch.float64


def test_where_the_kernels_cannot_run_a_block_says_so():
    block, _ = make_block()
    x = torch.randn(
        1, 14, 14, 16, device=KERNEL_DEVICE, dtype=torch.float64 if KERNEL_DEVICE == "cuda" else torch.bfloat16
    )
    with pytest.raises(ValueError, match='impl="triton" cannot run here'):
        block.to(x.dtype)(x)
