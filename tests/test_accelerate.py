import copy

import pytest
import timm
import torch
from timm.models import swin_transformer
from torch import nn

import timm_flashwin

SMALL = dict(img_size=64, embed_dim=32, num_heads=(1, 2, 4, 8), depths=(2, 2, 2, 2), num_classes=7)
# timm's name, and the classes of the twin's blocks and attentions
FAMILIES = {
    "V1": ("swin_tiny_patch4_window7_224", "FlashSwinTransformerBlock", "FlashWindowAttention"),
    "V2": ("swinv2_tiny_window8_256", "FlashSwinTransformerV2Block", "FlashSwinV2WindowAttention"),
    "V2-CR": ("swinv2_cr_tiny_224", "FlashSwinTransformerV2CrBlock", "FlashSwinV2CrWindowAttention"),
}


@pytest.fixture
def model():
    return timm.create_model("swin_tiny_patch4_window7_224", **SMALL)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def any_model(family):
    return timm.create_model(family[0], **SMALL)


def stages_of(model):
    return model.stages if hasattr(model, "stages") else model.layers


def test_accelerate_reports_every_replaced_module_by_name(any_model, family):
    _, block, attention = family
    report = timm_flashwin.accelerate(any_model)
    stages = "stages" if hasattr(any_model, "stages") else "layers"
    expected = {f"{stages}.{i}.blocks.{j}{part}" for i in range(4) for j in range(2) for part in ("", ".attn", ".mlp")}
    expected.add("patch_embed.proj")
    assert set(report.replaced) == expected and not report.already and not report.skipped
    assert report.replaced[f"{stages}.0.blocks.0"] == block
    assert f"{stages}.0.blocks.0.attn: {attention}" in str(report)
    assert set(timm_flashwin.accelerate(any_model).already) == expected


def test_accelerate_and_restore_leave_everything_else_untouched(any_model):
    model, stages = any_model, stages_of(any_model)
    model.train()
    stages[1].eval()
    model.set_grad_checkpointing()
    calls = []
    stages[0].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    stages[0].blocks[0].note = "mine"

    def snapshot():
        return {
            name: (type(m), m.training, dict(m._forward_hooks), {k: v for k, v in vars(m).items() if k[0] != "_"})
            for name, m in model.named_modules()
        }

    tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    keys, before = list(model.state_dict()), snapshot()
    timm_flashwin.accelerate(model, impl="reference")
    accelerated = snapshot()
    assert list(model.state_dict()) == keys
    assert {name: state[1:3] for name, state in accelerated.items()} == {n: s[1:3] for n, s in before.items()}
    model(torch.randn(1, 3, 64, 64))
    assert calls
    timm_flashwin.restore(model)
    assert snapshot() == before
    assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors


def test_a_restored_model_computes_timms_bits(any_model):
    model = any_model
    x = torch.randn(1, 3, 64, 64)
    for stage in stages_of(model):
        for block in stage.blocks:
            nn.init.ones_(block.norm1.weight)  # V2 starts with 0
    expected = model.eval()(x)
    timm_flashwin.accelerate(model, impl="reference")
    torch.testing.assert_close(model(x), expected)
    timm_flashwin.restore(model)
    assert torch.equal(model(x), expected)


def test_state_dicts_load_strictly_into_each_other(any_model, family):
    model = any_model
    flash = timm.create_model(family[0] + "_flashwin", **SMALL)
    flash.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(flash.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    timm_flashwin.accelerate(copied)
    copied.load_state_dict(model.state_dict(), strict=True)


def test_part_of_a_model_and_a_wrapped_model_are_reached(model):
    timm_flashwin.accelerate(model.layers[0])
    assert type(model.layers[1].blocks[0]) is swin_transformer.SwinTransformerBlock
    report = timm_flashwin.accelerate(nn.ModuleDict({"backbone": model}))
    assert "backbone.layers.1.blocks.0" in report.replaced and "backbone.layers.0.blocks.0" in report.already


def test_nothing_to_replace_and_nothing_to_restore_raise(model):
    with pytest.raises(ValueError, match="Linear holds no Swin attention"):
        timm_flashwin.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no accelerated module"):
        timm_flashwin.restore(model)
    with pytest.raises(TypeError, match="model is a str"):
        timm_flashwin.accelerate("swin_base")
    with pytest.raises(ValueError, match="impl is 'fast'"):
        timm_flashwin.accelerate(model, impl="fast")


def test_subclasses_with_a_behaviour_of_their_own_are_left_alone(any_model):
    stages = stages_of(any_model)
    own, with_own = stages[0].blocks[0], stages[1].blocks[0]
    own.__class__ = type("Block", (type(own),), {})
    with_own.attn.__class__ = type("Attention", (type(with_own.attn),), {})
    report = timm_flashwin.accelerate(any_model)
    names = {name for name, module in any_model.named_modules() if module in (own, with_own, with_own.attn)}
    assert set(report.skipped) == names and len(names) == 3
    assert type(own).__name__ == "Block" and type(with_own.attn).__name__ == "Attention"
    assert any_model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_a_model_of_several_families_is_accelerated_whole_and_restored():
    models = nn.ModuleList(timm.create_model(name, **SMALL) for name, *_ in FAMILIES.values())
    before = [type(module) for module in models.modules()]
    assert len(timm_flashwin.accelerate(models).replaced) == 3 * 25
    timm_flashwin.restore(models)
    assert [type(module) for module in models.modules()] == before


def test_restore_refuses_modules_that_changed_their_class_since(model):
    timm_flashwin.accelerate(model)
    attention = model.layers[0].blocks[0].attn
    attention.__class__ = type("Sharded", (type(attention),), {})
    assert "layers.0.blocks.0.attn" in timm_flashwin.accelerate(model).already
    with pytest.raises(ValueError, match="became Sharded after accelerate"):
        timm_flashwin.restore(model)
