"""What is built from the sources holds what it needs, and nothing more."""

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import timm_flashwin

ROOT = Path(__file__).parents[1]
# The build backend's own interface: no build environment, which would have to be downloaded.
BUILD = """
import sys
from setuptools import build_meta

folder = sys.argv[1]  # the backend sets sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The project's files, as git tells them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs the git checkout, which tells what belongs to the project")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory) -> Path:
    """The folder with both distributions, built from a copy: setuptools leaves its work beside the sources."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77 or later")
    folder = tmp_path_factory.mktemp("packaging")
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(folder)]
    result = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert result.returncode == 0, f"setuptools {setuptools.__version__}: {result.stderr}"
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_package_and_nothing_more(wheel, tracked):
    in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert in_wheel == {name for name in tracked if name.startswith("timm_flashwin/")}
    assert {"timm_flashwin/py.typed", "timm_flashwin/assets/demo_swin.safetensors"} <= in_wheel


def test_wheel_says_what_it_is(wheel):
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = metadata_of(wheel)
    assert metadata["Name"] == "timm-flashwin" and metadata["Version"] == timm_flashwin.__version__
    assert metadata["License-Expression"] == "MIT"
    assert {"LICENSE", "LICENSE-fashion-mnist.txt"} <= names.keys()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert b"timm-flashwin = timm_flashwin.cli:main" in wheel.read(names["entry_points.txt"])


def test_changelog_has_the_version():
    assert f"\n## {timm_flashwin.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_source_distribution_can_be_built_and_tested_and_has_no_results(built, tracked):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        held = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or name.startswith("timm_flashwin.egg-info/")}
    parts = ("timm_flashwin/", "tests/", "configs/")
    texts = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"}
    assert held - made == {name for name in tracked if name.startswith(parts)} | texts
