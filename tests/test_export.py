"""What torch.export and ONNX make of a flashwin model: a program that holds the operators, or timm's plain one."""

import subprocess
import sys

import pytest
import timm
import torch
from conftest import KERNEL_DEVICE
from judge import relative_error
from pairs import make_pair

import timm_flashwin

# One stage of 2x2 windows: a block without a shift and one with.
SMALL = dict(img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(1,), num_classes=3)


def images(batch):
    return torch.randn(batch, 3, 32, 32, device=KERNEL_DEVICE)


@pytest.fixture(scope="module")
def exported():
    """(model, its program for any batch)."""
    _, flash = make_pair(**SMALL)
    timm_flashwin.accelerate(flash.eval(), impl="triton")
    batch = torch.export.Dim("batch", min=1, max=64)
    return flash, torch.export.export(flash, (images(2),), dynamic_shapes=({0: batch},))


def test_the_program_holds_the_operator_and_takes_any_batch(exported):
    flash, program = exported
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("timm_flashwin.window_attention.default") == 2
    assert targets.count("timm_flashwin.relative_position_bias.default") == 2
    with torch.no_grad():
        for batch in (2, 5):
            x = images(batch)
            assert relative_error(program.module()(x), flash(x)) < 1e-6


LOAD = """
import sys, torch
try:
    torch.export.load(sys.argv[1])
except Exception as error:  # an operator nobody has registered: its name is in here, or PyTorch has logged it
    print(error, file=sys.stderr)
    import timm_flashwin
else:
    raise AssertionError("loaded without timm_flashwin")
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), expected)
"""


def test_a_saved_program_loads_where_timm_flashwin_is_imported_and_names_it_where_not(exported, tmp_path):
    flash, program = exported
    x, files = images(3), [tmp_path / "model.pt2", tmp_path / "tensors.pt"]
    torch.export.save(program, files[0])
    torch.save((x, flash(x).detach()), files[1])
    loading = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True)
    assert loading.returncode == 0, loading.stderr
    assert "timm_flashwin" in loading.stderr


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_an_exportable_model_becomes_the_onnx_model_that_timms_does(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = timm.create_model(name + "_flashwin", **SMALL, exportable=True).eval()
    x, path = torch.randn(2, 3, 32, 32), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True)
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    stock = timm.create_model(name, **SMALL).eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(torch.from_numpy(out), stock(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_an_aot_inductor_package_computes_what_the_model_does(name, tmp_path, ieee):
    _, flash = make_pair(name, **SMALL)
    timm_flashwin.accelerate(flash.eval(), impl="triton")
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(flash, (images(2),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = images(5)
        assert relative_error(torch._inductor.aoti_load_package(path)(x), flash(x)) < 1e-4
