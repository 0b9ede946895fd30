"""Train the demo's small Swin on Fashion-MNIST with timm's pieces, and export it as one safetensors file.

    python scripts/train_demo.py --output timm_flashwin/assets/demo_swin.safetensors

Two stages, 14x14 and 7x7 tokens, window 7: the first stage has shifted windows, the second has a single window. The
file carries in its metadata all that is needed to rebuild the model (see timm_flashwin/demo.py).
"""

import argparse
import json
import math
import os
from pathlib import Path

import timm
import torch
from fashion_mnist import CLASS_NAMES, INPUT_SIZE, MEAN, STD, FashionMNIST, add_data_dir_option
from safetensors.torch import save
from timm.data import create_loader, create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from tqdm import tqdm

import timm_flashwin  # noqa: F401  (registers the *_flashwin names)

STOCK_MODEL = "swin_tiny_patch4_window7_224"
FLASHWIN_MODEL = "swin_tiny_flashwin"
MODEL_KWARGS = dict(
    img_size=INPUT_SIZE[1],
    patch_size=2,
    in_chans=INPUT_SIZE[0],
    num_classes=len(CLASS_NAMES),
    window_size=7,
    embed_dim=64,
    depths=(4, 2),
    num_heads=(2, 4),
)
MAX_FILE_BYTES = 3_000_000


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    random_seed(args.seed)
    train_set = FashionMNIST(args.data_dir, train=True, limit=args.limit)
    test_images, test_labels = load_test_set(args.data_dir)
    batch_size = min(args.batch_size, len(train_set))
    loader = create_loader(
        train_set,
        INPUT_SIZE,
        batch_size,
        is_training=True,
        scale=(0.85, 1.0),  # timm's default, down to 0.08 of the area, leaves too little of 28x28 pixels
        ratio=(0.95, 1.05),
        color_jitter=None,
        mean=MEAN,
        std=STD,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    model = timm.create_model(FLASHWIN_MODEL, **MODEL_KWARGS, drop_path_rate=0.05).to(device)
    ema = train(model, loader, args.epochs, device)

    accuracy = (predict(ema, test_images, device).argmax(1) == test_labels).double().mean().item()
    export(ema, args.output, test_accuracy=accuracy, epochs=args.epochs)
    print(f"test accuracy {accuracy:.4f} on {len(test_labels)} images; wrote {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_dir_option(parser)
    parser.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="use only N training images, for a smoke run")
    return parser.parse_args()


def load_test_set(data_dir: Path) -> tuple[Tensor, Tensor]:
    """The test images through timm's evaluation transform, [10000, 1, 28, 28], and their labels [10000]."""
    transform = create_transform(INPUT_SIZE, mean=MEAN, std=STD, crop_pct=1.0)
    images, labels = zip(*FashionMNIST(data_dir, train=False, transform=transform), strict=True)
    return torch.stack(images), torch.tensor(labels)


def train(model: nn.Module, loader, epochs: int, device: torch.device) -> nn.Module:
    """Train `model`, and return the moving average of its weights."""
    steps = epochs * len(loader)
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=min(3, epochs // 2),
        warmup_lr=1e-5,
        min_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    loss_fn = LabelSmoothingCrossEntropy(0.05)

    step = 0
    with tqdm(total=steps, desc="training", unit="step", mininterval=2.0) as bar:
        for epoch in range(epochs):
            model.train()
            total_loss = torch.zeros((), device=device)
            for images, labels in loader:
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = loss_fn(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                ema.update(model, step)
                scheduler.step_update(step)
                total_loss += loss.detach()  # read once an epoch: a read waits for the GPU
                bar.update()
            mean_loss = total_loss.item() / len(loader)
            if math.isnan(mean_loss):
                raise FloatingPointError(f"the loss became NaN in epoch {epoch + 1}; nothing was written")
            bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{mean_loss:.3f}")
    return ema.module


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, device: torch.device, batch_size: int = 500) -> Tensor:
    """The logits of normalised images [n, 1, 28, 28] in the model's dtype: [n, classes], float32, on the CPU."""
    model.eval()
    dtype = next(model.parameters()).dtype
    return torch.cat([model(batch.to(device, dtype)).float().cpu() for batch in images.split(batch_size)])


def export(model: nn.Module, path: Path, test_accuracy: float, epochs: int) -> None:
    """Write float32 weights, and in the metadata (whose values must be strings) what rebuilds the model."""
    metadata = {
        "model": STOCK_MODEL,
        "model_kwargs": json.dumps(MODEL_KWARGS),
        "class_names": json.dumps(CLASS_NAMES),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "test_accuracy": f"{test_accuracy:.4f}",
        "training": f"scripts/train_demo.py on Fashion-MNIST, {epochs} epochs",
    }
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"the weights take {len(content)} bytes; the demo ships at most {MAX_FILE_BYTES}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)  # save_file would leave it readable by its owner alone


if __name__ == "__main__":
    main()
