"""Does training differ? timm's train.py on configs/fashion_mnist.yaml, by timm's model and by its flashwin twin.

    python scripts/compare_finetune.py --timm-scripts DIR      # the folder with timm's train.py

All runs start from one checkpoint, and both models train with every seed. How far two of timm's seeds part, on average
over the epochs, is the spread. The twin sees the same images, augmentations and dropped paths as timm's run with its
seed; it parts from that run by its rounding alone, and is within the spread where that is, in the mean of the seeds, no
further than another seed. Rounding grows in training, so that timm's model does not repeat its own curve either: a run
that is as good as timm's own may well be a little further. The last top-1 of the seeds is compared by its mean: the
twin's is within the spread where it is no further from timm's than timm's best seed from its worst. The exit status is
1 where a curve is more than twice the spread away, or the last top-1 more than the spread.

Writes results/<device>/finetune.jsonl, one row a run, and finetune.png beside it.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import yaml
from benchmarking import ROOT, default_out, format_table, merge_rows, pick_device, provenance
from fashion_mnist import add_data_dir_option
from make_image_folder import write_image_folder

from timm_flashwin.models.registry import flashwin_names

CONFIG = ROOT / "configs" / "fashion_mnist.yaml"
CURVES = {"train_loss": "training loss", "eval_loss": "validation loss", "eval_top1": "validation top-1, %"}
MAX_SPREADS = 2.0
FALLBACK = "window attention runs in plain PyTorch"  # what the package logs

# train.py in a process of its own, as `python train.py` runs it; at its end the process says what only it knows.
TRAIN = """
import json, os, runpy, sys, time
report, sys.argv = sys.argv[1], sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
start = time.perf_counter()
runpy.run_path(sys.argv[0], run_name="__main__")
seconds = time.perf_counter() - start
import timm, torch
memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else None
memory = memory and round(memory, 3)
with open(report, "w") as file:
    json.dump({"seconds": round(seconds, 1), "peak_mem_gb": memory, "timm": timm.__version__}, file)
"""


def main() -> int:
    config = yaml.safe_load(CONFIG.read_text())
    args = parse_args(config)
    device = pick_device(args.device)
    twin = config["model"]
    stock = flashwin_names()[twin]
    out = args.out or default_out(device, "finetune.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        counts = write_image_folder(args.data_dir, work / "images", args.limit)
        torch.manual_seed(args.seeds[0])
        model = timm.create_model(
            stock, num_classes=config["num_classes"], in_chans=config["in_chans"], **config["model_kwargs"]
        )
        torch.save(model.state_dict(), work / "initial.pth")
        rows, origin = [], provenance(device, args.commit)
        for seed, name in itertools.product(args.seeds, (stock, twin)):
            print(f"training {name}, seed {seed}", flush=True)
            row = {"check": "finetune", "config": CONFIG.name, "model": name, "seed": seed, "amp_dtype": args.amp_dtype}
            row |= {f"{split}_images": count for split, count in counts.items()}
            rows.append(row | origin | train(args, name, seed, work))
            merge_rows(out, rows[-1:], key=("config", "model", "seed", "amp_dtype", "train_images"))
    plot(rows, out.with_suffix(".png"))
    print(f"{table(rows)}\n\n{out} and {out.with_suffix('.png')} written")
    return 0 if report_verdict(rows) else 1


def parse_args(config: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_dir_option(parser)
    parser.add_argument(
        "--timm-scripts",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with train.py: the top of timm's repository",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1), metavar="SEED", help="two or more (0 1)")
    parser.add_argument(
        "--amp-dtype",
        choices=("bfloat16", "float16", "none"),
        default="bfloat16",
        help='of autocast; "none": float32, where matrix products may take TF32, as train.py sets it (%(default)s)',
    )
    parser.add_argument("--epochs", type=int, help="instead of the file's")
    parser.add_argument("--limit", type=int, metavar="N", help="use only N images of each class, to try the script")
    parser.add_argument("--workers", type=int, default=8, help="processes that load images (%(default)s)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="file of the rows (results/<device>/finetune.jsonl)")
    parser.add_argument("--commit", help="what the rows name; by default the checkout's HEAD")
    args = parser.parse_args()
    if len(set(args.seeds)) < 2:
        parser.error("--seeds: the spread needs two different seeds")
    if args.limit is not None and args.limit * config["num_classes"] < config["batch_size"]:
        parser.error(f"--limit {args.limit}: that is less than one batch, {config['batch_size']} images in all")
    if not (args.timm_scripts / "train.py").is_file():
        parser.error(f"--timm-scripts: there is no train.py in {args.timm_scripts}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error('the plot needs matplotlib: pip install -e ".[plots]"')
    return args


def train(args: argparse.Namespace, model: str, seed: int, work: Path) -> dict:
    """One run of train.py: its curves, an element an epoch, its time, its peak GPU memory, and the timm it found."""
    experiment, report = f"{model}-{seed}", work / "report.json"
    options = {
        "config": CONFIG,
        "data-dir": work / "images",
        "model": model,
        "seed": seed,
        "initial-checkpoint": work / "initial.pth",
        "device": args.device,
        "workers": args.workers,
        "output": work / "runs",
        "experiment": experiment,
        "checkpoint-hist": 1,
    }
    if args.epochs is not None:
        options |= {"epochs": args.epochs}
    if args.amp_dtype != "none":
        options |= {"amp-dtype": args.amp_dtype}
    script = (args.timm_scripts / "train.py").resolve()
    command = [sys.executable, "-c", TRAIN, str(report), str(script)]
    command += itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
    if args.amp_dtype != "none":
        command += ["--amp"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise SystemExit(f"train.py failed for {model}, seed {seed}:\n{done.stdout[-3000:]}")
    if "cuda" in args.device and FALLBACK in done.stdout:
        raise SystemExit(f"{model} did not run on the kernels:\n{done.stdout[-3000:]}")
    with (work / "runs" / experiment / "summary.csv").open() as file:
        epochs = list(csv.DictReader(file))
    curves = {curve: [float(epoch[curve]) for epoch in epochs] for curve in CURVES}
    return {"epochs": len(epochs)} | curves | json.loads(report.read_text())


def table(rows: list[dict]) -> str:
    header = ("model", "seed", *(f"last {name}" for name in CURVES.values()), "seconds", "peak memory, GB")
    return format_table(
        header,
        (
            (
                row["model"],
                str(row["seed"]),
                *(f"{row[curve][-1]:.3f}" for curve in CURVES),
                str(row["seconds"]),
                "-" if row["peak_mem_gb"] is None else str(row["peak_mem_gb"]),
            )
            for row in rows
        ),
    )


def is_twin(row: dict) -> bool:
    return row["model"] in flashwin_names()


def distance(one: list[float], other: list[float]) -> float:
    """The mean absolute difference of two curves."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def report_verdict(rows: list[dict]) -> bool:
    """Print how far the twin is from timm's runs with its seeds, and how far timm's seeds are from each other."""
    twins = [row for row in rows if is_twin(row)]
    stock = [row for row in rows if not is_twin(row)]
    passed = True
    for curve, name in CURVES.items():
        distances = [distance(twin[curve], run[curve]) for twin, run in zip(twins, stock, strict=True)]
        ours = sum(distances) / len(distances)
        spread = max(distance(a[curve], b[curve]) for a, b in itertools.combinations(stock, 2))
        verdict = "within" if ours <= spread else "near" if ours <= MAX_SPREADS * spread else "OUTSIDE"
        passed &= verdict != "OUTSIDE"
        by_seed = ", ".join(f"{d:.4f}" for d in distances)
        print(f"{name}: flashwin is {ours:.4f} ({by_seed}) from timm; timm's seeds are {spread:.4f} apart: {verdict}")
    last, timms_last = ([run["eval_top1"][-1] for run in runs] for runs in (twins, stock))
    ours = sum(last) / len(last) - sum(timms_last) / len(timms_last)
    spread = max(timms_last) - min(timms_last)
    within = abs(ours) <= spread
    verdict = "within" if within else "OUTSIDE"
    print(f"last top-1, mean of seeds: flashwin is {ours:+.3f} from timm; timm's seeds span {spread:.3f}: {verdict}")
    return passed and within


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.5 * len(CURVES), 3.5), layout="constrained")
    for axis, (curve, name) in zip(axes, CURVES.items(), strict=True):
        for row in rows:
            style = dict(color="C3", linestyle="--") if is_twin(row) else dict(color="0.4", alpha=0.8)
            epochs = range(1, row["epochs"] + 1)
            axis.plot(epochs, row[curve], marker=".", label=f"{row['model']}, seed {row['seed']}", **style)
        axis.set(xlabel="epoch", title=name)
    axes[0].legend(fontsize=8)
    setting = rows[0]  # the runs differ in model and seed alone
    figure.suptitle(f"{CONFIG.name}, {setting['train_images']} images, AMP {setting['amp_dtype']}, {setting['device']}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
