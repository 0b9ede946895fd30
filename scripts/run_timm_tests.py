"""Run timm's own model tests on the flashwin names, beside the same tests on timm's names, and compare them.

    python scripts/run_timm_tests.py [--source DIR] [-k EXPRESSION] [arguments of pytest ...]
    python scripts/run_timm_tests.py -k "swin_tiny and not torchscript"
    TORCH_DEVICE=cuda python scripts/run_timm_tests.py -k "forward or backward"

The tests are `tests/test_models.py` of the installed timm's source distribution, which pip downloads. They run on the
CPU unless timm's own variable TORCH_DEVICE names another device. Left out are the tests that download weights, and
by default the models that take more than 16 GB. The exit status is 1 where a flashwin name fails or skips a test that
timm's name passes, or has no such test.
"""

import argparse
import collections
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

from timm_flashwin.models.registry import flashwin_names

SELECTION = "swin and not pretrained"
DEFAULT_EXPRESSION = "not huge and not giant"


def download_source(folder: Path) -> Path:
    """The unpacked source distribution of the installed timm."""
    requirement = f"timm=={timm.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", folder, requirement], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    return source


def run_tests(source: Path, expression: str, arguments: list[str], report: Path) -> None:
    """Run the tests whose names match; the results go to `report`."""
    tests = source / "tests" / "test_models.py"
    if not tests.is_file():
        sys.exit(f"{tests} is not there; --source takes a timm checkout or an unpacked source distribution")
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TORCH_BACKEND": "timm_tests_backend", "PYTHONPATH": os.pathsep.join(paths)}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    options += ["-c", str(source / "pyproject.toml"), "--import-mode=append", f"--junitxml={report}"]
    selection = ["-k", f"({expression}) and {SELECTION}"]
    command = [sys.executable, "-m", "pytest", *options, *selection, *arguments, str(tests)]
    # Not in the folder of the source: the timm to be tested is the installed one.
    status = subprocess.run(command, cwd=report.parent, env=environment).returncode
    if status not in (0, 1):  # 1: a test failed, which is for the comparison to judge
        sys.exit(f"pytest ended with the exit status {status}")


def read_outcomes(report: Path) -> dict[tuple[str, str], str]:
    """(test with its model's name cut out, that name) -> "passed", "failed" or "skipped"."""
    outcomes = {}
    known = {*flashwin_names(), *flashwin_names().values()}
    for case in ElementTree.parse(report).iter("testcase"):
        children = {child.tag for child in case}
        outcome = "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
        function, _, parameters = case.get("name").removesuffix("]").partition("[")
        for parameter in parameters.split("-"):
            name, _, tag = parameter.partition(".")
            if name in known:
                outcomes[f"{function}[{parameters.replace(parameter, tag)}]", name] = outcome
    return outcomes


def compare(outcomes: dict[tuple[str, str], str]) -> bool:
    """Print what the flashwin names did beside timm's; True where they did as well everywhere."""
    for kind, names in (("timm", set(flashwin_names().values())), ("flashwin", set(flashwin_names()))):
        counts = collections.Counter(outcome for (_, name), outcome in outcomes.items() if name in names)
        print(f"{kind}: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    tests = {test for test, _ in outcomes}
    shared = {test for test, name in outcomes if name in flashwin_names()}
    worse = []
    for name, arch in sorted(flashwin_names().items()):
        if not any(other == name for _, other in outcomes):
            continue  # not selected
        for test in sorted(tests):
            expected, actual = outcomes.get((test, arch)), outcomes.get((test, name))
            if expected == "passed" and actual != "passed" and test in shared:
                worse.append(f"  {test} {name}: {actual or 'no such test'}, but {arch} passed")
    print("\n".join([f"worse than timm's: {len(worse)}", *worse]))
    named = {test.partition("[")[0] for test in tests - shared}
    if named:
        print("not compared, since timm names the models one by one there: " + ", ".join(sorted(named)))
    return not worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="a timm checkout, instead of the download")
    parser.add_argument("-k", dest="expression", default=DEFAULT_EXPRESSION, help="as pytest's (%(default)s)")
    args, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        source = args.source.resolve() if args.source else download_source(Path(folder))
        run_tests(source, args.expression, pytest_arguments, report)
        sys.exit(0 if compare(read_outcomes(report)) else 1)


if __name__ == "__main__":
    main()
