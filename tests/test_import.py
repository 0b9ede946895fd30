"""What the import does not do, seen in fresh processes."""

import subprocess
import sys
import textwrap

BLOCK_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton' (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""
BREAK_TRITON = """
import sys
class Breaker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise OSError("libtriton.so: undefined symbol")
import torch, timm
sys.meta_path.insert(0, Breaker())
for name in [n for n in sys.modules if n.split(".")[0] == "triton"]:
    del sys.modules[name]
"""
USE_WITHOUT_TRITON = """
import timm, torch, timm_flashwin
model = timm.create_model("swin_tiny_flashwin", img_size=32, embed_dim=32, num_heads=(1, 1, 1, 1), num_classes=3)
assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
try:
    timm_flashwin.window_attention(torch.randn(1, 8, 8, 96), 1, 4, impl="triton")
except ValueError as error:
    assert "Triton cannot be used" in str(error), error
else:
    raise AssertionError("impl='triton' ran without Triton")
"""


def run(code, **kwargs):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, text=True, **kwargs)


def test_import_starts_no_cuda_imports_no_kernel_and_patches_nothing():
    run("""
        import sys, timm, torch
        from timm.models import swin_transformer
        modules = set(sys.modules)
        classes = {name: vars(cls).copy() for name, cls in vars(swin_transformer).items() if isinstance(cls, type)}
        import timm_flashwin
        new = set(sys.modules) - modules
        assert not torch.cuda.is_initialized()
        assert not any(name.split(".")[0] == "triton" for name in new), new
        assert not any(name.startswith("timm_flashwin.kernels.") for name in new), new
        for name, attributes in classes.items():
            assert dict(vars(getattr(swin_transformer, name))) == dict(attributes), name
    """)


def test_import_writes_no_file_and_prints_nothing(tmp_path):
    result = run("import timm, timm_flashwin", cwd=tmp_path, capture_output=True)
    assert list(tmp_path.iterdir()) == []
    assert result.stdout == ""


def test_models_work_where_triton_is_missing():
    run(BLOCK_TRITON + USE_WITHOUT_TRITON)


def test_models_work_where_triton_is_broken():
    run(BREAK_TRITON + USE_WITHOUT_TRITON)
