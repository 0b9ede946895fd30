"""A Linear and the GELU after it in one kernel: exact, and taken in inference alone, where nobody could tell."""

import copy

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from test_own_modules import EVEN, FAMILIES, C, make_blocks
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from timm_flashwin import accelerate, functional, ops, restore
from timm_flashwin.kernels import launcher
from timm_flashwin.models import fused_block
from timm_flashwin.models.mlp import FlashMlp

HALF = torch.float16
EXTREMES = [0.0, 1e-30, 6.0, -6.0, 40.0, -40.0, float("inf"), float("-inf"), float("nan")]
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_operands(rows, in_features, out_features, dtype=HALF):
    x = torch.randn(rows, in_features, device=KERNEL_DEVICE)
    weight = torch.randn(out_features, in_features, device=KERNEL_DEVICE) * 1.5 * in_features**-0.5
    return [t.to(dtype) for t in (x, weight, torch.randn(out_features, device=KERNEL_DEVICE))]


def two_kernels(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


# ------------------------------------------------------------------------------------------------------ the operator


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "rows, in_features, out_features",
    [(25088, 512, 2048), (50177, 384, 1536), (70001, 128, 512), (90000, 96, 384), (40000, 200, 1000), (70000, 8, 8)],
)
def test_it_is_as_exact_as_two_kernels(rows, in_features, out_features, has_bias, dtype, poisoned):
    x, weight, bias = make_operands(rows, in_features, out_features, dtype)
    bias = bias if has_bias else None
    assert functional.has_linear_gelu(x.device, dtype, weight)
    assert ops._linear_gelu_kernel(x, weight, bias) is not None
    ours, theirs = ops.linear_gelu(x, weight, bias), two_kernels(x, weight, bias)
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() < 8 * torch.finfo(dtype).eps * theirs.abs().max()
    sample = torch.cat([torch.arange(500), torch.arange(rows - 500, rows), torch.randint(rows, (2000,))])
    exact = two_kernels(x[sample].double(), weight.double(), bias if bias is None else bias.double())
    assert relative_error(ours[sample], exact) <= 1.01 * relative_error(theirs[sample], exact)
    assert torch.equal(ops.linear_gelu(x, weight, bias), ours)


@pytest.mark.gpu
@each_dtype
def test_each_value_of_the_gelu_is_rounded_once(dtype):
    """Within half a unit of the last digit, and what the polynomial and float32 take."""
    x, weight, _ = make_operands(70000, 64, 64, dtype)
    for bias in torch.linspace(-8, 8, 64 * 100, device=KERNEL_DEVICE).to(dtype).view(100, 64):
        out, exact = ops.linear_gelu(x.zero_(), weight, bias)[0].double(), F.gelu(bias.double())
        assert ((out - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 2e-7).all()


@pytest.mark.gpu
@each_dtype
def test_its_extremes_are_those_of_two_kernels(dtype):
    x, weight, bias = make_operands(70000, 64, 64, dtype)
    bias[: len(EXTREMES)] = torch.tensor(EXTREMES)
    expected = two_kernels(x.zero_(), weight, bias)
    expected[:, EXTREMES.index(float("-inf"))] = 0.0  # the limit; PyTorch multiplies infinity by 0
    torch.testing.assert_close(ops.linear_gelu(x, weight, bias), expected, equal_nan=True)


@pytest.mark.gpu
def test_it_reads_what_is_neither_contiguous_nor_aligned():
    x, weight, bias = make_operands(70000, 64, 512)
    expected = ops.linear_gelu(x, weight, bias)
    odd = [torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (x, weight)]
    assert torch.equal(ops.linear_gelu(*odd, F.pad(bias, (1, 0))[1:]), expected)
    assert torch.equal(
        ops.linear_gelu(x.T.contiguous().T, weight.T.contiguous().T, bias.repeat(2, 1).T[:, 0]), expected
    )


@pytest.mark.gpu
def test_what_triton_cannot_compile_runs_in_two_kernels_and_is_logged_once(monkeypatch, caplog):
    from timm_flashwin.kernels import linear_gelu

    monkeypatch.setattr(linear_gelu, "compile_linear_gelu", lambda *_: 1 / 0)
    launcher.forget()
    for rows in (70000, 80000):
        operands = make_operands(rows, 64, 512)
        assert torch.equal(ops.linear_gelu(*operands), two_kernels(*operands))
    launcher.forget()
    assert caplog.text.count("division by zero") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_a_program_that_comes_to_another_gpu_runs_in_two_kernels(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    ops.linear_gelu_limits.cache_clear()
    operands = make_operands(70000, 64, 512)
    assert ops._linear_gelu_kernel(*operands) is None
    assert torch.equal(ops.linear_gelu(*operands), two_kernels(*operands))
    ops.linear_gelu_limits.cache_clear()


@pytest.mark.gpu
def test_wrong_operands_are_pytorchs_affair():
    x, weight, bias = make_operands(70000, 64, 512)
    assert torch.equal(ops.linear_gelu(x, weight, bias[:1]), two_kernels(x, weight, bias[:1]))
    for operands in ((x, weight[:, :32], bias), (x, weight.double(), bias), (x, weight, bias[:8])):
        with pytest.raises(RuntimeError):
            two_kernels(*operands)
        with pytest.raises(RuntimeError):
            ops.linear_gelu(*operands)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 7, 24), (0, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_few_rows_are_pytorchs(shape, has_bias):
    _, weight, bias = make_operands(1, 24, 96)
    x, bias = torch.randn(shape, device=KERNEL_DEVICE, dtype=HALF), bias if has_bias else None
    assert torch.equal(ops.linear_gelu(x, weight, bias), two_kernels(x, weight, bias))


def test_it_follows_autocast():
    x, weight, bias = make_operands(6, 24, 96, torch.float32)
    with torch.autocast(KERNEL_DEVICE, HALF):
        for linear_gelu in (ops.linear_gelu, torch.ops.timm_flashwin.linear_gelu):
            out, expected = linear_gelu(x, weight, bias), two_kernels(x, weight, bias)
            assert out.dtype == HALF and torch.equal(out, expected)
            assert torch.equal(linear_gelu(x, weight, None), two_kernels(x, weight, None))


@pytest.mark.parametrize("has_bias", [True, False])
def test_its_gradients_are_those_of_two_kernels(has_bias, ieee):
    x, weight, bias = [t.requires_grad_() for t in make_operands(6, 24, 96, torch.float32)]
    operands = [x, weight] + [bias] * has_bias
    do = torch.randn(6, 96, device=KERNEL_DEVICE)
    for linear_gelu in (ops.linear_gelu, torch.ops.timm_flashwin.linear_gelu):
        ours = torch.autograd.grad(linear_gelu(*operands, *[None] * (not has_bias)), operands, do)
        theirs = torch.autograd.grad(two_kernels(*operands, *[None] * (not has_bias)), operands, do)
        for our, their in zip(ours, theirs, strict=True):
            assert relative_error(our, their) < 1e-5


def test_opcheck_and_flops():
    operands = make_operands(6, 24, 96)
    torch.library.opcheck(torch.ops.timm_flashwin.linear_gelu.default, operands)
    with FlopCounterMode(display=False) as counter:
        torch.ops.timm_flashwin.linear_gelu(*operands)
    assert counter.get_total_flops() == 2 * 6 * 24 * 96


def test_who_has_no_kernel():
    def has(device, dtype, *shape):
        return functional.has_linear_gelu(torch.device(device), dtype, torch.empty(shape, device="meta"))

    assert not has("cpu", HALF, 512, 128)
    assert not has(KERNEL_DEVICE, torch.float32, 512, 128)  # cuBLAS has TF32
    assert not has(KERNEL_DEVICE, HALF, 4096, 1024)  # its rows would not fit
    assert not has(KERNEL_DEVICE, HALF, 512, 100)  # TMA takes multiples of 16 bytes
    assert not has(KERNEL_DEVICE, HALF, 513, 128)


# --------------------------------------------------------------------------------------------------------- in models


@pytest.fixture
def served(monkeypatch):
    """As if there were a kernel everywhere: on a CPU, and for a few rows, the operator is PyTorch's two."""
    monkeypatch.setattr(functional, "_INFERENCE_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(functional, "_linear_gelu_limits", functional._constant(lambda device, dtype: (512, 2)))
    monkeypatch.setattr(fused_block, "linear_gelu_pays", lambda x, out_features: True)


def calls(function) -> int:
    """How often `function` calls the operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.name == "timm_flashwin::linear_gelu" for event in profile.events())


def make_half_block(family):
    """On the kernels; in half precision, which the interpreter knows as float16."""
    _, flash = make_blocks(family)
    return flash.half(), torch.randn(2, *EVEN, C, device=KERNEL_DEVICE, dtype=HALF)


@each_family
def test_inference_takes_it_once_a_block_and_training_never(family, served):
    flash, x = make_half_block(family)
    with torch.no_grad():
        assert calls(lambda: flash(x)) == 1
        flash.attn.proj.register_forward_hook(lambda *_: None)  # the block calls its modules
        assert calls(lambda: flash(x)) == 1
    assert calls(lambda: flash(x)) == 0
    flash.requires_grad_(False)
    assert calls(lambda: flash(x)) == 1 and calls(lambda: flash(x.requires_grad_())) == 0


@each_family
@pytest.mark.parametrize("autocast", [False, True])
def test_its_block_is_timms(family, autocast, served, ieee):
    stock, flash = make_blocks(family)
    x = torch.randn(2, *EVEN, C, device=KERNEL_DEVICE)
    if not autocast:
        stock, flash, x = stock.half(), flash.half(), x.half()
    with torch.no_grad(), torch.autocast(KERNEL_DEVICE, HALF, enabled=autocast):
        ours, timms = flash(x), stock(x)
    exact = copy.deepcopy(stock).double()(x.double())
    assert relative_error(ours, exact) < 2 * relative_error(timms, exact) + torch.finfo(HALF).eps


def make_mlps():
    """timm's and ours, with the same weights."""
    stock = Mlp(24, 96).to(KERNEL_DEVICE, HALF).eval()
    flash = copy.deepcopy(stock)
    flash.__class__ = FlashMlp
    return stock, flash, torch.randn(2, 5, 24, device=KERNEL_DEVICE, dtype=HALF)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_mlp_takes_it_in_inference(dynamic, served):
    stock, flash, x = make_mlps()
    compiled = torch.compile(flash, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stock(x))
        assert calls(lambda: compiled(x)) == 1
    compiled(x)
    assert calls(lambda: compiled(x).sum().backward()) == 0


def test_integers_are_refused_under_autocast_as_by_timms(served):
    stock, flash, x = make_mlps()
    with torch.no_grad(), torch.autocast(KERNEL_DEVICE, HALF):
        for module in (stock, flash):
            with pytest.raises(RuntimeError, match="dtype"):
                module(x.int())


def test_weights_may_be_inputs_of_a_dynamic_graph(served):
    stock, flash, x = make_mlps()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def call(weights, x):
        return torch.func.functional_call(flash, weights, x)

    with torch.no_grad():
        torch.testing.assert_close(call(dict(flash.named_parameters()), x), stock(x))


def test_weights_of_another_class_are_not_handed_to_it_by_a_compiler(served):
    stock, flash, x = make_mlps()
    flash.fc1.weight = nn.Parameter(TwoTensor(flash.fc1.weight.detach(), flash.fc1.weight.detach()))
    compiled = torch.compile(flash, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).a if type(compiled(x)) is TwoTensor else compiled(x), stock(x))


def test_a_compiled_mlp_on_meta_is_left_alone():
    _, flash, x = make_mlps()
    with torch.no_grad():
        assert torch.compile(flash.to("meta"), backend="eager")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_mlp_takes_it_and_can_be_trained(strict, served):
    stock, flash, x = make_mlps()
    with torch.no_grad():
        program = torch.export.export(flash, (x,), strict=strict)
    assert "timm_flashwin.linear_gelu" in str(program.graph)
    module = program.module()
    torch.testing.assert_close(module(x), stock(x))
    module(x).float().sum().backward()
    stock(x).float().sum().backward()
    grads = dict(stock.named_parameters())
    for name, parameter in module.named_parameters():
        assert relative_error(parameter.grad, grads[name].grad) < 4e-3


LEFT_ALONE = {
    "an impl of plain PyTorch": lambda module: setattr(module, "impl", "reference"),
    "another activation": lambda module: setattr(module, "act", nn.ReLU()),
    "a hook on the activation": lambda module: module.act.register_forward_hook(lambda *_: None),
    "a hook on the first Linear": lambda module: module.fc1.register_forward_hook(lambda *_: None),
    "training mode": lambda module: module.train(),
    "a norm in between": lambda module: setattr(module, "norm", nn.LayerNorm(96, device=KERNEL_DEVICE, dtype=HALF)),
    "active dropout": lambda module: setattr(module.drop1.train(), "p", 0.5),
    "a Linear of another kind": lambda module: setattr(
        module, "fc1", nn.utils.parametrizations.weight_norm(module.fc1)
    ),
}


@pytest.mark.parametrize("change", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_an_mlp_that_is_not_timms_keeps_timms_code(change, served):
    module = Mlp(24, 96).to(KERNEL_DEVICE, HALF).eval().requires_grad_(False)
    module.__class__ = FlashMlp
    x = torch.randn(2, 5, 24, device=KERNEL_DEVICE, dtype=HALF)
    assert calls(lambda: module(x)) == 1
    change(module)
    assert calls(lambda: module(x)) == 0


def test_accelerate_gives_its_impl_to_the_mlp_and_restore_takes_the_mlp_back():
    stock, flash = make_blocks("v1")
    accelerate(nn.ModuleList([flash.mlp, flash]), impl="reference")  # the MLP comes first
    assert type(flash.mlp) is FlashMlp and flash.mlp.impl == "reference"
    accelerate(flash)
    assert flash.mlp.impl == "auto"
    restore(flash)
    assert type(flash.mlp) is Mlp and "impl" not in vars(flash.mlp)


def test_a_block_that_was_accelerated_before_there_was_a_flash_mlp_gets_one():
    _, flash = make_blocks("v1")
    flash.mlp.__class__ = Mlp
    report = accelerate(flash)
    assert report.replaced == {"mlp": "FlashMlp"} and report.already
    assert type(flash.mlp) is FlashMlp
