"""Run a user's script as `python script.py ...` would, with the *_flashwin names registered in it.

timm's train.py imports this package by its own flag, `--device-modules timm_flashwin`; its other scripts have no such
flag. Spawned workers (`torch.multiprocessing.spawn`, data loaders, process pools) are new interpreters, which run the
script again as `__mp_main__`: they get the names too. Other programs that the script starts do not.

One thing differs from `python script.py`: timm is the installed one, also where a folder `timm` lies beside the script.
"""

import builtins
import multiprocessing.spawn
import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from .console import CliError


def run_script(path: str, arguments: list[str]) -> None:
    """Run the script as `__main__` in this process, which is to end after it.

    Whatever the script raises, SystemExit included, passes through, and an uncaught exception is printed without the
    frames of this package.

    Raises:
        CliError: There is no such file, it is a directory, or it is not Python.
    """
    source = read_script(path)
    main = ModuleType("__main__")
    start_tracebacks_at(main)
    main.__file__ = os.path.abspath(path)
    try:
        code = compile(source, main.__file__, "exec", dont_inherit=True)
    except SyntaxError as error:
        if path.endswith(".py"):
            raise
        raise CliError(f"{path} is not a Python file: {error}") from error
    main.__builtins__ = builtins
    main.__loader__ = SourceFileLoader("__main__", main.__file__)
    sys.modules["__main__"] = main  # for good: pickles and exit handlers of the script look its names up there
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # safe_path: Python 3.11 and later
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    follow_into_spawned_workers()
    exec(code, main.__dict__)


def read_script(path: str) -> bytes:
    if os.path.isdir(path):
        raise CliError(f"{path} is a directory; name the script in it")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except FileNotFoundError:
        raise CliError(f"there is no script {path}") from None
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}") from error
    if b"\0" in source:
        raise CliError(f"{path} is not a Python file")
    return source


def start_tracebacks_at(module: ModuleType) -> None:
    """Leave out what comes before the first frame of `module` when the interpreter prints an uncaught exception."""
    show = sys.excepthook

    def show_from_module(kind, error, traceback):
        while traceback is not None and traceback.tb_frame.f_globals is not module.__dict__:
            traceback = traceback.tb_next
        show(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = show_from_module


def follow_into_spawned_workers() -> None:
    """Make every process that multiprocessing spawns, or gets from its fork server, import this package first.

    multiprocessing has no hook for that. But it sends the worker a pickled dict that tells how to become a copy of
    this process, before the script and the work, and a worker ignores keys that it does not know.
    """
    prepare = multiprocessing.spawn.get_preparation_data

    def prepare_with_package(name: str) -> dict:
        return prepare(name) | {__package__: _Follow()}

    multiprocessing.spawn.get_preparation_data = prepare_with_package


class _Follow:
    """Unpickling it imports this package, and makes the worker's own workers import it."""

    def __reduce__(self):
        return follow_into_spawned_workers, ()
