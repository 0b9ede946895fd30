"""Pairs of models, timm's and its twin, with the same weights: how the tests make them, and how they compare them."""

import timm
import torch
from conftest import GPU, KERNEL_DEVICE
from judge import relative_error
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock

import timm_flashwin  # noqa: F401  (registers the names)
from timm_flashwin.models.accelerate import accelerate


def make_pair(name="swin_tiny_patch4_window7_224", flash_name=None, **kwargs):
    """(stock, flashwin) with the same random weights, on the device the kernels run on here."""
    stock = timm.create_model(name, **kwargs).to(KERNEL_DEVICE)
    flash = timm.create_model(flash_name or name + "_flashwin", **kwargs).to(KERNEL_DEVICE)
    with torch.no_grad():
        for parameter in stock.parameters():  # no zero biases, no tiny tables: every term has to count
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for block in blocks(stock):
            if isinstance(block, SwinTransformerV2Block | SwinTransformerV2CrBlock):
                make_attention_count(block)
    flash.load_state_dict(stock.state_dict(), strict=True)
    return stock, flash


def make_attention_count(block):
    """V2 starts with branches of weight 0, one scale for all heads and a flat bias."""
    block.norm1.weight.add_(1)
    block.norm2.weight.add_(1)
    block.attn.logit_scale.uniform_(1, 5)
    if any(block.shift_size):
        block.attn.logit_scale[0] = 4.8  # above log(100), where timm clamps it
    mlp = block.attn.cpb_mlp if isinstance(block, SwinTransformerV2Block) else block.attn.meta_mlp
    for parameter in mlp.parameters():
        parameter.normal_(std=0.15)


def blocks(model):
    return [module for module in model.modules() if hasattr(module, "attn")]


def use(model, impl):
    """Choose the implementation; only some blocks of a large model go through the (slow) interpreter."""
    if impl == "triton" and not GPU:
        accelerate(model, impl="reference")
        for stage in model.stages if hasattr(model, "stages") else model.layers:
            accelerate(stage.blocks[-2:], impl="triton")
    else:
        accelerate(model, impl=impl)


def compare(stock, flash, x, tolerance=1e-4):
    """Outputs and the gradients of all parameters and of the input."""
    results = []
    for model in (stock, flash):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        (out * weight).sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((out, inputs.grad, grads))
    (out, dx, grads), (flash_out, flash_dx, flash_grads) = results
    assert relative_error(flash_out, out) < tolerance
    assert relative_error(flash_dx, dx) < tolerance
    for name, grad in grads.items():
        if name.endswith("meta_mlp.fc2.bias"):  # no softmax feels it: 0 but for rounding, in both
            assert flash_grads[name].norm() <= tolerance * flash_grads[name.replace("bias", "weight")].norm(), name
        elif grad is None or grad.norm() < 1e-12:
            assert flash_grads[name] is None or flash_grads[name].norm() < 1e-12, name
        else:
            error = relative_error(flash_grads[name], grad)
            assert error < 10 * tolerance, f"{name}: {error:.1e}"
