"""A flashwin model has timm's numbers: every name, every option, forward and the gradient of every parameter.

Here Swin V1 and S3; V2 and V2-CR are in test_models_v2.py.
"""

import copy
import io
import logging
import pickle

import pytest
import timm
import torch
from conftest import GPU, KERNEL_DEVICE
from judge import relative_error
from pairs import compare, make_pair, use
from timm.layers import set_exportable
from timm.models import swin_transformer

import timm_flashwin
from timm_flashwin import functional
from timm_flashwin.models.accelerate import accelerate
from timm_flashwin.models.registry import flashwin_names

SMALL = dict(img_size=64, embed_dim=32, num_heads=(1, 2, 4, 8), num_classes=7)
IMPLS = ["auto", "reference", "triton"]
NAMES = [name for name, arch in sorted(flashwin_names().items()) if arch.startswith("swin_")]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_timms_numbers_forward_and_backward(name, ieee):
    depths = (2, 2, 2, 2)  # every stage, shifted and not; timm's own depths repeat them
    small = SMALL | dict(depths=depths)
    if "384" in name:
        small["img_size"] = 96
    stock, flash = make_pair(flashwin_names()[name], name, **small)
    accelerate(flash, impl="triton" if GPU else "reference")
    compare(stock.eval(), flash.eval(), torch.randn(2, 3, small["img_size"], small["img_size"], device=KERNEL_DEVICE))


OPTIONS = {
    "padded map": dict(img_size=(72, 40)),
    "small window": dict(window_size=4),
    "non-square window": dict(window_size=(4, 5)),
    "window a stage": dict(window_size=(7, 4, 2, 2)),
    "always_partition": dict(always_partition=True),
    "no qkv_bias, padded": dict(qkv_bias=False, img_size=(72, 40)),
    "head_dim": dict(head_dim=16),
    "one channel": dict(in_chans=1),
    "no head": dict(num_classes=0),
    "patch size": dict(patch_size=2, img_size=32),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_constructor(name, impl, ieee):
    options = SMALL | dict(depths=(2, 2), num_heads=(1, 2)) | OPTIONS[name]
    if isinstance(options.get("window_size"), tuple) and len(options["window_size"]) == 4:
        options |= dict(depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    stock, flash = make_pair(**options)
    use(flash, impl)
    size = options["img_size"]
    size = (size, size) if isinstance(size, int) else size
    compare(stock.eval(), flash.eval(), torch.randn(2, options.get("in_chans", 3), *size, device=KERNEL_DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
def test_any_image_size_where_strict_img_size_is_off(impl, ieee):
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2), strict_img_size=False)
    use(flash, impl)
    for size in ((64, 64), (60, 100)):
        x = torch.randn(1, 3, *size, device=KERNEL_DEVICE)
        with torch.no_grad():
            assert relative_error(flash.eval()(x), stock.eval()(x)) < 1e-4


def test_set_input_size_after_construction(ieee):
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    for model in (stock.cpu(), flash.cpu()):  # timm resizes tables on the CPU only
        model.set_input_size(img_size=(96, 80), window_size=(5, 6))
        model.to(KERNEL_DEVICE)
    compare(stock.eval(), flash.eval(), torch.randn(1, 3, 96, 80, device=KERNEL_DEVICE))


def test_training_draws_the_same_drop_path_and_head_dropout(ieee):
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2), drop_path_rate=0.3, drop_rate=0.1)
    accelerate(flash, impl="reference")
    x = torch.randn(4, 3, 64, 64, device=KERNEL_DEVICE)
    outputs = []
    for model in (stock, flash):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert relative_error(outputs[1], outputs[0]) < 1e-4


def test_attention_dropout_runs_in_timms_code_with_timms_draws_and_says_so(caplog):
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2), attn_drop_rate=0.3)
    functional.log_fallback.cache_clear()
    x = torch.randn(2, 3, 64, 64, device=KERNEL_DEVICE)
    outputs = []
    with caplog.at_level(logging.INFO, logger="timm_flashwin"):
        for model in (stock, flash):
            torch.manual_seed(1)
            outputs.append(model.train()(x))
    assert torch.equal(*outputs)
    assert len([r for r in caplog.records if "attention dropout" in r.getMessage()]) == 1
    accelerate(flash, impl="triton")
    with pytest.raises(ValueError, match="attention dropout"):
        flash(x)


def test_gradient_checkpointing_gives_the_same_gradients(ieee):
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    flash.set_grad_checkpointing()
    compare(stock.eval(), flash.eval(), torch.randn(2, 3, 64, 64, device=KERNEL_DEVICE))


def test_features_and_intermediates(ieee):
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    options = SMALL | dict(depths=(2, 2, 2, 2), features_only=True, out_indices=(0, 2))
    options.pop("num_classes")
    stock, flash = make_pair(**options)
    accelerate(flash, impl="reference")
    assert stock.feature_info.channels() == flash.feature_info.channels()
    for ours, expected in zip(flash.eval()(x), stock.eval()(x), strict=True):
        assert relative_error(ours, expected) < 1e-4

    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    ours, expected = (m.eval().forward_intermediates(x, intermediates_only=True) for m in (flash, stock))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, expected, strict=True))


def test_reset_classifier(ieee):
    _, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    flash.reset_classifier(3)
    assert flash(torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)).shape == (1, 3)


@pytest.mark.parametrize("flag", ["exportable", "scriptable"])
def test_exportable_and_scriptable_models_are_timms_own(flag):
    model = timm.create_model("swin_tiny_flashwin", **SMALL, depths=(2, 2, 2, 2), **{flag: True})
    assert {type(m) for m in model.modules() if isinstance(m, swin_transformer.SwinTransformerBlock)} == {
        swin_transformer.SwinTransformerBlock
    }
    if flag == "scriptable":
        torch.jit.script(model.eval())


def test_set_exportable_takes_the_plain_path_at_run_time():
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    with set_exportable(True), torch.no_grad():
        assert torch.equal(flash.eval()(x), stock.eval()(x))


@pytest.mark.skipif(GPU, reason="states what happens without a GPU")
def test_without_a_gpu_the_numbers_are_timms_to_the_bit():
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(flash.eval()(x), stock.eval()(x))


def test_a_module_in_place_of_the_qkv_linear_tells_what_padding_becomes(ieee):
    class Adapter(torch.nn.Module):  # as low-rank adapters do: no Linear, and an own idea of the bias
        def __init__(self, linear):
            super().__init__()
            self.linear = linear
            self.shift = torch.nn.Parameter(torch.randn(linear.out_features, device=linear.weight.device))

        def forward(self, x):
            return self.linear(x) + self.shift

    stock, flash = make_pair(**SMALL | dict(img_size=(72, 40)), depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    for model in (stock, flash):
        torch.manual_seed(2)
        for block in (b for layer in model.layers for b in layer.blocks):
            block.attn.qkv = Adapter(block.attn.qkv)
    compare(stock.eval(), flash.eval(), torch.randn(1, 3, 72, 40, device=KERNEL_DEVICE))


def test_attention_called_on_windows_as_timm_calls_it(ieee):
    stock = swin_transformer.WindowAttention(32, 2, window_size=4).to(KERNEL_DEVICE)
    flash = copy.deepcopy(stock)
    accelerate(flash, impl="triton")
    windows, mask = torch.randn(6, 16, 32, device=KERNEL_DEVICE), torch.randn(3, 16, 16, device=KERNEL_DEVICE)
    for arguments in ((windows,), (windows, mask)):
        assert relative_error(flash(*arguments), stock(*arguments)) < 1e-5


def test_a_bias_of_ones_own_is_taken(ieee):
    stock = swin_transformer.WindowAttention(32, 2, window_size=4).to(KERNEL_DEVICE)
    flash = copy.deepcopy(stock)
    accelerate(flash, impl="reference")
    windows, bias = torch.randn(6, 16, 32, device=KERNEL_DEVICE), torch.randn(1, 2, 16, 16, device=KERNEL_DEVICE)
    for attention in (stock, flash):
        attention._get_rel_pos_bias = lambda: bias
    assert relative_error(flash(windows), stock(windows)) < 1e-5


def test_forward_hooks_on_blocks_attention_and_projections_fire():
    _, flash = make_pair(**SMALL | dict(img_size=56), depths=(2, 2))
    accelerate(flash, impl="reference")
    block, seen = flash.layers[0].blocks[1], []
    for name in ("attn", "attn.qkv", "attn.proj", ""):
        block.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    flash(torch.randn(1, 3, 56, 56, device=KERNEL_DEVICE))
    assert seen == ["attn.qkv", "attn.proj", "attn", ""]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_compute_the_same(way):
    _, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    if way == "deepcopy":
        other = copy.deepcopy(flash)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(flash))
    else:
        file = io.BytesIO()
        torch.save(flash, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    assert type(other.layers[0].blocks[0]) is type(flash.layers[0].blocks[0])
    assert torch.equal(other.eval()(x), flash.eval()(x))


def test_eager_attention_copies_no_map():
    """Roll, pad, partition and mask are address arithmetic: none of their operators runs, on any map."""
    _, flash = make_pair(**SMALL | dict(img_size=(72, 40)), depths=(2, 2))
    accelerate(flash, impl="triton")
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    block = flash.layers[0].blocks[1]
    x = torch.randn(1, 18, 10, 32, device=KERNEL_DEVICE)
    with torch.no_grad(), Recorder():
        block._attn(x)
    assert seen.count("window_attention") == seen.count("relative_position_bias") == 1
    assert not {"roll", "constant_pad_nd", "cat", "masked_fill", "fill_", "bmm", "_softmax", "index"} & set(seen)
    assert not {"clone", "copy_", "contiguous"} & set(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, size", [("swin_base_patch4_window7_224", 224), ("swin_base_patch4_window12_384", 384)])
def test_full_size_models_are_as_exact_as_timms_under_autocast(name, size, dtype, ieee):
    stock = timm.create_model(name).to("cuda").eval()
    flash = copy.deepcopy(stock)
    timm_flashwin.accelerate(flash, impl="triton")
    x = torch.randn(4, 3, size, size, device="cuda")
    weight = torch.randn(4, 1000, device="cuda")
    exact = copy.deepcopy(stock).double()
    results = {}
    for key, model, inputs in (("exact", exact, x.double()), ("timm", stock, x), ("flash", flash, x)):
        with torch.autocast("cuda", dtype, enabled=key != "exact"):
            out = model(inputs)
        (out.double() * weight).sum().backward()
        results[key] = [out] + [p.grad for p in model.parameters()]
    names = ["logits"] + [n for n, _ in stock.named_parameters()]
    for n, expected, timms, ours in zip(names, results["exact"], results["timm"], results["flash"], strict=True):
        our_error, timm_error = relative_error(ours, expected), relative_error(timms, expected)
        assert our_error <= 2 * timm_error + torch.finfo(dtype).eps / 2, (n, our_error, timm_error)


@pytest.mark.gpu
def test_full_size_model_computes_timms_float32_numbers(ieee):
    stock = timm.create_model("swin_tiny_patch4_window7_224").to("cuda")
    flash = copy.deepcopy(stock)
    timm_flashwin.accelerate(flash, impl="triton")
    compare(stock.eval(), flash.eval(), torch.randn(8, 3, 224, 224, device="cuda"))


def test_a_hooked_qkv_linear_is_asked_what_padding_becomes(ieee):
    stock, flash = make_pair(**SMALL | dict(img_size=(72, 40)), depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    for model in (stock, flash):
        for block in (b for layer in model.layers for b in layer.blocks):
            block.attn.qkv.register_forward_hook(lambda module, args, output: output * 2)
    compare(stock.eval(), flash.eval(), torch.randn(1, 3, 72, 40, device=KERNEL_DEVICE))


def test_hooks_on_the_attention_weights_fire():
    _, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    accelerate(flash, impl="reference")
    seen = []
    flash.layers[0].blocks[1].attn.softmax.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    flash.eval()(torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE))
    assert seen == [(9, 1, 49, 49)]


def test_dropout_switched_on_for_the_attention_weights_alone_drops():
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2), attn_drop_rate=0.5)
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    outputs = []
    for model in (stock.eval(), flash.eval()):
        for block in (b for layer in model.layers for b in layer.blocks):
            block.attn.attn_drop.train()
        torch.manual_seed(1)
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_another_attention_in_a_block_is_called_as_timm_calls_it():
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    flash.layers[0].blocks[1].attn = copy.deepcopy(stock.layers[0].blocks[1].attn)
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    assert relative_error(flash.eval()(x), stock.eval()(x)) < 1e-4


def test_fx_feature_extraction_traces_timms_code():
    stock, flash = make_pair(**SMALL, depths=(2, 2, 2, 2))
    x = torch.randn(1, 3, 64, 64, device=KERNEL_DEVICE)
    features = [
        timm.models.create_feature_extractor(m.eval(), ["layers.0", "layers.1"])(x).values() for m in (stock, flash)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))
