"""The classify command: the most likely classes of images, by any model of timm's."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from .console import CliError, one_line, warn
from .demo import implementation
from .weights import create_model


def run_classify(
    images: list[Path], name: str, pretrained: bool, checkpoint: Path | None, top_k: int, device: torch.device
) -> int:  # fmt: skip
    """Print the top classes of every image.

    Returns:
        The exit status, 0.

    Raises:
        CliError: A file, the name or the weights cannot be used.
    """
    for path in images:
        if not path.is_file():
            raise CliError(f"{path} is no file")
    model = create_model(name, pretrained, checkpoint).eval().to(device)
    if not model.num_classes:
        raise CliError(f"--model {name} has no classes; choose a model or a tag with a classifier")
    if not pretrained and checkpoint is None:
        warn("the weights are random, so the classes mean nothing; pass --pretrained, or --checkpoint FILE")
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    label = class_labels(model)

    print(f"{name}: {model.num_classes} classes, on {device}; {implementation(model)}")
    for path in images:
        image = transform(read_image(path, "L" if config["input_size"][0] == 1 else "RGB"))
        with torch.inference_mode():
            probabilities = model(image.unsqueeze(0).to(device)).float().softmax(-1)[0]
        top = probabilities.topk(min(top_k, len(probabilities)))
        print(path)
        for probability, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"  {probability:7.2%}  {label(index)}")
    return 0


def read_image(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow's formats raise
        raise CliError(f"{path} cannot be read as an image: {one_line(error)}") from error


def class_labels(model: nn.Module) -> Callable[[int], str]:
    """Class index -> what to print: the name where one is known for this number of classes, else the index."""
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        descriptions = model.pretrained_cfg.get("label_descriptions") or {}
        return lambda index: descriptions.get(names[index], names[index])
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return ImageNetInfo(subset).index_to_description
    return "class {}".format
