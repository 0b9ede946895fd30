"""scripts/profile_model.py: every bit of a step is found, in its category, and the floor's bytes are those it names."""

import importlib
import json
from pathlib import Path

import pytest
import timm
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F

import timm_flashwin

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
FAMILIES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")
SMALL = dict(img_size=32, embed_dim=32, depths=(2, 1), num_heads=(1, 2), num_classes=10)  # maps of 8x8 and 4x4


@pytest.fixture(scope="module")
def profile_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # the scripts import each other
        yield importlib.import_module("profile_model")


def profiled_training(profile_model, model, device: torch.device):
    """A step in mixed precision; float16, because Triton's interpreter has no products in bfloat16."""
    model.train().to(device)
    images, labels = torch.randn(1, 3, 32, 32, device=device), torch.tensor([3], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    step()
    return profile_model.profile_steps(step, device, steps=1)


@pytest.mark.parametrize("arch", FAMILIES)
def test_twins_differ_in_the_attention_and_in_what_is_fused_alone(profile_model, arch, kernel_device):
    device = torch.device(kernel_device)
    profiles = []
    for impl in (None, "triton"):
        model = timm.create_model(arch, window_size=4, drop_path_rate=0.2, **SMALL)
        if impl:
            timm_flashwin.accelerate(model, impl=impl)
        profiles.append(profiled_training(profile_model, model, device))
        assert not profiles[-1].unknown
        assert profiles[-1].ms.keys() == set(profile_model.CATEGORIES) - {"other", "gaps"}
    stock, ours = (profile.launches for profile in profiles)
    stock.pop("linears"), ours.pop("linears")  # cuBLAS chooses how many kernels make a product
    attention = ours.pop("attention"), stock.pop("attention")
    fused = [(ours.pop(name), stock.pop(name)) for name in ("norms", "residual_adds", "copies")]
    if kernel_device == "cuda":
        assert attention[0] < attention[1]
        assert sum(our for our, _ in fused) < sum(theirs for _, theirs in fused)
    else:  # what is counted are operators: a thousand a kernel in the interpreter, and views around the adds
        for name in ("activations", "pooling_and_loss"):
            stock.pop(name), ours.pop(name)
    assert ours == stock


def test_kernels_count_once_and_what_no_operator_launched_is_said(profile_model):
    def event(name: str, start: float, end: float, **options) -> FunctionEvent:
        return FunctionEvent(0, name, 1, start, end, use_device="cuda", **options)

    def kernel(start: float, end: float, **options) -> FunctionEvent:
        return event("kernel", start, end, device_type=DeviceType.CUDA, **options)

    layer_norm, add = event("aten::native_layer_norm", 0, 2), event("aten::add", 3, 4)
    layer_norm.append_kernel("kernel", 0, 6.0)
    add.append_kernel("kernel", 0, 4.0)
    on_device = [kernel(10, 16), kernel(14, 18), kernel(20, 21), kernel(10, 30, is_user_annotation=True)]
    measured = profile_model.device_profile([layer_norm, add, *on_device], steps=2)
    assert measured.ms == pytest.approx({"norms": 3e-3, "residual_adds": 2e-3, "other": 0.5e-3})
    assert measured.launches == {"norms": 0.5, "residual_adds": 0.5, "other": 0.5}
    assert measured.busy_ms == pytest.approx(4.5e-3)  # 10 to 18 and 20 to 21, in two steps
    assert measured.unknown == pytest.approx({"(kernels without an operator)": 0.5e-3})


@pytest.mark.parametrize("train", [False, True])
def test_bytes_of_the_floor_are_those_of_the_table(profile_model, train):
    model = timm.create_model(FAMILIES[0], window_size=3, **SMALL)  # windows that need padding, which does not count
    images = torch.randn(2, 3, 32, 32)
    moved = profile_model.bytes_moved(model, lambda: model(images), train)
    maps = (2 * 8 * 8 * 32 * 4, 2 * 4 * 4 * 64 * 4)  # bytes of the two stages' maps
    blocks = 2 * maps[0] + maps[1]
    norms = 2 * blocks + maps[0] + maps[0] + maps[1]  # two a block; patch embedding, patch merging, last one
    expected = {
        "attention": blocks * (11 if train else 4),
        "norms": norms * (5 if train else 2),
        "activations": 4 * blocks * (5 if train else 2),
        "residual_adds": 2 * blocks * (6 if train else 3),
        "copies": maps[0] * (4 if train else 2),
    }
    if train:
        expected["optimizer"] = 7 * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert moved == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_the_script_runs_on_a_cpu_and_its_rows_add_up(profile_model, monkeypatch, capsys, tmp_path):
    out = tmp_path / "profile.jsonl"
    arguments = "--batch 1 --img-size 32 --task train --precision fp32 --steps 1 --repeats 1 --device cpu --commit abc"
    command = ["profile_model.py", "--model", FAMILIES[0], *arguments.split(), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the script turns it on
    profile_model.main()
    printed = capsys.readouterr().out
    assert "profiled on cpu: host time" in printed
    assert "no category for" not in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["category"] for row in rows] == 2 * [*profile_model.CATEGORIES, "step"]
    for provider in profile_model.PROVIDERS:
        *parts, step = (row for row in rows if row["provider"] == provider)
        assert sum(row["ms"] for row in parts) == pytest.approx(step["ms"], rel=1e-3)
        assert sum(row["share"] for row in parts) == pytest.approx(1, rel=1e-3)
        assert sum(row["floor_ms"] for row in parts) == pytest.approx(step["floor_ms"], rel=1e-3)
        assert all(row["ms"] > 0 for row in parts if row["category"] != "other")
    assert all(row["device"] == "cpu" and row["commit"] == "abc" and row["precision"] == "fp32" for row in rows)
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0].keys() >= {*profile_model.KEY, "ms", "share", "launches", "floor_ms", "floor_bytes", "torch", "timm"}
