"""The demo: one small trained Swin, run by timm's own model and by its twin, on images that ship with the package."""

import json
import statistics
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform
from torch import Tensor, nn

from .console import format_table
from .functional import fallback_reason
from .models.dispatch import FlashAttention
from .models.registry import SUFFIX

WEIGHTS, SHEET, LABELS = "demo_swin.safetensors", "demo_images.png", "demo_images.json"
WARMUP_RUNS, TIMED_RUNS = 1, 5


@dataclass(frozen=True)
class Checkpoint:
    """What scripts/train_demo.py wrote: the weights, and in the file's metadata all that rebuilds the model."""

    model: str  # timm's architecture
    model_kwargs: dict
    class_names: list[str]
    mean: list[float]
    std: list[float]
    test_accuracy: float
    state_dict: dict[str, Tensor]

    @property
    def input_size(self) -> tuple[int, int, int]:
        return self.model_kwargs["in_chans"], self.model_kwargs["img_size"], self.model_kwargs["img_size"]


def asset(name: str):
    """A file of timm_flashwin/assets, as a context that gives its path, also where the package is zipped."""
    return as_file(files(__package__) / "assets" / name)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the file; its metadata holds strings only, hence the JSON."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state_dict = {name: file.get_tensor(name) for name in file.keys()}
    return Checkpoint(
        model=metadata["model"],
        test_accuracy=float(metadata["test_accuracy"]),
        state_dict=state_dict,
        **{key: json.loads(metadata[key]) for key in ("model_kwargs", "class_names", "mean", "std")},
    )


def build_models(checkpoint: Checkpoint, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """timm's model and its flashwin twin with the same weights, in evaluation mode."""
    models = []
    for name in (checkpoint.model, checkpoint.model + SUFFIX):
        model = timm.create_model(name, **checkpoint.model_kwargs)
        model.load_state_dict(checkpoint.state_dict)  # strict
        models.append(model.eval().to(device))
    return models[0], models[1]


def implementation(model: nn.Module) -> str:
    """Which code computes the window attention of `model`, where its weights are now, and why."""
    weight = next(model.parameters())
    attentions = [module for module in model.modules() if isinstance(module, FlashAttention)]
    if not attentions:
        return f"timm's own {type(model).__name__} (names that end in {SUFFIX} use the kernels)"
    for attention in attentions:
        reason = fallback_reason(weight.device, weight.dtype, attention.head_dim, attention.num_tokens)
        if reason is not None:
            return f"plain PyTorch: {reason}"
    return f"Triton kernels on {torch.cuda.get_device_name(weight.device)}"


def load_images(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """The images of the sheet, normalised [n, C, H, W], and their labels [n]."""
    transform = create_transform(checkpoint.input_size, mean=checkpoint.mean, std=checkpoint.std, crop_pct=1.0)
    with asset(LABELS) as path:
        contents = json.loads(path.read_text())
    size, columns, labels = contents["tile_size"], contents["columns"], contents["labels"]
    with asset(SHEET) as path, Image.open(path) as sheet:
        tiles = []
        for i in range(len(labels)):
            left, top = i % columns * size, i // columns * size
            tiles.append(transform(sheet.crop((left, top, left + size, top + size))))
    return torch.stack(tiles), torch.tensor(labels)


@torch.inference_mode()
def median_ms(models: tuple[nn.Module, ...], images: Tensor) -> list[float]:
    """Median time of a forward pass of each model; they take turns, so that a busy moment hits all of them."""
    times = [[] for _ in models]
    for run in range(WARMUP_RUNS + TIMED_RUNS):
        for model, own_times in zip(models, times, strict=True):
            synchronize(images.device)
            start = time.perf_counter()
            model(images)
            synchronize(images.device)
            if run >= WARMUP_RUNS:
                own_times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(own_times) for own_times in times]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def run_demo(device: torch.device) -> int:
    """Classify the images with both models, and print what they say and how they compare.

    Returns:
        The exit status: 0 if the two models agree on every image, otherwise 1.
    """
    with asset(WEIGHTS) as path:
        checkpoint = read_checkpoint(path)
    stock, flashwin = models = build_models(checkpoint, device)
    images, truth = load_images(checkpoint)
    images = images.to(device)
    stock_logits, flashwin_logits = stock(images).float().cpu(), flashwin(images).float().cpu()
    stock_ms, flashwin_ms = median_ms(models, images)

    predictions = stock_logits.argmax(1), flashwin_logits.argmax(1)
    agreeing = int((predictions[0] == predictions[1]).sum())
    n = len(truth)
    print(f"{n} Fashion-MNIST test images; one trained Swin, run by timm's model and by its flashwin twin")
    print_table(checkpoint.class_names, truth, *predictions)
    correct = [int((prediction == truth).sum()) for prediction in predictions]
    print(f"same prediction           {agreeing} of {n}")
    print(f"correct                   timm {correct[0]} of {n}, flashwin {correct[1]} of {n}")
    print(f"largest logit difference  {(stock_logits - flashwin_logits).abs().max().item():.1e}")
    print(f"time for all {n} images    timm {stock_ms:.2f} ms, flashwin {flashwin_ms:.2f} ms (median of {TIMED_RUNS})")
    print(f"flashwin ran in           {implementation(flashwin)}")
    return 0 if agreeing == n else 1


def print_table(class_names: list[str], truth: Tensor, stock: Tensor, flashwin: Tensor) -> None:
    """One line an image; a wrong prediction is marked."""
    rows = [("image", "truth", "timm", "flashwin")]
    for i, (label, *predictions) in enumerate(zip(truth.tolist(), stock.tolist(), flashwin.tolist(), strict=True)):
        cells = [class_names[prediction] + ("" if prediction == label else " x") for prediction in predictions]
        rows.append((str(i), class_names[label], *cells))
    print(format_table(rows, "><<<"))
