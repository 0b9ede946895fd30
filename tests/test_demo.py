"""The promises of the demo: it works offline, on what ships with the package, and both models say the same."""

import dataclasses
import json
import socket

import pytest
import timm
import torch

import timm_flashwin
from timm_flashwin import demo
from timm_flashwin.cli import main
from timm_flashwin.models.registry import flashwin_names


@pytest.fixture(scope="module")
def checkpoint():
    with demo.asset(demo.WEIGHTS) as path:
        return demo.read_checkpoint(path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_demo_works_offline_and_agrees_with_timm(no_network, capsys):
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "same prediction           40 of 40" in out
    assert ("Triton kernels on" if torch.cuda.is_available() else "plain PyTorch: the tensors are on the CPU") in out


def test_demo_fails_where_the_models_disagree(monkeypatch, capsys, checkpoint):
    stock, flashwin = demo.build_models(checkpoint, torch.device("cpu"))
    torch.nn.init.zeros_(flashwin.head.fc.weight)
    monkeypatch.setattr(demo, "build_models", lambda *args: (stock, flashwin))
    assert main(["demo", "--device", "cpu"]) == 1
    assert "same prediction           40 of 40" not in capsys.readouterr().out


def test_kernels_agree_with_timm_on_the_shipped_weights(checkpoint, kernel_device):
    stock, flashwin = demo.build_models(checkpoint, torch.device(kernel_device))
    timm_flashwin.accelerate(flashwin, impl="triton")
    images = demo.load_images(checkpoint)[0][:2].to(kernel_device)  # two: the interpreter takes its time
    with torch.inference_mode():
        torch.testing.assert_close(flashwin(images), stock(images), rtol=1e-4, atol=1e-4)


def test_shipped_weights_classify_the_shipped_images(checkpoint):
    stock, _ = demo.build_models(checkpoint, torch.device("cpu"))
    images, labels = demo.load_images(checkpoint)
    with torch.inference_mode():
        correct = (stock(images).argmax(1) == labels).sum()
    assert correct >= 34  # of 40
    assert checkpoint.test_accuracy >= 0.9


def test_shipped_weights_are_small_and_in_float32(checkpoint):
    with demo.asset(demo.WEIGHTS) as path:
        assert path.stat().st_size <= 3_000_000
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float32}


def test_demo_model_has_shifted_windows_and_more_than_one_window(checkpoint):
    _, flashwin = demo.build_models(checkpoint, torch.device("cpu"))
    blocks = [block for stage in flashwin.layers for block in stage.blocks]
    shifted = [block for block in blocks if any(block.shift_size)]
    assert shifted and len(shifted) < len(blocks)
    assert all(block.input_resolution == (14, 14) and block.window_size == (7, 7) for block in shifted)


@pytest.mark.parametrize("name", ["swin_tiny_flashwin", "swinv2_tiny_flashwin", "swinv2_cr_tiny_224_flashwin"])
def test_every_family_is_told_from_timms_own(name):
    small = dict(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 1))
    assert "the tensors are on the CPU" in demo.implementation(timm.create_model(name, **small))
    stock = timm.create_model(flashwin_names()[name], **small)
    assert demo.implementation(stock).startswith("timm's own Swin")


def test_weights_that_do_not_fit_are_refused(checkpoint):
    incomplete = {name: tensor for name, tensor in checkpoint.state_dict.items() if name != "norm.bias"}
    with pytest.raises(RuntimeError, match="norm.bias"):
        demo.build_models(dataclasses.replace(checkpoint, state_dict=incomplete), torch.device("cpu"))


def test_sheet_holds_four_images_of_every_class_and_their_licence():
    with demo.asset(demo.LABELS) as path:
        contents = json.loads(path.read_text())
    assert sorted(contents["labels"]) == sorted(list(range(10)) * 4)
    assert len(set(contents["test_indices"])) == 40
    with demo.asset("LICENSE-fashion-mnist.txt") as path:
        licence = path.read_text()
    assert "2017 Zalando SE" in licence and "Permission is hereby granted" in licence
