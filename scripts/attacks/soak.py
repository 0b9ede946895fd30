"""Thousands of AMP steps of a small flashwin model beside timm's: same start, same batches, same recipe.

Two trainings in half precision drift apart by rounding; where they are heading has to be the same. The learning rate
falls to 0, so that they come to rest. A row has both sides' losses, gradient norms, accuracy, and the steps that
GradScaler left out.
"""

import argparse
import itertools
from collections.abc import Iterator

import timm
import torch
from attacks.rows import write_row
from benchmarking import Progress, pick_device
from fashion_mnist import DATA_DIR, MEAN, STD, FashionMNIST
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import Tensor, nn
from train_demo import MODEL_KWARGS, load_test_set, predict

from timm_flashwin import accelerate

MODELS = {"V1": "swin_tiny_patch4_window7_224", "V2": "swinv2_tiny_window8_256"}
LAST = 100  # steps over which the final loss is averaged
LOSS_TOLERANCE = 0.05  # of timm's final loss: gross, for two runs that share all but rounding


class Side:
    """One model in training: timm's recipe in small, and a record of every step."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, steps: int):
        self.model, self.dtype, self.device = model.train(), dtype, device
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.loss_fn = LabelSmoothingCrossEntropy(0.05)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.skipped = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, self.dtype):
            loss = self.loss_fn(self.model(images), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.skipped += self.scaler.get_scale() < scale
        self.losses.append(loss.detach())

    def summary(self) -> dict:
        losses, norms = torch.stack(self.losses).float().cpu(), torch.stack(self.norms).float().cpu()
        return dict(
            first_loss=mean_of_finite(losses[:1]),
            last_loss=mean_of_finite(losses[-LAST:]),
            losses_not_finite=int((~torch.isfinite(losses)).sum()),
            mean_grad_norm=mean_of_finite(norms),
            last_grad_norm=mean_of_finite(norms[-LAST:]),
            grad_norms_not_finite=int((~torch.isfinite(norms)).sum()),  # steps that GradScaler has to leave out
            skipped_steps=self.skipped,
        )


def mean_of_finite(x: Tensor) -> float | None:
    """The mean of the numbers among `x`; None where there is none."""
    finite = x[torch.isfinite(x)]
    return finite.mean().item() if len(finite) else None


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    data_dir = args.data_dir or DATA_DIR
    train_set = FashionMNIST(data_dir, train=True)
    images, labels = torch.tensor(train_set.images, device=device), torch.tensor(train_set.labels, device=device).long()
    test_set = load_test_set(data_dir)
    failed = 0
    # The interpreter has no bfloat16 products.
    dtypes = args.dtypes or (["float16", "bfloat16"] if device.type == "cuda" else ["float16"])
    for family, dtype in itertools.product(args.families, dtypes):
        failed += soak(args, device, family, getattr(torch, dtype), batches(images, labels, args), test_set)
    return int(failed > 0)


def batches(images: Tensor, labels: Tensor, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised images [n, 1, 28, 28], labels [n]) of every step, drawn by the seed."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        index = torch.randint(len(labels), (args.batch_size,), generator=generator).to(labels.device)
        yield (images[index, None].float() / 255 - MEAN[0]) / STD[0], labels[index]


def soak(args: argparse.Namespace, device: torch.device, family: str, dtype: torch.dtype, steps, test_set) -> bool:
    """Train a pair and write its row; whether it failed."""
    random_seed(args.seed)
    models = [timm.create_model(MODELS[family], **MODEL_KWARGS, drop_path_rate=0.0).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    accelerate(models[1], impl="triton")
    stock, flashwin = (Side(model, dtype, device, args.steps) for model in models)

    progress = Progress(args.steps)
    progress.doing(f"{family} {dtype}")
    for batch in steps:
        stock.step(*batch)
        flashwin.step(*batch)
        progress.step()
    progress.close()

    summaries = {name: side.summary() for name, side in (("stock", stock), ("flashwin", flashwin))}
    if device.type == "cuda":  # ten thousand images are more than the interpreter can do
        for model, summary in zip(models, summaries.values(), strict=True):
            predicted = predict(model, test_set[0], device).argmax(1)
            summary["test_accuracy"] = (predicted == test_set[1]).double().mean().item()
    all_finite = not any(summary["losses_not_finite"] for summary in summaries.values())
    theirs, ours = (summary["last_loss"] for summary in summaries.values())
    agree = all_finite and abs(ours - theirs) <= LOSS_TOLERANCE * theirs
    label = f"{family} {str(dtype).removeprefix('torch.')}, seed {args.seed}"
    write_row(args, device, "soak", label, steps=args.steps, batch_size=args.batch_size, agree=agree, **summaries)
    return not agree
