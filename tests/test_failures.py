"""What goes wrong is an error that names its cause, or a fallback that logs it, and leaves nothing broken behind.

Triton missing or broken at its import: test_import.py. What functional.py refuses: test_functional.py.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch

import timm_flashwin  # noqa: F401  (registers the *_flashwin names)
from timm_flashwin import window_attention, windowed_sdpa

both_kernels = pytest.mark.parametrize("window", [(4, 4), (9, 8)], ids=["one tile", "several tiles"])

# Triton finds an sm_90 to compile for, whatever this machine has.
AS_ON_A_GPU = """
import contextlib, logging, torch, triton
from triton.backends.compiler import GPUTarget
from timm_flashwin import functional

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_name = lambda device: "a GPU"
call = torch.device("cuda", 0), torch.float16, 32, 49
"""
USE_ON_A_GPU = """
import logging, sys, timm, torch, timm_flashwin
logging.basicConfig(stream=sys.stdout, format="%(message)s")
model = timm.create_model("swin_tiny_flashwin", img_size=32, embed_dim=32, num_heads=(1, 1, 1, 1), num_classes=3).cuda()
with torch.autocast("cuda"):
    model(torch.randn(1, 3, 32, 32, device="cuda")).float().sum().backward()
try:
    timm_flashwin.window_attention(torch.randn(1, 8, 8, 96, device="cuda"), 1, 4, impl="triton")
except ValueError as error:
    print("triton:", error)
"""


def run(code, **environment):
    """What `code` prints in a fresh process, where Triton compiles instead of interpreting."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def no_folder(tmp_path) -> str:
    """A place where nobody can make a folder, not even root: inside a file."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "cache")


# ------------------------------------------------------------------------------------- Triton that cannot compile


def test_a_gpu_that_triton_compiles_for_gets_the_kernels_and_is_asked_once_for_each_dtype(tmp_path):
    code = """
        from timm_flashwin.kernels import probe
        device, dtype, *sizes = call
        compile_error, asked = probe.compile_error, []
        probe.compile_error = lambda *args: asked.append(args) or compile_error(*args)
        for dtype in (torch.float16, torch.float32, torch.float16):
            assert functional.fallback_reason(device, dtype, *sizes) is None
        assert asked == [(device, torch.float16), (device, torch.float32)], asked
    """
    run(AS_ON_A_GPU + textwrap.dedent(code), TRITON_CACHE_DIR=str(tmp_path))


def test_where_triton_cannot_compile_auto_falls_back_with_the_reason_and_triton_raises_it(tmp_path):
    code = """
        logging.basicConfig(stream=__import__("sys").stdout, format="%(levelname)s %(message)s")
        for _ in range(2):
            assert not functional._use_kernels("auto", *call)
        try:
            functional._use_kernels("triton", *call)
        except ValueError as error:
            print("triton:", error)
    """
    warning, error = run(AS_ON_A_GPU + textwrap.dedent(code), TRITON_CACHE_DIR=no_folder(tmp_path)).splitlines()
    cause = "Triton cannot compile for a GPU (NotADirectoryError"
    assert warning.startswith(f"WARNING window attention runs in plain PyTorch: {cause}")
    assert error.startswith(f'triton: impl="triton" cannot run here: {cause}')


@pytest.mark.gpu
@pytest.mark.parametrize("lacking", ["a C compiler", "a folder for the cache"])
def test_a_model_trains_on_a_gpu_where_triton_lacks(lacking, tmp_path):
    if lacking == "a C compiler":
        output = run(USE_ON_A_GPU, TRITON_CACHE_DIR=str(tmp_path), CC="/no/compiler", PATH="/no/programs")
    else:
        output = run(USE_ON_A_GPU, TRITON_CACHE_DIR=no_folder(tmp_path))
    assert "window attention runs in plain PyTorch: Triton cannot compile for" in output
    assert 'triton: impl="triton" cannot run here: Triton cannot compile for' in output


def test_where_no_gpu_is_visible_models_run_and_triton_says_why_it_does_not():
    code = """
        import timm, torch, timm_flashwin
        model = timm.create_model("swin_tiny_flashwin", img_size=32, embed_dim=32, num_heads=(1, 1, 1, 1))
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
        try:
            timm_flashwin.window_attention(torch.randn(1, 8, 8, 96), 1, 4, impl="triton")
        except ValueError as error:
            print(error)
    """
    assert "the tensors are on 'cpu', and the kernels run on CUDA and ROCm GPUs" in run(code, CUDA_VISIBLE_DEVICES="")


# ------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("name", ["pad_qkv", "logit_scale"])
def test_a_tensor_of_another_device_than_the_map_is_named(name):
    stray = torch.zeros(96 if name == "pad_qkv" else 2, device="meta")
    with pytest.raises(TypeError, match=f"{name} is on meta and the activations on cpu; move them to one device"):
        window_attention(torch.zeros(1, 8, 8, 96), 2, 4, **{name: stray})


@pytest.mark.parametrize("name", ["k", "v", "bias", "mask"])
def test_a_tensor_of_another_device_than_q_is_named(name):
    shape = (4, 16, 16) if name == "mask" else (2, 16, 16) if name == "bias" else (4, 2, 16, 16)
    good = {x: torch.zeros(4, 2, 16, 16) for x in "qkv"}
    with pytest.raises(TypeError, match=f"{name} is on meta and the activations on cpu; move them to one device"):
        windowed_sdpa(**good | {name: torch.zeros(shape, device="meta")})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_kernels
def test_a_call_runs_on_the_device_of_its_tensors_whichever_is_current(window):
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        qkv = torch.randn(2, 9, 16, 96).to(device).requires_grad_()
        with torch.cuda.device(0):
            out = window_attention(qkv, 2, window, 2, impl="triton")
            (grad,) = torch.autograd.grad(out.square().sum(), qkv)
            assert torch.cuda.current_device() == 0
        assert out.device == grad.device == torch.device(device)
        results.append((out.cpu(), grad.cpu()))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there)


# ------------------------------------------------------------------------------------------------------ autograd


def make_inputs(window, device):
    """A padded map under cosine attention, and all that goes with it."""
    (Wh, Ww), N = window, window[0] * window[1]
    shapes = dict(qkv=(1, Wh, Ww - 1, 96), bias=(2, N, N), pad_qkv=(96,), logit_scale=(2,))
    return {name: torch.randn(shape, device=device, requires_grad=True) for name, shape in shapes.items()}


@both_kernels
def test_a_gradient_finds_its_way_through_a_view_that_is_no_leaf(window, kernel_device, ieee):
    inputs = make_inputs(window, kernel_device)
    leaf = torch.randn(1, window[1] - 1, window[0], 100, device=kernel_device, requires_grad=True)
    grads = []
    for impl in ("triton", "reference"):
        inputs["qkv"] = leaf.transpose(1, 2)[..., 3:99]
        out = window_attention(num_heads=2, window_size=window, **inputs, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@both_kernels
@pytest.mark.parametrize("name", ["qkv", "bias", "pad_qkv", "logit_scale"])
def test_an_input_modified_between_forward_and_backward_is_pytorchs_own_error(name, window, kernel_device):
    inputs = make_inputs(window, kernel_device)
    inputs[name] = inputs[name] * 1  # a leaf cannot be modified in place
    out = window_attention(num_heads=2, window_size=window, **inputs, impl="triton")
    inputs[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@both_kernels
def test_an_output_modified_in_place_is_an_error_only_where_the_backward_reads_it(window, kernel_device):
    inputs = make_inputs(window, kernel_device)
    out = window_attention(num_heads=2, window_size=window, **inputs, impl="triton")
    (expected,) = torch.autograd.grad(out.sum() * 2, inputs["qkv"], retain_graph=True)
    doubled = out.mul_(2).sum()
    if window == (4, 4):  # one tile: everything is made again from the inputs
        torch.testing.assert_close(torch.autograd.grad(doubled, inputs["qkv"])[0], expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            doubled.backward()


# -------------------------------------------------------------------------------------------------------- memory


@pytest.mark.gpu
def test_a_model_that_ran_out_of_memory_works_on():
    model = timm.create_model("swin_tiny_flashwin", num_classes=10).cuda().eval()
    images = torch.randn(2, 3, 224, 224, device="cuda")
    before = model(images)
    before.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            model(images.repeat(512, 1, 1, 1)).sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model.zero_grad()
    after = model(images)
    after.sum().backward()
    torch.testing.assert_close(after, before)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
