"""The promises of `timm-flashwin parity`: true numbers, a status that tells, and plain words about wrong input."""

import csv
import json
import multiprocessing
import subprocess
import sys

import pytest
import timm
import torch
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import save_file

from timm_flashwin import demo, parity
from timm_flashwin.cli import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint():
    with demo.asset(demo.WEIGHTS) as path:
        return demo.read_checkpoint(path)


@pytest.fixture(scope="module")
def imagenet(checkpoint, tmp_path_factory):
    """The demo's 40 images as people have ImageNet: <root>/val/<synset>/<file>.JPEG, here without loss."""
    root = tmp_path_factory.mktemp("imagenet")
    with demo.asset(demo.LABELS) as path:
        contents = json.loads(path.read_text())
    size, columns = contents["tile_size"], contents["columns"]
    with demo.asset(demo.SHEET) as path, Image.open(path) as sheet:
        for i, label in enumerate(contents["labels"]):
            left, top = i % columns * size, i // columns * size
            folder = root / "val" / f"n{1440764 + 3 * label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            tile = sheet.crop((left, top, left + size, top + size)).convert("RGB")
            tile.save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG", format="PNG")
    return root


@pytest.fixture
def demo_pair(checkpoint, monkeypatch):
    """timm's model and its twin with the demo's weights, in place of those that `create_pair` makes from names."""
    config = dict(input_size=(3, 28, 28), mean=checkpoint.mean * 3, std=checkpoint.std * 3, crop_pct=1.0)
    kwargs = checkpoint.model_kwargs | {"in_chans": 3}
    weights = checkpoint.state_dict | {  # a grey image has three equal channels
        "patch_embed.proj.weight": checkpoint.state_dict["patch_embed.proj.weight"].repeat(1, 3, 1, 1) / 3
    }
    pair = []
    for name in (checkpoint.model, checkpoint.model + "_flashwin"):
        pair.append(timm.create_model(name, pretrained_cfg_overlay=config, **kwargs))
        pair[-1].load_state_dict(weights)
    monkeypatch.setattr(parity, "create_pair", lambda *args: pair)
    return pair


def run(*args, device="cpu") -> int:
    args = ("--model", "swin_tiny_flashwin", "--workers", 0, "--device", device, *args)
    return main(["parity", *map(str, args)])


# ------------------------------------------------------------------------------------------------ true numbers


def test_accuracy_is_that_of_the_shipped_weights_on_the_shipped_images(
    imagenet, demo_pair, checkpoint, tmp_path, capsys
):
    images, labels = demo.load_images(checkpoint)
    with torch.inference_mode():
        logits = demo.build_models(checkpoint, CPU)[0](images)
    top1 = (logits.argmax(1) == labels).sum().item() / 40 * 100
    top5 = (logits.topk(5).indices == labels[:, None]).sum().item() / 40 * 100

    outputs = "--json", tmp_path / "parity.json", "--csv", tmp_path / "parity.csv"
    assert run("--data-dir", imagenet, "--batch-size", 16, *outputs) == 0  # 16 does not divide 40
    row = json.loads((tmp_path / "parity.json").read_text())
    assert row["images"] == 40 and row["passed"] is True
    assert row["top1_timm"] == row["top1_flashwin"] == pytest.approx(top1)
    assert row["top5_timm"] == row["top5_flashwin"] == pytest.approx(top5)
    assert row["equal_predictions"] == 100
    assert row["mean_logit_difference"] <= row["max_logit_difference"] < 1e-4
    assert row["img_per_s_timm"] > 0 and row["img_per_s_flashwin"] > 0
    with (tmp_path / "parity.csv").open() as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()}]
    out = capsys.readouterr().out
    top1_line = next(line for line in out.splitlines() if line.startswith("top-1, %"))
    assert top1_line.split() == ["top-1,", "%", f"{top1:.3f}", f"{top1:.3f}", "+0.000"] and "passed" in out
    assert "40 images of 10 classes" in out and "plain PyTorch: the tensors are on the CPU" in out


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [[], ["--amp"], ["--amp", "--amp-dtype", "bfloat16"]], ids=["float32", "fp16", "bf16"])
def test_kernels_pass(imagenet, demo_pair, amp, capsys):
    assert run("--data-dir", imagenet, *amp, "--tolerance", 2.5, device="cuda") == 0  # one image of 40
    assert "Triton kernels on" in capsys.readouterr().out


def test_every_number_is_counted_over_images_not_batches():
    """Logits are the images themselves here, and the twin's differ in known places."""

    class Shifted(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 3.0, -1.0])

    batches = [
        (torch.eye(7)[[0, 1, 6]] * 2, torch.tensor([0, 1, 6])),  # class 5 becomes 3, class 6 becomes 1
        (torch.eye(7)[[5]], torch.tensor([4])),
    ]
    measured = parity.compare(torch.nn.Identity(), Shifted(), batches, CPU, None)
    assert measured["images"] == 4
    assert (measured["top1_timm"], measured["top1_flashwin"]) == (75, 0)
    assert measured["top5_flashwin"] <= measured["top5_timm"] == 100
    assert measured["equal_predictions"] == 25
    assert measured["max_logit_difference"] == 3
    assert measured["mean_logit_difference"] == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("name", "stock", "flashwin"),
    [
        ("swin_base_patch4_window7_224", "swin_base_patch4_window7_224", "swin_base_patch4_window7_224_flashwin"),
        ("swin_s3_tiny_224_flashwin", "swin_s3_tiny_224", "swin_s3_tiny_224_flashwin"),
        ("swin_base_flashwin", "swin_base_patch4_window7_224", "swin_base_flashwin"),
        ("swin_base", "swin_base_patch4_window7_224", "swin_base_flashwin"),
        ("swinv2_tiny_flashwin.ms_in1k", "swinv2_tiny_window16_256.ms_in1k", "swinv2_tiny_flashwin.ms_in1k"),
    ],
)
def test_every_way_to_name_a_swin_names_the_pair(name, stock, flashwin):
    assert parity.pair_names(name) == (stock, flashwin)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], torch.float32),
        (["--amp"], torch.float16),
        (["--amp", "--amp-dtype", "bfloat16"], torch.bfloat16),
    ],
    ids=str,
)
def test_both_models_run_in_the_precision_that_is_asked_for(options, dtype, imagenet, demo_pair, tmp_path):
    for folder in (imagenet / "val").iterdir():
        (tmp_path / folder.name).mkdir()
        image = min(folder.iterdir())
        (tmp_path / folder.name / image.name).symlink_to(image)
    seen = []
    for model in demo_pair:
        model.layers[1].blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert run("--data-dir", tmp_path, "--tolerance", 10, *options) == 0
    assert len(seen) == 4 and set(seen) == {dtype}  # each warmed up, then timed


def test_a_checkpoint_gives_both_models_its_weights_and_its_classes(imagenet, tmp_path, capsys):
    torch.manual_seed(0)
    trained = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2)
    save_file(trained.state_dict(), tmp_path / "two.safetensors")
    stock, flashwin = parity.create_pair(
        "swin_tiny_patch4_window7_224", "swin_tiny_flashwin", tmp_path / "two.safetensors"
    )
    for model in (stock, flashwin):
        assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())
    classes = sorted((imagenet / "val").iterdir())
    for folder in classes[:2]:
        (tmp_path / "val" / folder.name).mkdir(parents=True)
        image = next(folder.iterdir())
        (tmp_path / "val" / folder.name / image.name).symlink_to(image)
    assert run("--data-dir", tmp_path / "val", "--workers", 1, "--checkpoint", tmp_path / "two.safetensors") == 0
    assert "2 images of 2 classes" in capsys.readouterr().out


def test_weights_come_from_the_hub_where_no_checkpoint_is_given(imagenet, tmp_path):
    with LocalHub(tmp_path) as hub:  # which has none
        command = [sys.executable, "-m", "timm_flashwin", "parity", "--data-dir", str(imagenet), "--device", "cpu"]
        result = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k" in result.stderr
    assert any("swin_base_patch4_window7_224" in request for request in hub.requests)


# ----------------------------------------------------------------------------------------- a status that tells


def test_a_damaged_model_fails_unless_it_is_tolerated(imagenet, demo_pair, capsys):
    torch.nn.init.zeros_(demo_pair[1].head.fc.weight)
    assert run("--data-dir", imagenet) == 1
    assert "FAILED: top-1 may differ by 0.1 percentage points" in capsys.readouterr().out
    assert run("--data-dir", imagenet, "--tolerance", 100) == 0


def test_a_logit_lost_to_nan_fails_whatever_is_tolerated(imagenet, demo_pair, tmp_path):
    with torch.no_grad():
        demo_pair[1].head.fc.bias[3] = float("nan")
    assert run("--data-dir", imagenet, "--tolerance", 100, "--json", tmp_path / "parity.json") == 1
    row = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert row["passed"] is False and row["max_logit_difference"] is None


# -------------------------------------------------------------------------------------------------- wrong input


def one_error(capsys) -> str:
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data-dir", "{tmp}/none"], "none is no folder"),
        (["--data-dir", "{tmp}/file.txt"], "file.txt is no folder"),
        (["--data-dir", "{tmp}/empty"], "empty holds no image (.png, .jpg, .jpeg)"),
        (["--data-dir", "{tmp}/flat"], "a.png lies in no class folder"),
        (["--data-dir", "{tmp}/deep"], "a.png lies too deep"),
        (["--data-dir", "{tmp}/gap"], "gap/n2 holds no image (.png, .jpg, .jpeg); fill or remove it"),
        (["--data-dir", "{val}", "--checkpoint", "{tmp}/none.pth"], "none.pth is no file"),
        (["--data-dir", "{val}", "--checkpoint", "{tmp}/file.txt"], "file.txt cannot be loaded into SwinTransformer"),
        (["--data-dir", "{val}", "--model", "resnet18"], "resnet18 has no flashwin twin"),
        (["--data-dir", "{val}", "--model", "swin_bose_flashwin"], "did you mean swin_base_flashwin"),
        (["--data-dir", "{val}", "--model", "swin_tiny_flashwin.ms_in2k"], "there are ms_in1k"),
        (["--data-dir", "{val}", "--model", "swinv2_cr_tiny_224"], "timm has no weights for swinv2_cr_tiny_224"),
        (["--data-dir", "{val}", "--amp-dtype", "bfloat16"], "without --amp"),
        (["--data-dir", "{val}", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--data-dir", "{val}", "--json", "{tmp}/none/a.json"], "none/a.json cannot be written"),
        (["--data-dir", "{val}", "--csv", "{tmp}"], "cannot be written"),
        (["--data-dir", "{val}", "--json", "/proc/a.json"], "/proc/a.json cannot be written"),
    ],
)
def test_wrong_input_is_named_in_one_line(args, message, imagenet, tmp_path, capsys):
    (tmp_path / "file.txt").write_text("neither a folder nor a checkpoint")
    (tmp_path / "empty" / "n1").mkdir(parents=True)
    for image in ("flat/a.png", "deep/train/n1/a.png", "gap/n1/a.png"):
        (tmp_path / image).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / image)
    (tmp_path / "gap" / "n2").mkdir()
    assert run(*[arg.format(tmp=tmp_path, val=imagenet) for arg in args]) == 2
    assert message in one_error(capsys)


def test_another_number_of_classes_than_the_models_is_named(imagenet, demo_pair, tmp_path, capsys):
    for folder in sorted((imagenet / "val").iterdir())[1:]:
        (tmp_path / folder.name).symlink_to(folder)
    assert run("--data-dir", tmp_path) == 2
    assert "has 9 class folders and swin_tiny_patch4_window7_224 10 classes" in one_error(capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_not_skipped(workers, imagenet, demo_pair, tmp_path, capsys):
    first, *others = sorted((imagenet / "val").iterdir())
    for folder in others:
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / first.name).mkdir()
    (tmp_path / first.name / "cut.JPEG").write_bytes(next(first.iterdir()).read_bytes()[:200])
    assert run("--data-dir", tmp_path, "--workers", workers) == 2
    assert not multiprocessing.active_children()
    message = one_error(capsys)
    assert message.startswith("timm-flashwin: error: /") and "cut.JPEG cannot be read as an image" in message


@pytest.mark.parametrize("args", [[], ["--data-dir", "x", "--tolerance", "-1"], ["--data-dir", "x", "--workers", "-1"]])
def test_wrong_usage_exits_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as error:
        main(["parity", *args])
    assert error.value.code == 2
    assert "usage: timm-flashwin parity" in capsys.readouterr().err
