"""torch.compile takes a flashwin model whole: no graph break, the operators in it, no more graphs than timm's."""

import contextlib

import pytest
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from pairs import blocks, compare, make_pair
from torch._dynamo.testing import CompileCounterWithBackend

from timm_flashwin import accelerate, functional, window_attention
from timm_flashwin.models import dispatch

FAMILIES = {
    "V1": "swin_tiny_patch4_window7_224",
    "V2": "swinv2_tiny_window8_256",
    "V2-CR": "swinv2_cr_tiny_224",
}
# One stage of 2x2 windows: a block without a shift and one with.
SMALL = dict(
    img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(1,), num_classes=3, strict_img_size=False
)
OPERATORS = ("window_attention", "relative_position_bias")


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, device=KERNEL_DEVICE)


def compile_in_place(model, backend="aot_eager", dynamic=None):
    """Compile and return what counts the graphs and keeps them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    return counter


def count_operators(graph):
    targets = [str(node.target).removeprefix("timm_flashwin.") for node in graph.graph.nodes if node.op != "output"]
    return tuple(sum(target.split(".")[0] == operator for target in targets) for operator in OPERATORS)


@pytest.fixture(params=["V1", "V2"])
def pair(request):
    stock, flash = make_pair(FAMILIES[request.param], **SMALL, drop_path_rate=0.0)
    accelerate(flash, impl="triton")
    return stock.eval(), flash.eval()


def test_models_compile_whole_forward_and_backward(pair, ieee):
    stock, flash = pair
    counter = compile_in_place(flash)
    compare(stock, flash, images())
    assert counter.frame_count == 1
    assert count_operators(counter.graphs[0]) == (2, 2)


@pytest.mark.parametrize("impl, operators", [("auto", (2, 0)), ("triton", (2, 2))])
def test_without_a_gradient_the_compiler_makes_the_bias_unless_triton_is_asked_for(
    impl, operators, pair, ieee, monkeypatch
):
    for module in (functional, dispatch):  # "auto" takes the interpreter, too
        monkeypatch.setattr(module, "fallback_reason", functional.refusal)
    stock, flash = pair
    accelerate(flash, impl=impl)
    counter, x = compile_in_place(flash), images()
    with torch.no_grad():
        assert relative_error(flash(x), stock(x)) < 1e-5
    assert count_operators(counter.graphs[0]) == operators


def test_v2_cr_compiles_whole_in_training_with_the_draws_of_timms_model(ieee):
    """Its bias MLP always has dropout; drop path is on, too."""
    x, outputs, gradients = images(), [], []
    for model, impl in zip(make_pair(FAMILIES["V2-CR"], **SMALL, drop_path_rate=0.3), (None, "triton"), strict=True):
        if impl is not None:
            accelerate(model, impl=impl)
            counter = compile_in_place(model)
        torch.manual_seed(1)
        outputs.append(model.train()(x))
        outputs[-1].square().sum().backward()
        gradients.append(blocks(model)[0].attn.qkv.weight.grad)
    assert relative_error(outputs[1], outputs[0]) < 1e-4 and relative_error(gradients[1], gradients[0]) < 1e-3
    assert counter.frame_count == 1
    assert count_operators(counter.graphs[0])[0] == 2


def test_other_batches_and_images_make_no_more_graphs_than_with_timms_model():
    counts = []
    for model, impl in zip(make_pair(**SMALL), (None, "triton"), strict=True):
        if impl is not None:
            accelerate(model, impl=impl)
        counter = compile_in_place(model.eval(), "eager", dynamic=True)
        counts.append([])
        with torch.no_grad():
            for size in ((2, 32, 32), (3, 32, 32), (2, 40, 24)):
                assert model(images(*size)).shape == (size[0], 3)
                counts[-1].append(counter.frame_count)
    timms, ours = counts
    assert all(a <= b for a, b in zip(ours, timms, strict=True)), counts


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_outside_and_inside_of_what_is_compiled(where):
    _, flash = make_pair(**SMALL)
    accelerate(flash.eval(), impl="triton")
    autocast = torch.autocast(KERNEL_DEVICE, torch.float16)
    inside, outside = (autocast if where == place else contextlib.nullcontext() for place in ("inside", "outside"))

    def attend(x):
        with inside:
            return blocks(flash)[1]._attn(x)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(1, 8, 8, 16, device=KERNEL_DEVICE)
    with outside:
        out = torch.compile(attend, backend=counter, fullgraph=True)(x)
        expected = attend(x)
    out.sum().backward()
    assert torch.equal(out, expected) and count_operators(counter.graphs[0]) == (1, 1)
    assert all(parameter.grad is not None for parameter in blocks(flash)[1].attn.parameters())


def test_gradient_checkpointing_inside_of_what_is_compiled(ieee):
    stock, flash = make_pair(**SMALL)
    accelerate(flash, impl="triton")
    flash.set_grad_checkpointing()
    counter = compile_in_place(flash.eval())
    compare(stock.eval(), flash, images())
    assert counter.frame_count == 1


@pytest.mark.gpu  # on a CPU the C++ compiler would take longer than all the rest
def test_attention_compiled_by_inductor(ieee):
    """Inductor's own layouts and buffers reach the operator as it expects them."""

    def function(x, weight, bias):
        qkv = (x @ weight).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)  # as dense as qkv need not be
        return window_attention(qkv, 2, 4, 1, bias, impl="triton").relu()

    torch._dynamo.reset()
    tensors = [torch.randn(*size, device=KERNEL_DEVICE) for size in ((1, 8, 8, 32), (32, 96), (2, 16, 16))]
    inputs = [x.requires_grad_() for x in tensors]
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------ CUDA graphs and streams


def cuda_pair(impl="triton", **kwargs):
    """A twin, and its copy in timm's own classes, with shifted and padded windows."""
    stock, flash = make_pair(**dict(img_size=(72, 40), embed_dim=32, num_heads=(1, 2, 4, 8), num_classes=7) | kwargs)
    accelerate(flash, impl=impl)
    return stock, flash


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_reduce_overhead_replays_forward_and_backward(family, ieee):
    stock, flash = make_pair(FAMILIES[family], **SMALL, drop_path_rate=0.0)
    accelerate(flash.eval(), impl="triton")
    torch._dynamo.reset()
    flash.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        compare(stock.eval(), flash, images())


@pytest.mark.gpu
def test_a_cuda_graph_by_hand_replays_on_new_inputs(ieee):
    _, flash = cuda_pair()
    static, graph, stream = torch.randn(2, 3, 72, 40, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    flash.eval()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled before the capture
            flash(static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = flash(static)
        for _ in range(2):
            x = torch.randn_like(static)
            static.copy_(x)
            graph.replay()
            assert torch.equal(out, flash(x))


@pytest.mark.gpu
def test_make_graphed_callables_trains_with_the_same_gradients(ieee):
    stock, flash = cuda_pair()
    x = torch.randn(2, 3, 72, 40, device="cuda")
    graphed = torch.cuda.make_graphed_callables(flash.eval(), (x.clone().requires_grad_(),))
    for _ in range(2):
        compare(stock.eval(), graphed, torch.randn_like(x))


@pytest.mark.gpu
def test_streams_beside_each_other_compute_what_one_does(ieee):
    _, flash = cuda_pair()
    flash.eval()
    inputs = [torch.randn(2, 3, 72, 40, device="cuda") for _ in range(4)]
    with torch.no_grad():
        expected = [flash(x) for x in inputs]
        streams, outputs = [torch.cuda.Stream() for _ in inputs], []
        for stream, x in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs.append(flash(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_runs_there_whatever_gpu_is_current(ieee):
    stock, flash = cuda_pair()
    x = torch.randn(2, 3, 72, 40)
    outputs = []
    for device in ("cuda:1", "cuda:0"):
        assert torch.cuda.current_device() == 0
        out = flash.to(device).eval()(x.to(device))
        out.sum().backward()
        assert out.device == torch.device(device)
        outputs.append(out.detach().cpu())
        flash.zero_grad()
    assert torch.equal(*outputs)
    assert relative_error(outputs[0], stock.eval()(x.to("cuda:0")).cpu()) < 1e-4


@pytest.mark.gpu
def test_nothing_synchronises_the_host_with_the_gpu():
    _, flash = cuda_pair()
    x = torch.randn(2, 3, 72, 40, device="cuda")
    flash(x).sum().backward()  # kernels are compiled, constants made
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
