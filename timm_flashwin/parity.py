"""The parity command: timm's model and its twin, same weights, on the same labelled images in one pass."""

import csv
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from timm.data import create_loader, resolve_data_config
from torch import Tensor, nn

# Nothing that would have to be installed for it: huggingface_hub, which this package and timm require, requires tqdm.
from tqdm import tqdm

from .console import CliError, format_table
from .demo import implementation, synchronize
from .image_folder import LabelledImages
from .models.registry import SUFFIX, flashwin_names
from .weights import create_model, pretrained_cfg


def run_parity(
    name: str,
    data_dir: Path,
    checkpoint: Path | None,
    amp_dtype: torch.dtype | None,
    batch_size: int,
    workers: int,
    device: torch.device,
    tolerance: float,
    json_path: Path | None,
    csv_path: Path | None,
) -> int:
    """Evaluate both models, print how they compare, and write it to the files asked for.

    Args:
        name: A Swin by timm's name, its twin's or a short one, with a pretrained tag behind a dot or without.
        data_dir: Images in one folder a class.
        checkpoint: The weights; None for those that timm has on the hub.
        amp_dtype: Autocast's dtype; None for float32.
        batch_size, workers: Of timm's loader.
        device: Where both models run.
        tolerance: By how much top-1 may differ, in percentage points.
        json_path, csv_path: Files to write, or None.

    Returns:
        The exit status: 1 if top-1 differs by more than the tolerance or a logit is not finite, otherwise 0.

    Raises:
        CliError: What was given cannot be used, or the device's memory is too small.
    """
    for path in filter(None, (json_path, csv_path)):  # before the pass, not after it
        existed = path.exists()
        try:
            path.open("a").close()
            if not existed:
                path.unlink()
        except OSError as error:
            raise CliError(f"{path} cannot be written: {error.strerror}") from error
    images = LabelledImages(data_dir)
    stock_name, flashwin_name = pair_names(name)
    stock, flashwin = (model.eval().to(device) for model in create_pair(stock_name, flashwin_name, checkpoint))
    if images.num_classes != stock.num_classes:
        raise CliError(
            f"{images.root} has {images.num_classes} class folders and {stock_name} {stock.num_classes} classes; "
            "choose weights for these classes: another tag in --model, or --checkpoint FILE"
        )
    config = resolve_data_config({}, model=stock, use_test_size=True)
    loader = create_loader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,  # timm 1.0.20 hands its default, True, to torch, which refuses it
        pin_memory=device.type == "cuda",
        device=device,
        **config,
    )
    precision = "float32" if amp_dtype is None else f"AMP {str(amp_dtype).removeprefix('torch.')}"
    print(f"{stock_name} and {flashwin_name}, {precision}, on {device}; flashwin: {implementation(flashwin)}")
    print(f"{len(images)} images of {images.num_classes} classes in {images.root}, batches of {batch_size}")
    try:
        measured = compare(stock, flashwin, loader, device, amp_dtype)
    except torch.OutOfMemoryError as error:
        raise CliError(f"{device} has too little memory; pass a --batch-size below {batch_size}", status=1) from error
    except CliError as error:
        # From a worker it comes with the worker's traceback as text, and what it says at the end. Our own traceback
        # refers to itself there, and would keep the other workers alive: they are told to stop when it is gone.
        message = str(error).splitlines()[-1].removeprefix(f"{CliError.__module__}.{CliError.__name__}: ")
        raise CliError(message) from error.with_traceback(None)

    difference = abs(measured["top1_flashwin"] - measured["top1_timm"])
    passed = difference <= tolerance and math.isfinite(measured["max_logit_difference"])
    print_result(measured, tolerance, passed)
    row = {
        "model": stock_name,
        "flashwin_model": flashwin_name,
        "weights": str(checkpoint or "pretrained"),
        "data_dir": str(images.root),
        "batch": batch_size,
        "img_size": config["input_size"][-1],
        "precision": precision,
        **{key: value if math.isfinite(value) else None for key, value in measured.items()},  # JSON has no NaN
        "tolerance": tolerance,
        "passed": passed,
        "implementation": implementation(flashwin),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(row, indent=2) + "\n")
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    return 0 if passed else 1


def pair_names(name: str) -> tuple[str, str]:
    """timm's name and the twin's, both with the tag of `name`.

    Raises:
        CliError: The name is unknown or no Swin's, or timm does not know the tag.
    """
    base, dot, tag = name.partition(".")
    names = flashwin_names()
    flashwin = base if base in names else base + SUFFIX
    if flashwin not in names:
        pretrained_cfg(name)
        raise CliError(f"--model {name} has no flashwin twin; `timm-flashwin models` lists the Swin models that have")
    pretrained_cfg(flashwin + dot + tag)
    return names[flashwin] + dot + tag, flashwin + dot + tag


def create_pair(stock_name: str, flashwin_name: str, checkpoint: Path | None) -> tuple[nn.Module, nn.Module]:
    """timm's model with the weights that were asked for, and the twin with that one's."""
    stock = create_model(stock_name, pretrained=checkpoint is None, checkpoint=checkpoint)
    flashwin = timm.create_model(flashwin_name, num_classes=stock.num_classes)
    flashwin.load_state_dict(stock.state_dict())
    return stock, flashwin


@torch.inference_mode()
def compare(
    stock: nn.Module,
    flashwin: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> dict[str, float]:
    """Run both models on every batch.

    Args:
        stock, flashwin: In evaluation mode on `device`; they take [B, C, H, W] and return logits [B, num_classes].
        batches: Images [B, C, H, W] and class indices [B], at least one batch, on `device`.
        device: Where all of it is.
        amp_dtype: Autocast's dtype; None for none.

    Returns:
        `images`; `top1_*`, `top5_*` and `equal_predictions` in percent; `mean_logit_difference` and
        `max_logit_difference`, absolute, in float32; `img_per_s_*`, from an idle device to an idle device, without
        loading and transfer.
    """
    models = {"timm": stock, "flashwin": flashwin}
    top1, top5, seconds = (dict.fromkeys(models, 0) for _ in range(3))
    images = equal = 0
    difference_sum = torch.zeros((), dtype=torch.float64, device=device)
    difference_max = torch.zeros((), device=device)
    known_sizes = set()

    def forward(name: str, x: Tensor) -> tuple[Tensor, float]:
        synchronize(device)
        start = time.perf_counter()
        # Entered for each call: it casts the weights once and keeps them, which only the first of two would pay for.
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = models[name](x)
        synchronize(device)
        return logits.float(), time.perf_counter() - start

    for step, (x, target) in enumerate(tqdm(batches, unit="batch", leave=False, disable=None)):
        if len(x) not in known_sizes:  # the first batch, and a smaller last one: libraries and kernels set up for it
            known_sizes.add(len(x))
            for name in models:
                forward(name, x)
        logits = {}
        for name in models if step % 2 == 0 else reversed(models):  # neither always runs first
            logits[name], elapsed = forward(name, x)
            seconds[name] += elapsed
        for name in models:
            hits = logits[name].topk(min(5, logits[name].shape[1])).indices == target.unsqueeze(1)
            top1[name] += hits[:, 0].sum().item()
            top5[name] += hits.sum().item()
        difference = (logits["timm"] - logits["flashwin"]).abs()
        difference_sum += difference.mean(1, dtype=torch.float64).sum()
        difference_max = torch.maximum(difference_max, difference.max())  # keeps NaN
        equal += (logits["timm"].argmax(1) == logits["flashwin"].argmax(1)).sum().item()
        images += len(x)
    return {
        "images": images,
        **{f"top1_{name}": 100 * top1[name] / images for name in models},
        **{f"top5_{name}": 100 * top5[name] / images for name in models},
        "equal_predictions": 100 * equal / images,
        "mean_logit_difference": difference_sum.item() / images,
        "max_logit_difference": difference_max.item(),
        **{f"img_per_s_{name}": images / seconds[name] for name in models},
    }


def print_result(measured: dict[str, float], tolerance: float, passed: bool) -> None:
    accuracies = [
        (label, f"{stock:.3f}", f"{flashwin:.3f}", f"{flashwin - stock:+.3f}")
        for label, stock, flashwin in (
            ("top-1, %", measured["top1_timm"], measured["top1_flashwin"]),
            ("top-5, %", measured["top5_timm"], measured["top5_flashwin"]),
        )
    ]
    speeds = measured["img_per_s_timm"], measured["img_per_s_flashwin"]
    speed = ("images/s", *(f"{images:.1f}" for images in speeds), f"x{speeds[1] / speeds[0]:.2f}")
    print(format_table([("", "timm", "flashwin", ""), *accuracies, speed], "<>>>"))
    print(f"equal predictions   {measured['equal_predictions']:.3f} % of {measured['images']}")
    print(f"logit difference    {measured['mean_logit_difference']:.1e} in the mean, at most "
          f"{measured['max_logit_difference']:.1e}")  # fmt: skip
    print(f"{'passed' if passed else 'FAILED'}: top-1 may differ by {tolerance:g} percentage points")
