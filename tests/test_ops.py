"""The operators are good citizens of PyTorch: schema, fake kernels, autograd and compile."""

import importlib
import subprocess
import sys

import pytest
import torch
from conftest import GPU

import timm_flashwin


def map_arguments(device, window=(4, 4), requires_grad=True, save_stats=False, cosine=False):
    area = window[0] * window[1]
    qkv = torch.randn(1, 6, 9, 3 * 32, device=device, requires_grad=requires_grad)
    bias = torch.randn(2, area, area, device=device, requires_grad=requires_grad)
    pad = torch.randn(3 * 32, device=device, requires_grad=requires_grad)
    logit_scale = torch.rand(2, device=device, requires_grad=requires_grad) if cosine else None
    return qkv, bias, pad, logit_scale, 2, window, (2, 1), 0.25, save_stats


def windows_arguments(device, N=16, save_stats=False, cosine=False):
    q, k, v = (torch.randn(2, 2, N, 16, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, N, N, device=device, requires_grad=True)
    logit_scale = torch.rand(2, device=device, requires_grad=True) if cosine else None
    return q, k, v, bias, torch.randn(2, N, N, device=device), logit_scale, 0.25, save_stats


@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("save_stats, window", [(False, (4, 4)), (True, (9, 8))])
def test_opcheck_of_window_attention(save_stats, window, cosine, kernel_device, ieee):
    arguments = map_arguments(kernel_device, window, save_stats=save_stats, cosine=cosine)
    torch.library.opcheck(torch.ops.timm_flashwin.window_attention.default, arguments)


@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@pytest.mark.parametrize("save_stats, N", [(False, 16), (True, 72)])
def test_opcheck_of_windowed_sdpa(save_stats, N, cosine, kernel_device, ieee):
    arguments = windows_arguments(kernel_device, N, save_stats, cosine)
    torch.library.opcheck(torch.ops.timm_flashwin.windowed_sdpa.default, arguments)


@pytest.mark.parametrize("of_pairs, bounded", [(False, True), (True, False)], ids=["v2", "v2_cr"])
def test_opcheck_of_continuous_position_table(of_pairs, bounded, kernel_device, ieee):
    Wh, Ww, hidden, num_heads = 3, 4, 24, 3
    rows = (Wh * Ww) ** 2 if of_pairs else (2 * Wh - 1) * (2 * Ww - 1)
    coordinates = torch.randn(rows, 2, device=kernel_device)
    shapes = (hidden, 2), (hidden,), (num_heads, hidden), (num_heads,)
    *parameters, bias2 = (torch.randn(shape, device=kernel_device, requires_grad=True) for shape in shapes)
    arguments = coordinates, *parameters, bias2 if of_pairs else None, (Wh, Ww), bounded, torch.float32
    torch.library.opcheck(torch.ops.timm_flashwin.continuous_position_table.default, arguments)


def test_double_backward_raises(kernel_device):
    qkv = torch.randn(1, 4, 4, 3 * 16, device=kernel_device, requires_grad=True)
    out = timm_flashwin.window_attention(qkv, 1, 4, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), qkv)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_compiles_without_a_graph_break_forward_and_backward(impl, kernel_device, ieee):
    def function(qkv, bias):
        return timm_flashwin.window_attention(qkv * 2, 2, (4, 3), (2, 1), bias, impl=impl).square().sum()

    torch._dynamo.reset()
    # Inductor is for the GPU: compiling C++ for a handful of loops would take longer than the whole test suite.
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    qkv = torch.randn(2, 6, 7, 3 * 32, device=kernel_device, requires_grad=True)
    bias = torch.randn(2, 12, 12, device=kernel_device, requires_grad=True)
    expected = torch.autograd.grad(function(qkv, bias), (qkv, bias))
    actual = torch.autograd.grad(compiled(qkv, bias), (qkv, bias))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_compiles_under_autocast(kernel_device):
    def function(qkv):
        with torch.autocast(kernel_device, torch.float16):
            return timm_flashwin.window_attention(qkv, 2, 4, 2, impl="triton")

    torch._dynamo.reset()
    qkv = torch.randn(1, 8, 8, 3 * 32, device=kernel_device)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(qkv)
    assert out.dtype == torch.float16 and torch.equal(out, function(qkv))


def test_compiles_where_sizes_become_dynamic(kernel_device):
    def function(q, k, v):
        return timm_flashwin.windowed_sdpa(q, k, v, impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for B_, N in ((4, 16), (6, 25), (2, 9)):
        qkv = [torch.randn(B_, 2, N, 16, device=kernel_device) for _ in range(3)]
        torch.testing.assert_close(compiled(*qkv), function(*qkv))


def test_both_switches_of_torch_choose_the_precision_of_float32():
    launch = importlib.import_module("timm_flashwin.kernels.launch")
    code = """
import torch, timm_flashwin.kernels.launch as launch
matmul = torch.backends.cuda.matmul
if hasattr(matmul, "fp32_precision"):
    matmul.fp32_precision = "tf32"
    assert launch.dot_precision(torch.float32) == "tf32"
    matmul.fp32_precision = "ieee"
assert launch.dot_precision(torch.float32) == "ieee"
assert launch.dot_precision(torch.bfloat16) == "ieee"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert launch.dot_precision(torch.float32) == "tf32"
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("N", [16, 72], ids=["one tile", "several tiles"])
def test_a_hook_may_give_saved_tensors_back_in_another_layout(N, kernel_device, ieee):
    q, k, v, bias, *_ = windows_arguments(kernel_device, N)

    def grads():
        return torch.autograd.grad(timm_flashwin.windowed_sdpa(q, k, v, bias, impl="triton").square().sum(), (q, k, v))

    expected = grads()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x
    ):
        actual = grads()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
