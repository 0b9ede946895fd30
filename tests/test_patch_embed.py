"""The patch embedding as a Linear: the convolution's numbers, channels last, and in inference alone."""

import copy
import re

import pytest
import timm
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from pairs import make_pair
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import timm_flashwin
from timm_flashwin import functional
from timm_flashwin.models import patch_embed
from timm_flashwin.models.patch_embed import FlashPatchProjection, is_patch_projection, patch_linear

HALVES = [torch.float16, torch.bfloat16]
NAMES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]
SMALL = dict(img_size=64, embed_dim=32, num_heads=(1,), depths=(1,), num_classes=7)


def make_projection(patch=4, bias=True):
    return nn.Conv2d(3, 24, patch, stride=patch, bias=bias).eval()


def make_models(name=NAMES[0], dtype=torch.float32, **options):
    """timm's and ours, for inference."""
    return [model.eval().to(dtype) for model in make_pair(name, **SMALL, **options)]


def make_our_projection():
    return make_models(dtype=torch.bfloat16)[1].patch_embed.proj


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patch", [4, 2, (2, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 24, 36), (1, 3, 27, 38), (3, 3, 4, 4), (0, 3, 24, 24)])
def test_output_and_gradients_are_the_convolutions(shape, patch, bias):
    projection = make_projection(patch, bias).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    ours, theirs = patch_linear(x, projection.weight, projection.bias), projection(x)
    torch.testing.assert_close(ours, theirs)
    do = torch.randn_like(theirs)
    inputs = [x, *projection.parameters()]
    for our, their in zip(*(torch.autograd.grad(out, inputs, do) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_map_lies_channels_last_whatever_the_images(layout):
    projection = make_projection()
    images = torch.randn(2, 3, 16, 24).to(memory_format=layout)
    out = patch_linear(images, projection.weight, projection.bias)
    assert out.shape == (2, 24, 4, 6) and out.permute(0, 2, 3, 1).is_contiguous()


def test_autocast_has_its_dtype():
    projection, x = make_projection(), torch.randn(2, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = patch_linear(x, projection.weight, projection.bias), projection(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, projection(x)) < 1.1 * relative_error(theirs, projection(x))


@pytest.mark.parametrize(
    "options",
    [dict(stride=2), dict(padding=1), dict(padding="same"), dict(dilation=2), dict(groups=3), dict(kernel_size=3)],
)
def test_another_convolution_is_no_patch_projection(options):
    options = dict(kernel_size=4, stride=1 if options.get("padding") == "same" else 4) | options
    assert is_patch_projection(nn.Conv2d(3, 24, kernel_size=4, stride=4, padding="valid"))
    assert not is_patch_projection(nn.Conv2d(3, 24, **options))


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_the_projection_of_a_model_and_restore_gives_it_back(name):
    stock, ours = timm.create_model(name, **SMALL), timm.create_model(name, **SMALL)
    report = timm_flashwin.accelerate(ours)
    assert report.replaced["patch_embed.proj"] == "FlashPatchProjection"
    assert type(ours.patch_embed.proj) is FlashPatchProjection
    assert timm_flashwin.accelerate(ours, impl="reference").already["patch_embed.proj"] == "FlashPatchProjection"
    assert ours.patch_embed.proj.impl == "reference"
    assert ours.state_dict().keys() == stock.state_dict().keys()
    timm_flashwin.restore(ours)
    assert type(ours.patch_embed.proj) is nn.Conv2d and "impl" not in ours.patch_embed.proj.__dict__


def test_convolutions_of_others_stay_and_those_of_swins_features_do_not():
    swin = timm.create_model(NAMES[0], **SMALL)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=1)
    both = nn.ModuleDict(dict(swin=swin, vit=vit, conv=make_projection()))
    timm_flashwin.accelerate(both)
    assert type(swin.patch_embed.proj) is FlashPatchProjection
    assert type(vit.patch_embed.proj) is type(both["conv"]) is nn.Conv2d
    features = timm.create_model(NAMES[0], **SMALL, features_only=True)
    assert "patch_embed.proj" in timm_flashwin.accelerate(features).replaced
    swin.set_input_size(patch_size=2)  # timm makes a new one
    assert type(swin.patch_embed.proj) is nn.Conv2d


@pytest.mark.parametrize("name", NAMES)
def test_on_a_cpu_the_convolution_runs(name):
    stock, ours = [model.cpu() for model in make_models(name, torch.bfloat16)]
    x = torch.randn(2, 3, 64, 64).bfloat16()
    assert torch.equal(ours.patch_embed(x), stock.patch_embed(x))


@pytest.fixture
def on_any_device(monkeypatch):
    """The Linear also serves on a CPU."""
    monkeypatch.setattr(functional, "_INFERENCE_DEVICES", ("cuda", "cpu"))


def count_convolutions(function, *inputs):
    with torch.profiler.profile() as profile:
        out = function(*inputs)
    return out, sum(event.name == "aten::convolution" for event in profile.events())


def make_images(*size, dtype=torch.bfloat16):
    return torch.randn(*(size or (2, 3, 64, 64)), device=KERNEL_DEVICE).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_in_inference_no_convolution_runs_and_the_map_is_as_exact(name, dtype, on_any_device):
    (stock, ours), images = make_models(name, dtype), make_images(dtype=dtype)
    exact = copy.deepcopy(stock).double().patch_embed(images.double())
    (ours, convolutions), theirs = count_convolutions(ours.patch_embed, images), stock.patch_embed(images)
    assert convolutions == 0 and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact)


class Labelled(torch.Tensor):
    """A tensor with a class of its own."""


CHANGES = {
    "training": lambda projection, x: (projection.train(), x),
    "reference": lambda projection, x: (setattr(projection, "impl", "reference"), x),
    "float32": lambda projection, x: (projection.float(), x.float()),
    "size that patches do not cover": lambda projection, x: (projection, x[..., :63]),
    "subclass": lambda projection, x: (projection, x.as_subclass(Labelled)),
    "another weight": lambda projection, x: (
        setattr(projection, "weight", nn.Parameter(make_images(32, 3, 2, 8))),
        x,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_elsewhere_the_convolution_runs(change, on_any_device):
    projection = make_our_projection()
    _, x = CHANGES[change](projection, make_images())
    out, convolutions = count_convolutions(projection, x)
    stock = copy.deepcopy(projection)
    stock.__class__ = nn.Conv2d
    assert convolutions == 1 and torch.equal(out, stock(x))


def test_with_gradients_the_convolution_runs(on_any_device):
    projection = make_our_projection()
    out, convolutions = count_convolutions(projection, make_images())
    assert convolutions == 1 and out.requires_grad


@torch.no_grad()
def test_under_a_transform_the_convolution_runs(on_any_device):
    projection = make_our_projection()
    x, stock = make_images(2, 1, 3, 64, 64), nn.Conv2d(3, 32, 4, 4).to(KERNEL_DEVICE).bfloat16()
    stock.load_state_dict(projection.state_dict())
    assert torch.equal(torch.func.vmap(projection)(x), torch.func.vmap(stock)(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 3, 64, 3), (3, 64, 64), (1, 4, 64, 64)])
def test_what_the_convolution_refuses_or_takes_is_its_affair(size, on_any_device):
    images = make_images(*size)
    stock, ours = [model.patch_embed.proj for model in make_models(dtype=torch.bfloat16)]
    try:
        expected = stock(images)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
            ours(images)
    else:
        assert torch.equal(ours(images), expected)


@torch.no_grad()
def test_images_of_integers_are_refused_under_autocast_too(on_any_device):
    ours = make_models()[1]
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16), pytest.raises(RuntimeError, match="type"):
        ours(torch.ones(2, 3, 64, 64, device=KERNEL_DEVICE, dtype=torch.uint8))


@torch.no_grad()
def test_a_trace_holds_the_convolution(on_any_device):
    projection = make_our_projection()
    assert "aten::_convolution" in str(torch.jit.trace(projection, make_images()).graph)


@torch.no_grad()
def test_a_hook_on_the_projection_sees_the_map(on_any_device):
    ours, seen = make_models(dtype=torch.bfloat16)[1], []
    ours.patch_embed.proj.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    ours(make_images())
    assert seen == [(2, 32, 16, 16)]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_one_graph_without_a_convolution(name, on_any_device):
    stock, ours = make_models(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for batch, frames in ((2, 1), (3, 2), (5, 2)):
        images = make_images(batch, 3, 64, 64, dtype=torch.float32)
        with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
            out, convolutions = count_convolutions(compiled, images)
            assert counter.frame_count == frames
            assert relative_error(out, stock(images)) < 3e-2
        assert (convolutions == 0) == patch_embed._COMPILER_TELLS_SIZES


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES[:2])  # V2-CR's alone, timm's too, takes a minute
def test_compiled_for_images_of_any_size_it_makes_no_more_graphs_than_timms(name, on_any_device):
    counts = []
    for model in make_models(name, strict_img_size=False):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
            for size in ((64, 64), (96, 64)):
                compiled(make_images(2, 3, *size, dtype=torch.float32))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_no_convolution(strict, on_any_device):
    projection, images = make_our_projection(), make_images()
    program = torch.export.export(projection, (images,), strict=strict)
    holds = any("conv2d" in str(node.target) for node in program.graph.nodes)
    assert holds != patch_embed._COMPILER_TELLS_SIZES
    assert torch.equal(program.module()(images), projection(images))
