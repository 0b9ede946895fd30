"""Fashion-MNIST, read from the four idx files that Debian's package `dataset-fashion-mnist` installs."""

import argparse
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

DATA_DIR = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
INPUT_SIZE = (1, 28, 28)
MEAN, STD = (0.2860,), (0.3530,)  # of the training images, scaled to [0, 1]


class FashionMNIST(Dataset):
    """(PIL image of mode "L", 28x28; label) pairs; `transform` is applied to the image, as timm's loader expects."""

    def __init__(self, data_dir: Path, train: bool, limit: int | None = None, transform: Callable | None = None):
        split = "train" if train else "t10k"
        self.images = read_idx(data_dir / f"{split}-images-idx3-ubyte.gz")[:limit]  # n, 28, 28
        self.labels = read_idx(data_dir / f"{split}-labels-idx1-ubyte.gz")[:limit]  # n
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index])
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.labels[index])


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped idx file (format: yann.lecun.com/exdb/mnist, "the IDX file format").

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no idx file of unsigned bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; `apt-get install dataset-fashion-mnist` (Debian, Ubuntu) puts it into {DATA_DIR}, "
            "or name the folder that holds the four idx .gz files with --data-dir"
        )
    with gzip.open(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path} is no idx file of unsigned bytes: it starts with {content[:3].hex(' ')}, not 00 00 08"
        )
    ndim = content[3]
    shape = np.frombuffer(content, ">u4", ndim, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def add_data_dir_option(parser: argparse.ArgumentParser) -> None:
    """The one option that every script on this data set has."""
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="folder with the idx .gz files (%(default)s)")
