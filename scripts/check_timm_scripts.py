"""Run timm's own scripts, unpatched, with a *_flashwin name and timm's beside it, and print a row for each run.

    python scripts/check_timm_scripts.py --timm-scripts DIR [--processes 1 2] [--device cuda] [--data-dir IMAGES]
    python scripts/check_timm_scripts.py --timm-scripts DIR --out results/nvidia_h200/timm_scripts.jsonl

DIR is the top of timm's repository: no release on PyPI has the scripts. Small models, few images, an epoch or two: the
question is whether everything works; the speeds are no benchmark. On a GPU timm's benchmark.py runs on the model at its
own size, too. timm's inference.py needs pandas. The exit status is 1 where a run failed.

On the CPU timm's train.py cannot run distributed by itself: it hands DistributedDataParallel the CPU as a device id.
There the distributed runs get a module along that drops it.
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking import format_table, merge_rows, pick_device, provenance
from compare_finetune import FALLBACK
from PIL import Image

from timm_flashwin.models.registry import flashwin_names

SIZE = 32  # pixels
MODEL = ["--model-kwargs", f"img_size={SIZE}", "embed_dim=32", "depths=[2,2]", "num_heads=[1,2]", "window_size=4"]
CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES = 2, 32, 16  # of the generated folder; images of each class
TIMEOUT_S = 900
PLUGIN_RUN = ["-m", "timm_flashwin", "run"]
AVERAGE_RATE = r"\([\d.]+s, +([\d.]+)/s\)"  # in the logs of train.py and validate.py
BENCHES = {
    "inference": "infer_samples_per_sec",
    "train": "train_samples_per_sec",
}  # of benchmark.py, with its reports' keys
FULL_BATCH = 128

CPU_DDP = """
from torch.nn import parallel

class DistributedDataParallel(parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)

parallel.DistributedDataParallel = DistributedDataParallel  # timm.task imports it from there when it is needed
"""


@dataclass(frozen=True)
class Run:
    """One command, and what has to come of it."""

    script: str
    processes: int
    model: str
    what: str
    command: list[str]
    check: Callable[[str], None]  # of the output; raises an exception where something is not as it should be
    rate: str | None = None  # pattern of the images/s in the output: one group, the last match counts


@dataclass(frozen=True)
class Outcome:
    status: str  # "ok", or what went wrong: a line, and the end of the output
    seconds: float
    images_per_s: float | None


def main() -> int:
    args = parse_args()
    stock = flashwin_names()[args.model]
    rows, failures = [], []
    origin, beside = provenance(pick_device(args.device), args.commit), timm_beside(args.timm_scripts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "cpu_ddp.py").write_text(CPU_DDP)
        images = args.data_dir.resolve() if args.data_dir else write_images(work / "images")
        runs = []
        for processes in args.processes:
            if processes == 1:
                runs += single_runs(args, stock, images, work)
            else:
                runs += distributed_runs(args, stock, images, work, processes)
        for number, run in enumerate(runs, start=1):
            print(f"{number}/{len(runs)} {run.script}, {run.model}: {run.what} ...", end=" ", flush=True)
            outcome = execute(run, work, must_use_kernels=args.device == "cuda" and run.model != stock)
            row = {"check": "timm_scripts", "script": run.script, "processes": run.processes, "model": run.model}
            row |= {"run": run.what, "precision": "amp_bf16" if precision(args) else "float32"}
            row |= {"result": outcome.status.partition("\n")[0], "img_per_s": outcome.images_per_s}
            row |= {"seconds": round(outcome.seconds, 1)} | origin
            if " ".join(PLUGIN_RUN) not in " ".join(run.command):
                row["timm"] = beside
            rows.append(row)
            print(row["result"], flush=True)
            if args.out:
                merge_rows(args.out, [row], key=("script", "processes", "model", "run", "precision"))
            if outcome.status != "ok":
                failures.append(f"{' '.join(run.command)}\n{outcome.status}")
    print(table(rows))
    print(*(f"\nFAILED: {failure}" for failure in failures), sep="\n")
    print(f"{len(runs) - len(failures)} of {len(runs)} ok")
    return 1 if failures else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm-scripts", type=Path, required=True, metavar="DIR", help="the top of timm's repository")
    parser.add_argument("--model", default="swin_tiny_flashwin", choices=sorted(flashwin_names()), metavar="NAME")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="image folder with train/ and validation/ (noise)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=(1, 2),
        metavar="N",
        help="1: every script; more: train.py under torchrun (1 2)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there, too, as JSON Lines")
    parser.add_argument("--commit", help="what the rows name; by default the checkout's HEAD")
    args = parser.parse_args()
    args.device = pick_device(args.device).type  # each process takes the GPU of its rank
    for name in ("train.py", "validate.py", "inference.py", "benchmark.py", "bulk_runner.py"):
        if not (args.timm_scripts / name).is_file():
            parser.error(f"--timm-scripts: there is no {name} in {args.timm_scripts}")
    if args.data_dir is not None and not (args.data_dir / "train").is_dir():
        parser.error(f"--data-dir: there is no folder {args.data_dir / 'train'}")
    if args.device == "cuda" and max(args.processes) > torch.cuda.device_count():
        parser.error(f"--processes {max(args.processes)}: each needs a GPU, and there are {torch.cuda.device_count()}")
    return args


def timm_beside(folder: Path) -> str:
    """The version of the timm that `python` gives a script of the folder: a checkout's own, or the installed one."""
    command = [sys.executable, "-c", "import timm; print(timm.__version__)"]  # -c looks in the working directory first
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def table(rows: list[dict]) -> str:
    header = ("script", "processes", "model", "run", "result", "images/s", "seconds")
    cells = (
        (
            row["script"],
            str(row["processes"]),
            row["model"],
            row["run"],
            "ok" if row["result"] == "ok" else "FAILED",
            "-" if row["img_per_s"] is None else f"{row['img_per_s']:.2f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    )
    return format_table(header, cells)


def write_images(folder: Path) -> Path:
    """Noise: there is nothing to learn here."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", TRAIN_IMAGES), ("validation", VALIDATION_IMAGES)):
        for label in range(CLASSES):
            (folder / split / f"class_{label}").mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(noise.numpy()).save(folder / split / f"class_{label}" / f"{index}.png")
    return folder


# --------------------------------------------------------------------------------------------------- the runs


def single_runs(args: argparse.Namespace, stock: str, images: Path, work: Path) -> Iterator[Run]:
    """Every script in one process, with timm's name beside ours where that tells something."""
    flashwin_run = [sys.executable, *PLUGIN_RUN]

    def command(name: str, *options: str) -> list[str]:
        return [script(args, name), "--device", args.device, *options, *precision(args)]

    yield from train_runs(args, stock, images, work, launcher=[sys.executable], processes=1)

    classes = str(len(list((images / "train").iterdir())))
    evaluation = ["--data-dir", str(images), "-b", "8", "-j", "1", "--img-size", str(SIZE), "--num-classes", classes]
    for model, other in ((args.model, stock), (stock, args.model)):
        for trained in (model, other):
            checkpoint = str(last_checkpoint(work, trained, 1))
            options = ["--model", model, "--checkpoint", checkpoint, *evaluation, *MODEL]
            what = f"EMA weights trained as {trained}"
            full = [*flashwin_run, *command("validate.py", "--use-ema", *options)]
            yield Run("validate.py", 1, model, what, full, check_report("top1"), AVERAGE_RATE)
    options = ["--model", args.model, "--checkpoint", str(last_checkpoint(work, args.model, 1)), *evaluation, *MODEL]
    full = [*flashwin_run, *command("validate.py", "--torchcompile", *options)]
    yield Run("validate.py", 1, args.model, "torch.compile", full, check_report("top1"), AVERAGE_RATE)

    results = work / "inference"
    files = ["--results-dir", str(results), "--results-file", "results", "--label-type", "none", "--fullname"]
    full = [*flashwin_run, *command("inference.py", *options, *files)]
    count = sum(1 for path in (images / "validation").rglob("*") if path.is_file())
    yield Run("inference.py", 1, args.model, "class of every image", full, check_csv(results / "results.csv", count))

    steps = ["--num-warm-iter", "1", "--num-bench-iter", "5", "-b", "8", "--img-size", str(SIZE), *MODEL]
    for model in (args.model, stock):
        full = [*flashwin_run, *command("benchmark.py", "--model", model, *steps)]
        check = check_report(*BENCHES.values())
        yield Run("benchmark.py", 1, model, "inference and training", full, check, reported_rate(BENCHES["inference"]))
    if args.device == "cuda":
        for model, (bench, key) in itertools.product((args.model, stock), BENCHES.items()):
            options = ["--model", model, "--bench", bench, "-b", str(FULL_BATCH)]
            full = [*flashwin_run, *command("benchmark.py", *options)]
            what = f"{bench}, its own size, batch {FULL_BATCH}"
            yield Run("benchmark.py", 1, model, what, full, check_report(key), reported_rate(key))

    # bulk_runner.py starts an interpreter for every model, so the names have to come in there too: its -m, which wants
    # a value, makes that `python -m timm_flashwin run benchmark.py`. The pattern finds timm's model and its long twin.
    table = work / "bulk.csv"
    bulk = ["--model-list", f"{stock}*", "--results-file", str(table), "--sort-key", "infer_samples_per_sec"]
    inner = ["-m", "yes", "timm_flashwin", "run", *command("benchmark.py", "--bench", "inference", *steps)]
    full = [*flashwin_run, script(args, "bulk_runner.py"), *bulk, *inner]
    yield Run("bulk_runner.py", 1, args.model, "benchmark.py of all names", full, check_csv(table, 2))


def distributed_runs(args: argparse.Namespace, stock: str, images: Path, work: Path, processes: int) -> Iterator[Run]:
    """train.py under torchrun, the names from its own flag, and once from `timm-flashwin run`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    yield from train_runs(args, stock, images, work, torchrun, processes)
    launcher = [*torchrun, *PLUGIN_RUN]
    options = train_options(args, args.model, images, work, "run")
    command = [*launcher, script(args, "train.py"), *device_modules(args, processes), *options, "--epochs", "1"]
    what = "names from timm-flashwin run"
    yield Run("train.py", processes, args.model, what, command, check_epochs(0), AVERAGE_RATE)


def train_runs(
    args: argparse.Namespace, stock: str, images: Path, work: Path, launcher: list[str], processes: int
) -> Iterator[Run]:
    """train.py of both names; the variants with ours alone."""
    ema = ["--model-ema", "--model-ema-decay", "0.9"]
    variants = {
        "gradient accumulation": ["--grad-accum-steps", "2"],
        "gradient checkpointing": ["--grad-checkpointing"],
        "torch.compile": ["--torchcompile"],
    }

    def run(model: str, what: str, experiment: str, first_epoch: int, extra: list[str]) -> Run:
        names = device_modules(args, processes, *(["timm_flashwin"] if model != stock else []))
        options = train_options(args, model, images, work, experiment)
        command = [*launcher, script(args, "train.py"), *names, "--epochs", str(first_epoch + 1), *extra, *options]
        return Run("train.py", processes, model, what, command, check_epochs(first_epoch), AVERAGE_RATE)

    for model in (args.model, stock):
        checkpoint = last_checkpoint(work, model, processes)
        yield run(model, "EMA", checkpoint.parent.name, 0, ema)
        yield run(model, "EMA, resumed", f"{model}-resumed-{processes}", 1, [*ema, "--resume", str(checkpoint)])
    for what, extra in variants.items():
        yield run(args.model, what, f"{what}-{processes}", 0, extra)


def train_options(args: argparse.Namespace, model: str, images: Path, work: Path, experiment: str) -> list[str]:
    classes = len(list((images / "train").iterdir()))
    options = {
        "model": model,
        "data-dir": images,
        "num-classes": classes,
        "img-size": SIZE,
        "batch-size": 8,
        "opt": "adamw",
        "lr": 1e-3,
        "warmup-epochs": 0,
        "workers": 1,
        "log-interval": 1,
        "device": args.device,
        "output": work / "train",
        "experiment": experiment,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*words, *precision(args), *MODEL]


def device_modules(args: argparse.Namespace, processes: int, *modules: str) -> list[str]:
    """train.py's flag for what it imports first."""
    if args.device == "cpu" and processes > 1:
        modules += ("cpu_ddp",)
    return ["--device-modules", *modules] if modules else []


def script(args: argparse.Namespace, name: str) -> str:
    return str(args.timm_scripts.resolve() / name)


def precision(args: argparse.Namespace) -> list[str]:
    return ["--amp", "--amp-dtype", "bfloat16"] if args.device == "cuda" else []


def last_checkpoint(work: Path, model: str, processes: int) -> Path:
    """What the run "EMA" leaves."""
    return work / "train" / f"{model}-ema-{processes}" / "last.pth.tar"


# ------------------------------------------------------------------------------------------- what has to come


def report_of(output: str):
    """What timm's scripts print for other programs."""
    return json.loads(output.rpartition("--result")[2])


def check_epochs(epoch: int) -> Callable[[str], None]:
    """train.py trained that epoch alone, and validated."""

    def check(output: str) -> None:
        (result,) = report_of(output)
        assert result["epoch"] == epoch, result
        assert math.isfinite(result["train"]["loss"]) and math.isfinite(result["validation"]["loss"]), result

    return check


def reported_rate(key: str) -> str:
    """The pattern of a number in the report."""
    return rf'"{key}": ([\d.]+)'


def check_report(*keys: str) -> Callable[[str], None]:
    """The report has the numbers: timm's scripts exit with 0 where a model fails."""

    def check(output: str) -> None:
        report = report_of(output)
        assert "error" not in report and all(math.isfinite(report[key]) for key in keys), report

    return check


def check_csv(path: Path, rows: int) -> Callable[[str], None]:
    def check(output: str) -> None:
        with path.open() as file:
            found = len(list(csv.DictReader(file)))
        assert found == rows, f"{found} rows in {path.name} instead of {rows}"

    return check


def execute(run: Run, work: Path, must_use_kernels: bool) -> Outcome:
    start = time.perf_counter()
    output, status = "", "ok"
    try:
        search_path = os.pathsep.join(filter(None, (str(work), os.environ.get("PYTHONPATH"))))  # work: for cpu_ddp
        environment = os.environ | {"PYTHONPATH": search_path}
        done = subprocess.run(run.command, cwd=work, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        output = done.stderr + done.stdout  # the report stays at the end
        if done.returncode != 0:
            status = f"exit status {done.returncode}"
        elif must_use_kernels and FALLBACK in output:
            status = "did not run on the kernels"
        else:
            run.check(output)
    except subprocess.TimeoutExpired:
        status = f"no end after {TIMEOUT_S} s"
    except Exception as error:  # whatever is wrong with the output is this run's failure, and the others go on
        status = f"{type(error).__name__}: {error}"
    if status != "ok":
        status += "\n" + output[-3000:]
    rates = re.findall(run.rate, output) if run.rate else []
    return Outcome(status, time.perf_counter() - start, float(rates[-1]) if rates else None)


if __name__ == "__main__":
    sys.exit(main())
