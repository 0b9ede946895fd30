"""`timm-flashwin run`: a script behaves as under `python`, and knows the *_flashwin names, in spawned workers too."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from timm_flashwin.cli import main

DESCRIBE = """
import __main__, json, sys
import helper  # lies beside the script
json.dump({
    "argv": sys.argv, "file": __file__, "name": __name__, "spec": __spec__, "package": __package__, "doc": __doc__,
    "loader": type(__loader__).__name__, "builtins": type(__builtins__).__name__, "path": sys.path[0],
    "is_main": __main__.__dict__ is globals(),
}, sys.stdout)
"""

# Imports the package once, and forks for every command that it reads: an import takes seconds. The command runs at the
# top level, so that the interpreter itself treats what is raised.
SERVER = """
import json, os, sys
import timm_flashwin.cli
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["cwd"])
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.exit(timm_flashwin.cli.main(["run", *request["args"]]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as p:
        yield p
        p.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """run(*args): what `timm-flashwin run` does with them in tmp_path."""

    def run(*args: str) -> Result:
        out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        request = {"args": args, "cwd": str(tmp_path), "out": str(out), "err": str(err)}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return Result(status, out.read_text(), err.read_text())

    return run


@pytest.fixture
def script(tmp_path):
    def write(code: str, name: str = "script.py") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code))
        return name

    return write


def run_directly(tmp_path: Path, *args: str) -> Result:
    done = subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


# --------------------------------------------------------------------------------------- as under `python`


@pytest.mark.parametrize("path", ["sub/script.py", "link.py"])
def test_script_finds_the_world_that_python_gives_it(path, run, script, tmp_path):
    script('"""What it is for."""' + DESCRIBE, "sub/script.py")
    script("", "sub/helper.py")
    (tmp_path / "link.py").symlink_to("sub/script.py")  # python takes the imports from where a link leads
    args = [path, "--", "--help", "-h", "--he", "run", "--device=cpu", "", "a b", "--"]
    found, expected = run(*args), run_directly(tmp_path, *args)
    assert found == expected and found.status == 0
    assert json.loads(found.out)["argv"] == args


@pytest.mark.parametrize(
    "ending",
    [
        "pass",
        "sys.exit()",
        "sys.exit(3)",
        "sys.exit('in words')",
        "raise ValueError('a\\nb')",
        # Ctrl-C. With timm, because in some environments what it imports makes of the signal a plain status 1.
        "import timm; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)",
        "os._exit(5)",
        "inner()",
        "import json; json.loads('{')",
        "atexit.register(lambda: print(__name__, sys.modules['__main__'].inner.__name__))",
        "sys.excepthook = lambda *error: print('own hook', error[0]); raise ValueError",
        "os.kill(os.getpid(), 15)",
        "x = (",
    ],
)
def test_script_ends_as_under_python(ending, run, script, tmp_path):
    name = script(f"""
        import atexit, os, signal, sys
        def inner():
            try:
                1 / 0
            except ZeroDivisionError as error:
                raise RuntimeError("second") from error
        print("begun")
        {ending}
    """)
    found, expected = run(name), run_directly(tmp_path, name)
    assert found == expected
    assert "timm_flashwin" not in found.err


def test_script_without_the_suffix_runs(run, script):
    assert run(script("print('ran')", "tool")).out == "ran\n"


# --------------------------------------------------------------------------------------------- the names


def test_names_are_registered_in_spawned_workers_and_in_theirs(run, script):
    """The workers are this test's time: each imports the package anew."""
    name = script("""
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor

        def known(levels):
            import timm
            assert __name__ == "__mp_main__"
            here = [timm.is_model("swin_tiny_flashwin")]
            return here + spawn(levels - 1) if levels else here

        def spawn(levels):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(known, levels).result()

        if __name__ == "__main__":
            print(spawn(1), sys.argv)
    """)
    assert run(name, "--flag") == (0, "[True, True] ['script.py', '--flag']\n", "")


def test_torchrun_runs_a_script_on_every_rank(script, tmp_path):
    name = script("""
        import sys, timm, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        known = torch.tensor(int(timm.is_model("swin_tiny_flashwin")))
        dist.all_reduce(known)
        if dist.get_rank() == 0:
            print(known.item(), dist.get_world_size(), sys.argv)
        dist.destroy_process_group()
    """)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "timm_flashwin"]
    result = run_directly(tmp_path, *torchrun, "run", name, "--flag", "--", "-m")
    assert (result.status, result.out) == (0, f"2 2 ['{name}', '--flag', '--', '-m']\n"), result.err


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py", "there is no script"),
        ("folder", "is a directory"),
        ("image.png", "is not a Python file"),
        ("binary.py", "is not a Python file"),
        ("notes.txt", "is not a Python file"),
    ],
)
def test_what_is_no_script_is_named_in_one_line(name, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "binary.py").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "notes.txt").write_text("these are notes")
    hook = sys.excepthook
    try:
        assert main(["run", str(tmp_path / name), "--help"]) == 2
    finally:
        sys.excepthook = hook
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(tmp_path / name) in lines[0] and message in lines[0]


def test_run_without_a_script_says_what_it_needs(capsys):
    assert main(["run"]) == 2
    assert "run needs the path of a script" in capsys.readouterr().err


def test_help_in_front_of_the_script_is_ours(capsys):
    with pytest.raises(SystemExit) as error:
        main(["run", "--help"])
    assert error.value.code == 0 and "timm-flashwin run [-h] SCRIPT" in capsys.readouterr().out


def test_option_in_front_of_the_script_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["run", "--device", "cpu"])
    assert error.value.code == 2 and "--device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ timm's scripts


@pytest.mark.parametrize("name", ["train.py", "validate.py", "inference.py", "bulk_runner.py"])
def test_timms_scripts_start_as_under_python(name, run, timm_scripts, tmp_path):
    """--help; or, of inference.py, the traceback where pandas is not installed."""
    path = str(timm_scripts / name)
    assert run(path, "--help") == run_directly(tmp_path, path, "--help")


def test_timms_benchmark_runs_our_names(run, timm_scripts):
    sizes = "img_size=32 embed_dim=32 depths=[1,1] num_heads=[1,2] window_size=4".split()
    steps = "--bench inference --num-warm-iter 1 --num-bench-iter 5 --img-size 32 -b 2 --device cpu".split()
    args = ["--model", "swin_tiny_flashwin", *steps, "--model-kwargs", *sizes]
    result = run(str(timm_scripts / "benchmark.py"), *args)
    report = json.loads(result.out.partition("--result")[2])
    assert report["model"] == "swin_tiny_flashwin" and "error" not in report
