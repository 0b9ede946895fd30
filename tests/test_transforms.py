"""torch.func, autograd's tools, counters and profilers take the operators as PyTorch's own, or an error says why."""

import copy

import pytest
import timm
import torch
from conftest import GPU, KERNEL_DEVICE
from judge import relative_error
from pairs import make_pair
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from timm_flashwin import accelerate, window_attention, windowed_sdpa

FAMILIES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]
SMALL = dict(img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(1,), num_classes=3, drop_path_rate=0.0)


def make_map(*batch):
    return torch.randn(*batch, 1, 6, 9, 2 * 3 * 16, device=KERNEL_DEVICE)


def attend(qkv, impl="triton"):
    return window_attention(qkv, 2, (4, 4), (2, 1), impl=impl)


def loss(qkv, impl="triton"):
    return attend(qkv, impl).square().sum()


# --------------------------------------------------------------------------------------------------- torch.func


def grad(function, x):
    return torch.func.grad(function)(x)


def vmap(function, x):
    return torch.vmap(function)(torch.stack([x, 2 * x]))


def per_sample(function, x):
    return torch.vmap(torch.func.grad(function))(torch.stack([x, 2 * x]))


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def hessian(function, x):
    return torch.func.jvp(torch.func.grad(function), (x,), (torch.ones_like(x),))[1]


def dual_numbers(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = [grad, vmap, per_sample, jvp, hessian, dual_numbers]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_operators_refuse_transforms_and_name_the_way_out(transform):
    """Under a dual level they would otherwise lose the tangents and say nothing."""
    windows = torch.randn(4, 2, 16, 8, device=KERNEL_DEVICE)
    for function, x in ((loss, make_map()), (lambda q: windowed_sdpa(q, q, q, impl="triton").sum(), windows)):
        with pytest.raises(ValueError, match='torch.func transform.*impl="auto" or impl="reference"'):
            transform(function, x)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_models_transform_as_timms_do(name, transform, ieee):
    stock, flash = make_pair(name, **SMALL)
    accelerate(flash, impl="auto" if GPU else "reference")
    x, results = torch.randn(1, 3, 32, 32, device=KERNEL_DEVICE), []
    for model in (stock.eval(), flash.eval()):
        state = {key: value.detach() for key, value in model.state_dict().items()}

        def function(x, model=model, state=state):
            return torch.func.functional_call(model, state, (x,)).square().sum()

        results.append(transform(function, x))
    assert relative_error(results[1], results[0]) < 1e-4


def test_functional_call_of_the_kernels_differentiates_the_given_parameters(ieee):
    stock, flash = make_pair(**SMALL)
    accelerate(flash, impl="triton")
    x, results = torch.randn(2, 3, 32, 32, device=KERNEL_DEVICE), []
    for model in (stock.eval(), flash.eval()):
        parameters = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        out = torch.func.functional_call(model, parameters, (x,))
        results.append(torch.autograd.grad(out.square().sum(), list(parameters.values())))
    assert all(relative_error(actual, expected) < 1e-3 for expected, actual in zip(*results, strict=True))


def test_vectors_batched_through_the_backward_are_differentiated_one_by_one(ieee):
    qkv = make_map().requires_grad_()
    vectors = torch.randn(3, 1, 6, 9, 2 * 16, device=KERNEL_DEVICE)
    grads = [
        torch.autograd.grad(attend(qkv, impl), qkv, vectors, is_grads_batched=True)[0]
        for impl in ("triton", "reference")
    ]
    assert relative_error(*grads) < 1e-5


def test_a_backward_refuses_tangents():
    qkv = make_map().requires_grad_()
    out = attend(qkv)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative.*reference"):
        torch.autograd.grad(out, qkv, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_transforms_inside_of_what_is_compiled_take_the_reference(ieee):
    qkv = make_map()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: torch.func.grad(lambda y: loss(y, "auto" if GPU else "reference"))(x), backend="aot_eager"
    )
    assert relative_error(compiled(qkv), grad(lambda x: loss(x, "reference"), qkv)) < 1e-5


# ----------------------------------------------------------------------------------------------------- autograd


def test_saved_tensors_pass_through_hooks(ieee):
    qkv, seen = make_map().requires_grad_(), []

    def pack(x):
        seen.append(x.shape)
        return x.cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.to(KERNEL_DEVICE)):
        out = attend(qkv)
    assert qkv.shape in seen
    (actual,) = torch.autograd.grad(out.square().sum(), qkv)
    assert torch.equal(actual, torch.autograd.grad(loss(qkv), qkv)[0])


def test_saved_tensors_wait_on_the_cpu():
    qkv = make_map().requires_grad_()
    with torch.autograd.graph.save_on_cpu(pin_memory=GPU):
        out = attend(qkv)
    (actual,) = torch.autograd.grad(out.square().sum(), qkv)
    assert torch.equal(actual, torch.autograd.grad(loss(qkv), qkv)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_have_the_same_gradients(use_reentrant):
    qkv = make_map().requires_grad_()
    out = checkpoint(attend, qkv, use_reentrant=use_reentrant)
    (actual,) = torch.autograd.grad(out.square().sum(), qkv) if not use_reentrant else _through_backward(out, qkv)
    assert torch.equal(actual, torch.autograd.grad(loss(qkv), qkv)[0])


def _through_backward(out, x):
    """The reentrant checkpoint knows backward() alone."""
    x.grad = None
    out.square().sum().backward()
    return (x.grad,)


# -------------------------------------------------------------------------------------- counters and profilers


def count_flops(function, *inputs):
    """(forward, backward) as torch counts them."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        out = function(*inputs)
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return *counts, counter.get_total_flops()


def test_flops_are_those_of_the_plain_code_with_the_logits_twice():
    """As torch has it for its own fused attention, whose backward works the logits out again: 5 products for 4."""
    qkv = make_map().requires_grad_()
    windows = torch.randn(4, 2, 16, 8, device=KERNEL_DEVICE, requires_grad=True)
    for function in (attend, lambda q, impl="triton": windowed_sdpa(q, q, q, impl=impl)):
        inputs = qkv if function is attend else windows
        forward, backward = count_flops(function, inputs)
        plain_forward, plain_backward = count_flops(function, inputs, "reference")
        assert forward == plain_forward > 0
        assert 4 * backward == 5 * plain_backward > 0


def test_a_profile_names_the_operators():
    qkv = make_map().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(qkv).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"timm_flashwin::window_attention", "timm_flashwin::window_attention_backward"} <= names


# -------------------------------------------------------------------------------------------------- quantisation


# Not V2: timm's own code calls F.linear(x, weight=..., bias=...) there, which torchao 0.18 does not take.
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224"])
def test_weights_quantised_by_torchao_give_timms_quantised_numbers(name, ieee):
    quantization = pytest.importorskip("torchao.quantization")
    stock = timm.create_model(name, **SMALL | dict(img_size=(40, 24), strict_img_size=False)).to(KERNEL_DEVICE).eval()
    flash = copy.deepcopy(stock)
    accelerate(flash, impl="triton" if GPU else "reference")
    for model in (stock, flash):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.randn(1, 3, 40, 24, device=KERNEL_DEVICE)
    with torch.no_grad():
        assert relative_error(flash(x), stock(x)) < 1e-4
