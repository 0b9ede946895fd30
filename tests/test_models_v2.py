"""A flashwin model has timm's numbers: Swin V2 and V2-CR, as test_models.py has it for V1 and S3."""

import copy
import logging
import pickle
import re

import pytest
import timm
import torch
from conftest import GPU, KERNEL_DEVICE
from judge import assert_as_exact_as_timm, relative_error
from pairs import blocks, compare, make_pair, use
from timm.layers import set_exportable
from timm.models import swin_transformer_v2, swin_transformer_v2_cr

import timm_flashwin
from timm_flashwin import functional
from timm_flashwin.geometry import distance_rows
from timm_flashwin.models.accelerate import accelerate
from timm_flashwin.models.registry import flashwin_names

V2, CR = "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"
FAMILIES = [V2, CR]
ATTENTIONS = {V2: swin_transformer_v2.WindowAttention, CR: swin_transformer_v2_cr.WindowMultiHeadAttention}
IMPLS = ["auto", "reference", "triton"]
NAMES = [name for name, arch in sorted(flashwin_names().items()) if arch.startswith("swinv2_")]
# Stages of 2x2 windows, shifted and not, and of one window.
SMALL = dict(img_size=32, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=7)
PADDED = dict(img_size=(40, 24), strict_img_size=False)  # a mask for padded maps: timm 1.0.29 makes it in forward alone


def images(*size, batch=2):
    height, width = size * 2 if len(size) == 1 else size
    return torch.randn(batch, 3, height, width, device=KERNEL_DEVICE)


def window_of(arch):
    """The window of timm's `arch`; V2-CR's is a 32nd of the image."""
    if "_cr_" in arch:
        return int(arch.rsplit("_", 1)[1]) // 32
    return int(re.search(r"window(?:\d+to)?(\d+)", arch)[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_timms_numbers_forward_and_backward(name, ieee):
    """With timm's own window, in a narrow model: first a map of 2x2 windows, shifted and not, then maps of one."""
    window = window_of(flashwin_names()[name])
    size = 8 * window
    narrow = dict(img_size=size, window_size=window, embed_dim=16, num_heads=(1, 2, 4), num_classes=7)
    stock, flash = make_pair(flashwin_names()[name], name, **narrow, depths=(2, 1, 1))
    accelerate(flash, impl="triton" if GPU else "reference")
    compare(stock.eval(), flash.eval(), images(size, batch=1))


OPTIONS = {
    "padded map": PADDED,
    "non-square window": dict(img_size=(32, 40), window_size=(4, 5)),
    "always_partition": dict(always_partition=True, img_size=32, window_size=8, depths=(2, 1)),
    "head_dim 12": dict(embed_dim=24, num_heads=(2, 4)),
}
CASES = [(family, name, options) for family in FAMILIES for name, options in OPTIONS.items()] + [
    (V2, "no qkv_bias", dict(qkv_bias=False) | PADDED),
    (V2, "pretrained windows", dict(pretrained_window_sizes=(12, 6))),
    (CR, "extra norms", dict(extra_norm_stage=True)),
    (CR, "sequential_attn, which does nothing", dict(sequential_attn=True)),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family, options", [pytest.param(f, o, id=f"{f}-{name}") for f, name, o in CASES])
def test_options_of_the_constructor(family, options, impl, ieee):
    options = SMALL | options
    stock, flash = make_pair(family, **options)
    use(flash, impl)
    size = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    compare(stock.eval(), flash.eval(), images(*size))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_image_size_where_strict_img_size_is_off(family, impl, ieee):
    stock, flash = make_pair(family, **SMALL, strict_img_size=False)
    use(flash, impl)
    for size in ((32, 32), (28, 52)):
        x = images(*size, batch=1)
        with torch.no_grad():
            assert relative_error(flash.eval()(x), stock.eval()(x)) < 1e-4


# timm 1.0.29 cannot change the number of tokens in V2-CR's windows.
@pytest.mark.parametrize("family, size, window", [(V2, (32, 64), (4, 8)), (CR, (40, 48), (5, 6))])
def test_set_input_size_after_construction(family, size, window, ieee):
    stock, flash = make_pair(family, **SMALL | dict(img_size=(48, 40), window_size=(6, 5)))
    accelerate(flash, impl="reference")
    for model in (stock, flash):
        model.set_input_size(img_size=size, window_size=window)
    assert {block.attn.window_size for block in blocks(flash)} == {window}
    compare(stock.eval(), flash.eval(), images(*size))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_draws_the_same_drop_path_and_head_dropout(family, ieee):
    """Also the dropout in V2-CR's bias MLP, which is always there."""
    stock, flash = make_pair(family, **SMALL, drop_path_rate=0.3, drop_rate=0.1)
    accelerate(flash, impl="reference")
    x = images(32)
    outputs = []
    for model in (stock, flash):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert relative_error(outputs[1], outputs[0]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_dropout_runs_in_timms_code_with_timms_draws_and_says_so(family, caplog):
    stock, flash = make_pair(family, **SMALL, attn_drop_rate=0.3)
    functional.log_fallback.cache_clear()
    x = images(32)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, ieee):
    stock, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    flash.set_grad_checkpointing()
    compare(stock.eval(), flash.eval(), images(32))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_intermediates(family, ieee):
    x = images(32)
    stock, flash = make_pair(family, **SMALL, features_only=True, out_indices=(0, 1))
    accelerate(flash, impl="reference")
    assert stock.feature_info.channels() == flash.feature_info.channels()
    for ours, expected in zip(flash.eval()(x), stock.eval()(x), strict=True):
        assert relative_error(ours, expected) < 1e-4

    stock, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    ours, expected = (m.eval().forward_intermediates(x, intermediates_only=True) for m in (flash, stock))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("flag", ["exportable", "scriptable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exportable_and_scriptable_models_are_timms_own(family, flag):
    model = timm.create_model(family + "_flashwin", **SMALL, **{flag: True})
    assert {type(block.attn) for block in blocks(model)} == {ATTENTIONS[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_set_exportable_takes_the_plain_path_at_run_time(family):
    stock, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    x = images(32)
    with set_exportable(True), torch.no_grad():
        assert torch.equal(flash.eval()(x), stock.eval()(x))


@pytest.mark.skipif(GPU, reason="states what happens without a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_gpu_the_numbers_are_timms_to_the_bit(family):
    stock, flash = make_pair(family, **SMALL)
    x = images(32)
    results = []
    for model in (stock.train(), flash.train()):
        torch.manual_seed(1)
        out = model(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class ShiftedLinear(torch.nn.Linear):
    """An adapter in the place of a Linear."""

    def forward(self, x):
        return super().forward(x) + torch.linspace(-1, 1, self.out_features, device=x.device)


def adapt(attention):
    adapter = ShiftedLinear(attention.in_features if hasattr(attention, "in_features") else attention.dim, 1)
    adapter.weight, adapter.bias = attention.qkv.weight, attention.qkv.bias
    adapter.out_features = attention.qkv.out_features
    attention.qkv = adapter


def hook(attention):
    attention.qkv.register_forward_hook(lambda module, args, output: output * 2 + 1)


@pytest.mark.parametrize("change", [adapt, hook])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_qkv_linear_acts_as_in_timm(family, separate, change, ieee):
    """V2 takes the Linear's weight alone, unless its bias is added separately; V2-CR calls the Linear."""
    stock, flash = make_pair(family, **SMALL | PADDED)
    accelerate(flash, impl="reference")
    for model in (stock, flash):
        for block in blocks(model):
            block.attn.qkv_bias_separate = separate
            change(block.attn)
    compare(stock.eval(), flash.eval(), images(40, 24))


def test_qkv_bias_separate_adds_the_bias_to_what_the_linear_made(ieee):
    stock = swin_transformer_v2.WindowAttention(32, (4, 4), 2, qkv_bias_separate=True).to(KERNEL_DEVICE)
    torch.nn.init.normal_(stock.q_bias)
    torch.nn.init.normal_(stock.v_bias)
    flash = copy.deepcopy(stock)
    accelerate(flash, impl="reference")
    windows = torch.randn(6, 16, 32, device=KERNEL_DEVICE)
    compare(stock, flash, windows)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_called_on_windows_as_timm_calls_it(family, impl, ieee):
    stock = ATTENTIONS[family](32, window_size=(4, 4), num_heads=2).to(KERNEL_DEVICE).eval()
    flash = copy.deepcopy(stock)
    accelerate(flash, impl=impl)
    windows, mask = torch.randn(6, 16, 32, device=KERNEL_DEVICE), torch.randn(3, 16, 16, device=KERNEL_DEVICE)
    for arguments in ((windows,), (windows, mask)):
        assert relative_error(flash(*arguments), stock(*arguments)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hooks_that_fire_in_timms_code_fire(family):
    seen = []
    for model in make_pair(family, **SMALL):
        if type(blocks(model)[0].attn) is not ATTENTIONS[family]:
            accelerate(model, impl="reference")
        fired = []
        for name, module in blocks(model)[1].named_modules():
            if name in ("attn", "attn.qkv", "attn.proj", "attn.cpb_mlp", "attn.meta_mlp", ""):
                module.register_forward_hook(lambda m, i, o, name=name, fired=fired: fired.append((name, o.shape)))
        model.eval()(images(32, batch=1))
        seen.append(fired)
    stock, flash = (dict(fired) for fired in seen)
    assert stock.keys() == flash.keys() and len(stock) >= 4
    stock.pop("attn"), flash.pop("attn")  # on windows in timm's, on the map in ours
    stock.pop("attn.proj"), flash.pop("attn.proj"), stock.pop("attn.qkv", None), flash.pop("attn.qkv", None)
    assert stock == flash


@pytest.mark.parametrize("module", ["softmax", "attn_drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_the_attention_weights_fire(family, module):
    _, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    attention = blocks(flash)[1].attn
    if not hasattr(attention, module):
        pytest.skip("V2-CR's softmax is no module")
    seen = []
    getattr(attention, module).register_forward_hook(lambda m, i, o: seen.append(o.shape))
    flash.eval()(images(32, batch=1))
    assert seen == [(4, 1, 16, 16)]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_compute_the_same(family, way):
    _, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    other = copy.deepcopy(flash) if way == "deepcopy" else pickle.loads(pickle.dumps(flash))
    x = images(32)
    assert [type(module) for module in other.modules()] == [type(module) for module in flash.modules()]
    assert torch.equal(other.eval()(x), flash.eval()(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_copies_no_map(family):
    """Roll, pad, partition and mask are address arithmetic: none of their operators runs, on any map."""
    _, flash = make_pair(family, **SMALL | PADDED)
    accelerate(flash.eval(), impl="triton")
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append((func.overloadpacket.__name__, out))
            return out

    block = blocks(flash)[1]
    x = torch.randn(1, 10, 6, 32, device=KERNEL_DEVICE)
    with torch.no_grad(), Recorder():
        (block._attn if family == V2 else block._shifted_window_attn)(x)
    names = [name for name, _ in seen]
    assert names.count("window_attention") == 1
    assert not {"roll", "constant_pad_nd", "masked_fill", "bmm", "_softmax", "linalg_vector_norm"} & set(names)
    copies = [out.numel() for name, out in seen if name in ("clone", "copy_", "contiguous", "cat", "stack")]
    assert all(n < x.numel() for n in copies)  # the bias of the projection, and what the MLP takes


@pytest.mark.parametrize("family", FAMILIES)
def test_another_attention_in_a_block_is_called_as_timm_calls_it(family):
    stock, flash = make_pair(family, **SMALL)
    accelerate(flash, impl="reference")
    blocks(flash)[1].attn = copy.deepcopy(blocks(stock)[1].attn)
    x = images(32)
    assert relative_error(flash.eval()(x), stock.eval()(x)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_fx_feature_extraction_traces_timms_code(family):
    stock, flash = make_pair(family, **SMALL)
    x, stage = images(32), "layers.0" if family == V2 else "stages.0"
    features = [timm.models.create_feature_extractor(m.eval(), [stage])(x)[stage] for m in (stock, flash)]
    assert torch.equal(*features)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_whole_with_timms_numbers(family, ieee):
    stock, flash = make_pair(family, **SMALL | PADDED | dict(depths=(2,), num_heads=(1,)))
    accelerate(flash, impl="reference")
    x = images(40, 24)
    with torch.no_grad():
        compiled = torch.compile(flash.eval(), fullgraph=True, backend="eager")
        assert relative_error(compiled(x), stock.eval()(x)) < 1e-4


# -------------------------------------------------------------------------------------------------- the bias


def timms_bias(attention):
    """The bias [num_heads, N, N] that timm's code adds to the logits: queries and keys of 0 leave it alone."""
    if isinstance(attention, ATTENTIONS[CR]):
        return attention._relative_positional_encodings()[0]
    N = attention.window_size[0] * attention.window_size[1]
    seen = []
    attention = copy.deepcopy(attention)
    attention.__class__ = ATTENTIONS[V2]
    for parameter in (attention.qkv.weight, attention.q_bias, attention.v_bias):
        torch.nn.init.zeros_(parameter)
    attention.softmax.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    attention(torch.zeros(1, N, attention.dim, device=KERNEL_DEVICE))
    return seen[0][0]


def make_attention(family, window=(4, 6), impl="reference"):
    attention = ATTENTIONS[family](32, window_size=window, num_heads=2).to(KERNEL_DEVICE).eval()
    for parameter in (attention.cpb_mlp if family == V2 else attention.meta_mlp).parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    accelerate(attention, impl=impl)
    return attention


both_implementations = pytest.mark.parametrize("impl", ["reference", "triton"])
WINDOWS = [(4, 6), (6, 4), (7, 7), (2, 3)]


@both_implementations
@pytest.mark.parametrize("family, window", [(f, w) for f in FAMILIES for w in WINDOWS] + [(CR, (1, 5)), (CR, (1, 1))])
def test_bias_is_timms(family, window, impl, ieee, poisoned):
    attention = make_attention(family, window, impl)
    ours, expected = attention.position_bias(), timms_bias(attention)
    assert ours.is_contiguous() and ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@both_implementations
@pytest.mark.parametrize("family, window", [(V2, (5, 3)), (CR, (6, 4))])
def test_bias_follows_weights_and_window(family, window, impl, ieee):
    attention = make_attention(family, (4, 6), impl)
    before = attention.position_bias()
    with torch.no_grad():
        for parameter in (attention.cpb_mlp if family == V2 else attention.meta_mlp).parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(attention.position_bias(), before)
    torch.testing.assert_close(attention.position_bias(), timms_bias(attention), rtol=1e-5, atol=1e-6)
    attention.set_window_size(window)
    torch.testing.assert_close(attention.position_bias(), timms_bias(attention), rtol=1e-5, atol=1e-6)


@both_implementations
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_bias_mlp_are_float64s(family, impl, ieee):
    attention = make_attention(family, impl=impl)
    parameters = list((attention.cpb_mlp if family == V2 else attention.meta_mlp).parameters())
    exact = copy.deepcopy(attention).double()
    exact.impl = "reference"
    exacts = list((exact.cpb_mlp if family == V2 else exact.meta_mlp).parameters())
    dbias = torch.randn(2, 24, 24, device=KERNEL_DEVICE)
    bias = attention.position_bias()
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=impl == "triton"):  # products of modules it would round
        grads = torch.autograd.grad(bias, parameters, dbias)
    for our, expected in zip(grads, torch.autograd.grad(exact.position_bias(), exacts, dbias.double()), strict=True):
        assert our.dtype == torch.float32 and relative_error(our, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_mlp_is_called_where_somebody_could_tell(family):
    attention = make_attention(family, impl="triton")
    mlp = attention.cpb_mlp if family == V2 else attention.meta_mlp
    seen = []
    for module in mlp.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    attention.position_bias()
    assert set(seen) == set(mlp.modules())


class KnowsLinearAlone(torch.Tensor):
    """As quantised weights do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*[x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in args])
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "timm_flashwin" in str(function):
            raise NotImplementedError(function)
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_mlp_is_called_where_its_weights_are_of_another_class(family):
    attention = make_attention(family, impl="triton")
    expected = attention.position_bias()
    linear = (attention.cpb_mlp[0] if family == V2 else attention.meta_mlp.fc1).requires_grad_(False)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(KnowsLinearAlone), requires_grad=False)
    torch.testing.assert_close(attention.position_bias(), expected, rtol=1e-5, atol=1e-6)


def test_crs_bias_mlp_sees_each_relative_position_once_where_nothing_can_tell():
    attention = make_attention(CR, (4, 6))
    coordinates = distance_rows(attention.relative_coordinates_log, attention.window_size)
    assert coordinates.shape == (7 * 11, 2) and coordinates.unique(dim=0).shape == coordinates.shape
    assert torch.equal(coordinates.unique(dim=0), attention.relative_coordinates_log.unique(dim=0))


def in_training(attention):
    attention.train()


def hook_mlp(attention):
    attention.meta_mlp.fc1.register_forward_hook(lambda module, args, output: output - output.mean(0))


def normalise_mlp(attention):
    attention.meta_mlp.norm = torch.nn.BatchNorm1d(384, track_running_stats=False, device=KERNEL_DEVICE)


def own_method(attention):
    attention._relative_positional_encodings = lambda: torch.ones(1, 2, 24, 24, device=KERNEL_DEVICE)


@pytest.mark.parametrize("change", [in_training, hook_mlp, normalise_mlp, own_method])
def test_crs_bias_is_made_by_timm_where_its_mlp_sees_how_often_a_row_occurs(change):
    attention = make_attention(CR, (4, 6))
    change(attention)
    biases = []
    for make in (attention.position_bias, attention._relative_positional_encodings):
        torch.manual_seed(1)
        biases.append(make())
    assert torch.equal(biases[0], biases[1][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_under_autocast_is_as_exact_as_timms(family, ieee):
    flash = make_attention(family)
    accelerate(flash, impl="triton" if GPU else "reference")
    stock = copy.deepcopy(flash)
    stock.__class__ = ATTENTIONS[family]
    x = torch.randn(64, 24, 32, device=KERNEL_DEVICE)
    weight = torch.randn_like(x)
    results = {}
    for key, attention in (("exact", copy.deepcopy(stock).double()), ("timm", stock), ("flash", flash)):
        with torch.autocast(KERNEL_DEVICE, torch.bfloat16, enabled=key != "exact"):
            out = attention(x.double() if key == "exact" else x)
        (out.double() * weight).sum().backward()
        results[key] = {"out": out} | {name: parameter.grad for name, parameter in attention.named_parameters()}
    assert results["flash"]["out"].dtype == results["timm"]["out"].dtype
    for name, exact in results["exact"].items():
        if name != "meta_mlp.fc2.bias":  # no softmax feels it
            assert_as_exact_as_timm(name, results["flash"][name].bfloat16(), results["timm"][name], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["swinv2_base_window16_256", "swinv2_base_window12to24_192to384", "swinv2_cr_base_224"]
)
def test_full_size_models_are_as_exact_as_timms_under_autocast(name, dtype, ieee):
    stock, flash = (model.eval() for model in make_pair(name))
    timm_flashwin.accelerate(flash, impl="triton")
    x, exact = torch.randn(2, *stock.default_cfg["input_size"], device="cuda"), copy.deepcopy(stock).double()
    with torch.no_grad():
        expected = exact(x.double())
        with torch.autocast("cuda", dtype):
            assert_as_exact_as_timm("logits", flash(x), stock(x), expected)
