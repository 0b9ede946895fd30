"""What is built from the sources: a wheel that holds the package and what it needs, and nothing more."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import timm_flashwin

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools leaves its work in the folder of the sources."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("needs the git checkout, which tells what belongs to the project")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source"]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


def test_wheel_holds_the_package_and_nothing_more(wheel):
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "timm_flashwin").rglob("*") if path.is_file()}
    expected = {name for name in package if "__pycache__" not in name}
    built = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert built == expected
    assert {"timm_flashwin/py.typed", "timm_flashwin/assets/demo_swin.safetensors"} <= built


def test_wheel_says_what_it_is(wheel):
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(names["METADATA"]).decode())
    assert metadata["Name"] == "timm-flashwin" and metadata["Version"] == timm_flashwin.__version__
    assert metadata["License-Expression"] == "MIT"
    assert {"LICENSE", "LICENSE-fashion-mnist.txt"} <= names.keys()
    assert metadata.get_payload().startswith("# timm-flashwin")  # the README
    assert b"timm-flashwin = timm_flashwin.cli:main" in wheel.read(names["entry_points.txt"])
