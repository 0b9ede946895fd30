import copy

import pytest
import timm
import torch
from timm.models import swin_transformer
from torch import nn

import timm_flashwin

SMALL = dict(img_size=64, embed_dim=32, num_heads=(1, 2, 4, 8), depths=(2, 2, 2, 2), num_classes=7)


@pytest.fixture
def model():
    return timm.create_model("swin_tiny_patch4_window7_224", **SMALL)


def test_accelerate_reports_every_replaced_module_by_name(model):
    report = timm_flashwin.accelerate(model)
    expected = {f"layers.{i}.blocks.{j}{part}" for i in range(4) for j in range(2) for part in ("", ".attn")}
    assert set(report.replaced) == expected and not report.already and not report.skipped
    assert report.replaced["layers.0.blocks.0"] == "FlashSwinTransformerBlock"
    assert "layers.0.blocks.0.attn: FlashWindowAttention" in str(report)
    assert set(timm_flashwin.accelerate(model).already) == expected


def test_accelerate_and_restore_leave_everything_else_untouched(model):
    model.train()
    model.layers[1].eval()
    model.set_grad_checkpointing()
    calls = []
    model.layers[0].blocks[0].register_forward_hook(lambda *_: calls.append(1))
    model.layers[0].blocks[0].note = "mine"

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


def test_a_restored_model_computes_timms_bits(model):
    x = torch.randn(1, 3, 64, 64)
    expected = model.eval()(x)
    timm_flashwin.accelerate(model, impl="reference")
    assert not torch.equal(model(x), expected)
    timm_flashwin.restore(model)
    assert torch.equal(model(x), expected)


def test_state_dicts_load_strictly_into_each_other(model):
    flash = timm.create_model("swin_tiny_flashwin", **SMALL)
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


def test_subclasses_with_a_behaviour_of_their_own_are_left_alone(model):
    class Block(swin_transformer.SwinTransformerBlock):
        pass

    class Attention(swin_transformer.WindowAttention):
        pass

    model.layers[0].blocks[0].__class__ = Block
    model.layers[1].blocks[0].attn.__class__ = Attention
    report = timm_flashwin.accelerate(model)
    assert set(report.skipped) == {"layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.0.attn"}
    assert type(model.layers[0].blocks[0]) is Block
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_restore_refuses_modules_that_changed_their_class_since(model):
    timm_flashwin.accelerate(model)
    attention = model.layers[0].blocks[0].attn
    attention.__class__ = type("Sharded", (type(attention),), {})
    assert "layers.0.blocks.0.attn" in timm_flashwin.accelerate(model).already
    with pytest.raises(ValueError, match="became Sharded after accelerate"):
        timm_flashwin.restore(model)
