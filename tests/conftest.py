"""Where the kernels run in the tests: on the GPU if there is one, else on the CPU in Triton's interpreter."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before a kernel is defined
KERNEL_DEVICE = "cuda" if GPU else "cpu"


def pytest_addoption(parser):
    parser.addoption(
        "--timm-scripts",
        type=Path,
        metavar="DIR",
        help="folder with timm's train.py, validate.py, ...: the top of its repository; no release on PyPI has them",
    )


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def timm_scripts(request) -> Path:
    """The folder of --timm-scripts; without it the test is skipped."""
    folder = request.config.getoption("--timm-scripts")
    if folder is None:
        pytest.skip("needs timm's own scripts: pytest --timm-scripts DIR")
    return folder.resolve(strict=True)


@pytest.fixture
def poisoned():
    """Every torch.empty holds NaN, so that what a kernel does not write shows: deterministic mode does that."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernel_device():
    return KERNEL_DEVICE


@pytest.fixture
def ieee():
    """float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
