"""Evaluate the demo's shipped weights on the 10,000 test images, with timm's own model and with its flashwin twin.

    python scripts/evaluate_demo.py [--dtype bfloat16]

Appends a row to results/<device>/demo.jsonl. Fails where either model is below 90 % top-1.
"""

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

import timm
import torch
from fashion_mnist import add_data_dir_option
from torch import Tensor
from train_demo import load_test_set, predict

from timm_flashwin.demo import WEIGHTS, asset, build_models, implementation, median_ms, read_checkpoint

MIN_TOP1 = 0.9
BATCH_SIZE = 500


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    with asset(WEIGHTS) as shipped:
        checkpoint = read_checkpoint(args.weights or shipped)
    images, labels = load_test_set(args.data_dir)
    models = {
        name: model.to(getattr(torch, args.dtype))
        for name, model in zip(("timm", "flashwin"), build_models(checkpoint, device), strict=True)
    }
    logits = {name: predict(model, images, device, BATCH_SIZE) for name, model in models.items()}
    batch = images[:BATCH_SIZE].to(device, getattr(torch, args.dtype))
    times = dict(zip(models, median_ms(tuple(models.values()), batch), strict=True))
    row = {
        "check": "demo",
        "images": len(labels),
        "batch": BATCH_SIZE,
        "dtype": args.dtype,
        "implementation": implementation(models["flashwin"]),
        **{f"top1_{name}": top1(logits[name], labels) for name in models},
        **compare(logits["timm"], logits["flashwin"]),
        **{f"img_per_s_{name}": round(1e3 * BATCH_SIZE / ms) for name, ms in times.items()},
        "torch": torch.__version__,
        "triton": version_or_none("triton"),
        "timm": timm.__version__,
        "device": device_name(device),
    }
    append_row(args.out or Path("results") / row["device"] / "demo.jsonl", row)
    print(json.dumps(row, indent=2))
    too_low = [name for name in models if row[f"top1_{name}"] < MIN_TOP1]
    if too_low:
        print(f"below {MIN_TOP1:.0%} top-1: {', '.join(too_low)}", file=sys.stderr)
    return 1 if too_low else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_dir_option(parser)
    parser.add_argument("--weights", type=Path, help="file of scripts/train_demo.py (the one that ships)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="file to append to (results/<device>/demo.jsonl)")
    return parser.parse_args()


def top1(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def compare(stock: Tensor, flashwin: Tensor) -> dict[str, float]:
    difference = (stock - flashwin).abs()
    return {
        "equal_predictions": (stock.argmax(1) == flashwin.argmax(1)).double().mean().item(),
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.double().mean().item(),
    }


def version_or_none(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name.lower().replace(" ", "_")


def append_row(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
