"""The promises of the command line: right answers, weights from timm's places, plain words where something is wrong."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from timm_flashwin import demo
from timm_flashwin.cli import main
from timm_flashwin.models.registry import flashwin_names

STOCK, TWIN = "swin_tiny_patch4_window7_224", "swin_tiny_flashwin"
HUB_ID = "timm/swin_tiny_patch4_window7_224.ms_in1k"


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return timm.create_model(STOCK).eval()


@pytest.fixture(scope="module")
def checkpoint(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(stock.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "photo.png"
    with demo.asset(demo.SHEET) as sheet, Image.open(sheet) as image:
        image.convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def top_5(stock, photo):
    """What timm's own model and pipeline say about the photo."""
    transform = create_transform(**resolve_model_data_config(stock))
    with torch.inference_mode(), Image.open(photo) as image:
        indices = stock(transform(image.convert("RGB")).unsqueeze(0))[0].topk(5).indices
    return [ImageNetInfo().index_to_description(index) for index in indices.tolist()]


def classify(*args) -> int:
    return main(["classify", "--device", "cpu", *map(str, args)])


def printed_labels(out: str) -> list[str]:
    """The class lines: '   12.34%  label'."""
    return [line.partition("%  ")[2] for line in out.splitlines() if line.startswith("  ")]


# --------------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize("model", [TWIN, STOCK])
def test_classify_prints_the_5_classes_that_timm_finds(model, checkpoint, photo, top_5, capsys):
    assert classify(photo, "--model", model, "--checkpoint", checkpoint) == 0
    captured = capsys.readouterr()
    assert printed_labels(captured.out) == top_5
    assert ("plain PyTorch" in captured.out) == (model == TWIN)
    assert ("timm's own" in captured.out) == (model == STOCK)
    assert captured.err == ""


def test_checkpoint_of_timms_train_script_loads_with_its_ema_weights(stock, photo, top_5, tmp_path, capsys):
    path = tmp_path / "model_best.pth.tar"
    raw = {name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}
    torch.save({"state_dict": raw, "state_dict_ema": stock.state_dict(), "args": Namespace(model=TWIN)}, path)
    assert classify(photo, "--model", TWIN, "--checkpoint", path) == 0
    assert printed_labels(capsys.readouterr().out) == top_5


def test_classes_without_known_names_are_printed_by_index(photo, tmp_path, capsys):
    model = timm.create_model(TWIN, num_classes=3)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data = torch.tensor([0.0, 2.0, 1.0])
    save_file(model.state_dict(), tmp_path / "three.safetensors")
    assert classify(photo, photo, "--model", TWIN, "--checkpoint", tmp_path / "three.safetensors") == 0
    assert printed_labels(capsys.readouterr().out) == ["class 1", "class 2", "class 0"] * 2


def test_top_k_sets_the_number_of_classes(checkpoint, photo, top_5, capsys):
    assert classify(photo, "--model", TWIN, "--checkpoint", checkpoint, "--top-k", 2) == 0
    assert printed_labels(capsys.readouterr().out) == top_5[:2]


def test_random_weights_are_called_random(photo, capsys):
    assert classify(photo, "--model", TWIN) == 0
    assert "weights are random" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the models command


def listed(out: str) -> dict[str, list[str]]:
    """Name -> the other columns."""
    return {name: columns for name, *columns in (re.split(" {2,}", line) for line in out.splitlines()[1:])}


def test_models_lists_every_name_with_its_twin_and_every_tag(capsys):
    assert main(["models"]) == 0
    lines = listed(capsys.readouterr().out)
    assert {name: columns[0] for name, columns in lines.items()} == flashwin_names()
    for _, (arch, tags) in lines.items():
        tags = [] if tags == "-" else tags.split(", ")
        assert set(timm.list_pretrained(arch + ".*")) == {f"{arch}.{tag}" for tag in tags}
        assert tags == [] or tags[0] == timm.get_pretrained_cfg(arch).tag  # what pretrained=True takes


def test_models_filters_by_the_name_and_by_timms(capsys):
    assert main(["models", "swin_tiny_patch4*"]) == 0
    assert set(listed(capsys.readouterr().out)) == {TWIN, STOCK + "_flashwin"}
    assert main(["models", "*v2_base_flash*"]) == 0
    assert set(listed(capsys.readouterr().out)) == {"swinv2_base_flashwin"}


def test_models_without_a_match_says_so(capsys):
    assert main(["models", "resnet*"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "'resnet*'" in captured.err


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{photo}", "--model", "swin_tiny_flashwim"], "swin_tiny_flashwin"),
        (["{photo}", "--model", "swin_tiny_flashwin.ms_in2k"], "ms_in1k"),
        (["{tmp}/none.png", "--model", TWIN], "none.png is no file"),
        (["{tmp}/text.png", "--model", TWIN], "text.png cannot be read as an image"),
        (["{tmp}/cut.png", "--model", TWIN], "cut.png cannot be read as an image"),
        (["{photo}", "--model", TWIN, "--checkpoint", "{tmp}/none.pth"], "none.pth is no file"),
        (["{photo}", "--model", TWIN, "--checkpoint", "{tmp}/text.pth"], "text.pth cannot be loaded"),
        (["{photo}", "--model", TWIN, "--checkpoint", "{tmp}/text.pth"], "it has to be .safetensors, or a .pth"),
        (["{photo}", "--model", TWIN, "--checkpoint", "{tmp}/text.safetensors"], "text.safetensors cannot be loaded"),
        (["{photo}", "--model", TWIN, "--checkpoint", "{tmp}/tensor.pth"], "tensor.pth cannot be loaded"),
        (["{photo}", "--model", "resnet18", "--checkpoint", "{checkpoint}"], "cannot be loaded into ResNet"),
        (["{photo}", "--model", TWIN, "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["{photo}", "--model", TWIN, "--device", "gpu"], "--device gpu cannot be used"),
        (["{photo}", "--model", TWIN, "--device", "meta"], "--device meta cannot be used"),
    ],
)
def test_wrong_input_is_named_in_one_line(args, message, photo, checkpoint, tmp_path, capsys):
    for name in ("text.png", "text.pth", "text.safetensors"):
        (tmp_path / name).write_text("this is neither an image nor a checkpoint")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:2000])
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    args = [arg.format(photo=photo, tmp=tmp_path, checkpoint=checkpoint) for arg in args]

    assert main(["classify", *args]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "warning:" not in line]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("args", [[], ["classify"], ["classify", "x.png", "--top-k", "0"]])
def test_wrong_usage_exits_with_status_2(args, capsys):
    with pytest.raises(SystemExit) as error:
        main(args)
    assert error.value.code == 2
    assert "usage: timm-flashwin" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(checkpoint, tmp_path):
    """A hub on this machine that has the weights."""
    repository = tmp_path / "served" / HUB_ID
    repository.mkdir(parents=True)
    (repository / "model.safetensors").symlink_to(checkpoint)
    with LocalHub(tmp_path / "served") as hub:
        yield hub


def classify_with_hub(hub: LocalHub, cache: Path, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "timm_flashwin", "classify", "--device", "cpu", "--pretrained", *map(str, args)]
    return subprocess.run(command, env=hub.environment(cache), capture_output=True, text=True, timeout=300)


def test_pretrained_weights_travel_from_the_hub_and_then_from_its_cache(hub, photo, top_5, tmp_path):
    first = classify_with_hub(hub, tmp_path, photo, "--model", TWIN)
    assert (first.returncode, printed_labels(first.stdout)) == (0, top_5), first.stderr
    assert f"GET /{HUB_ID}/resolve/main/model.safetensors" in hub.requests

    hub.close()
    again = classify_with_hub(hub, tmp_path, photo, "--model", TWIN)
    assert (again.returncode, printed_labels(again.stdout)) == (0, top_5), again.stderr

    (cached,) = tmp_path.rglob("snapshots/*/model.safetensors")
    cached.resolve().write_bytes(b"damaged")
    damaged = classify_with_hub(hub, tmp_path, photo, "--model", TWIN)
    assert (damaged.returncode, damaged.stdout, len(damaged.stderr.splitlines())) == (1, "", 1), damaged.stderr
    assert "damaged" in damaged.stderr and HUB_ID in damaged.stderr


def test_unreachable_hub_is_reported_plainly_and_at_once(photo, tmp_path):
    with LocalHub(tmp_path) as hub:
        pass  # closed again when the client asks
    result = classify_with_hub(hub, tmp_path, photo, "--model", TWIN)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1  # no traceback, and no retries, which are logged
    assert HUB_ID in result.stderr and "could not be fetched" in result.stderr and "refused" in result.stderr


def test_weights_that_the_hub_does_not_have_are_reported_plainly(hub, photo, tmp_path):
    result = classify_with_hub(hub, tmp_path, photo, "--model", "swin_small_flashwin")
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1 and "timm/swin_small_patch4_window7_224" in result.stderr


def test_pretrained_without_weights_to_fetch_is_named_in_one_line(photo, capsys):
    name = next(name for name in timm.list_models("vit_*") if not timm.list_pretrained(name + "*"))
    assert classify(photo, "--model", name, "--pretrained") == 2
    assert f"timm has no weights for {name}" in capsys.readouterr().err
