import subprocess
import sys

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

import timm_flashwin  # noqa: F401  (registers the names)
from timm_flashwin.models.registry import ALIASES, flashwin_names

TIMM_ARCHS = [name for name in timm.list_models(["swin_*", "swinv2_*"]) if "flashwin" not in name]


def test_every_swin_of_timm_has_a_twin_and_the_short_names_exist():
    for pattern, count in (("swin_", 9), ("swinv2_", 28), ("swinv2_cr_", 16)):
        assert len([name for name in TIMM_ARCHS if name.startswith(pattern)]) >= count
    expected = {arch + "_flashwin" for arch in TIMM_ARCHS} | set(ALIASES)
    assert set(timm.list_models("*flashwin*")) == expected
    assert {"swin_base_flashwin", "swin_large_384_flashwin", "swin_s3_tiny_224_flashwin"} <= expected
    assert {"swinv2_tiny_flashwin", "swinv2_large_flashwin", "swinv2_cr_giant_384_flashwin"} <= expected


@pytest.mark.parametrize("name", sorted(flashwin_names()))
def test_every_tag_of_timm_resolves_to_timms_own_hub_id(name):
    theirs = get_arch_pretrained_cfgs(flashwin_names()[name])
    ours = get_arch_pretrained_cfgs(name)
    assert [full.split(".", 1)[1] for full in ours] == [full.split(".", 1)[1] for full in theirs]
    for (our_name, our), (their_name, their) in zip(ours.items(), theirs.items(), strict=True):
        untrained = their_name.endswith(".untrained")
        assert our.hf_hub_id == their.hf_hub_id == (None if untrained else f"timm/{their_name}")
        assert our.architecture == name
        assert (our.input_size, our.num_classes, our.mean) == (their.input_size, their.num_classes, their.mean)
        assert timm.is_model_pretrained(our_name) != untrained
        assert (our_name in timm.list_models("*flashwin*", pretrained=True)) != untrained
    assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(flashwin_names()[name]).tag


def test_a_model_knows_where_its_weights_come_from():
    model = timm.create_model("swin_base_flashwin.ms_in22k", img_size=32, embed_dim=32, num_heads=(1, 1, 1, 1))
    assert model.pretrained_cfg["hf_hub_id"] == "timm/swin_base_patch4_window7_224.ms_in22k"
    assert model.num_classes == 21841
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model("swin_base_flashwin.no_such_tag", img_size=32)


def test_a_local_file_stands_in_for_the_weights(tmp_path):
    from safetensors.torch import save_file

    small = dict(img_size=64, embed_dim=32, num_heads=(1, 2, 4, 8), depths=(2, 2, 2, 2), num_classes=5)
    stock = timm.create_model("swin_tiny_patch4_window7_224", **small)
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=5)
    flash = timm.create_model("swin_tiny_flashwin", pretrained=True, pretrained_cfg_overlay=overlay, **small)
    for name, tensor in stock.state_dict().items():
        assert (flash.state_dict()[name] == tensor).all()


def test_registering_overwrites_nothing_and_warns_about_nothing():
    code = """
import timm
before = dict(timm.models._registry._model_entrypoints)
import timm_flashwin
after = timm.models._registry._model_entrypoints
assert all(after[name] is entrypoint for name, entrypoint in before.items())
assert len(after) > len(before)
timm_flashwin.register_all()
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


@pytest.mark.parametrize(
    "name, block, attention",
    [
        ("swin_tiny_flashwin", "FlashSwinTransformerBlock", "FlashWindowAttention"),
        ("swinv2_tiny_flashwin", "FlashSwinTransformerV2Block", "FlashSwinV2WindowAttention"),
        ("swinv2_cr_tiny_224_flashwin", "FlashSwinTransformerV2CrBlock", "FlashSwinV2CrWindowAttention"),
    ],
)
def test_a_created_model_has_the_kernels_under_it(name, block, attention):
    model = timm.create_model(name, img_size=64, embed_dim=32, num_heads=(1, 1, 1, 1))
    blocks = [module for module in model.modules() if hasattr(module, "attn")]
    assert {type(module).__name__ for module in blocks} == {block}
    assert {type(module.attn).__name__ for module in blocks} == {attention}


def test_features_by_a_traced_graph_are_timms_model():
    small = dict(img_size=56, depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 3, 4))
    model = timm.create_model("swin_tiny_flashwin", features_only=True, feature_cls="fx", **small)
    assert [features.shape[-1] for features in model(torch.randn(1, 3, 56, 56))] == [24, 48, 96, 192]
