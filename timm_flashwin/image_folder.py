"""Labelled images in one folder a class, read by timm's loader; nothing is skipped or renumbered in silence."""

from pathlib import Path

from timm.data import ImageDataset, create_dataset, get_img_extensions
from torch.utils.data import Dataset

from .classify import read_image
from .console import CliError


class LabelledImages(Dataset):
    """timm's dataset of an image folder, except that an image that cannot be read is an error.

    timm puts the next image in its place and logs it. The classes are the folders' names in timm's order, the natural
    order of the names; for ImageNet's synsets it is the order of the models' classes.

    Attributes:
        root: The folder of the class folders: the one given, or its `val` or `validation`.
        num_classes: Number of class folders.
        transform: Of an image, set by `timm.data.create_loader`.
    """

    def __init__(self, data_dir: Path):
        """
        Raises:
            CliError: It is no folder, or its images are not in one folder a class.
        """
        self._images = open_dataset(data_dir)
        self.root = Path(self._images.reader.root)
        self.num_classes = len(self._images.reader.class_to_idx)
        self.transform = None
        self._check_folders()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int):
        """(RGB image as `transform` makes it, class index).

        Raises:
            CliError: The image cannot be read.
        """
        _, target = self._images.reader.samples[index]
        return self.transform(read_image(self._path(index), "RGB")), target

    def _path(self, index: int) -> Path:
        return Path(self._images.filename(index, absolute=True))

    def _check_folders(self) -> None:
        """timm numbers the folders that hold images, wherever they lie: one too many or too few shifts all classes."""
        folders = {path.name for path in self.root.iterdir() if path.is_dir()}
        for index in range(len(self)):
            path = self._path(index)
            if path.parent == self.root:
                raise CliError(
                    f"{path} lies in no class folder; --data-dir takes one folder a class, such as "
                    f"{self.root / 'n01440764' / path.name}"
                )
            if path.parent.parent != self.root:
                raise CliError(f"{path} lies too deep; the class folders have to be those of {self.root} itself")
        empty = sorted(name for name in folders - set(self._images.reader.class_to_idx) if not name.startswith("."))
        if empty:
            raise CliError(
                f"{self.root / empty[0]} holds no image ({', '.join(get_img_extensions())})"
                + (f", nor do {len(empty) - 1} more class folders" if len(empty) > 1 else "")
                + "; fill or remove it, or every class after it gets a wrong number"
            )


def open_dataset(data_dir: Path) -> ImageDataset:
    if not data_dir.is_dir():
        raise CliError(f"--data-dir {data_dir} is no folder")
    try:
        return create_dataset("", root=str(data_dir), split="validation")
    except RuntimeError as error:  # timm found none
        raise CliError(f"--data-dir {data_dir} holds no image ({', '.join(get_img_extensions())})") from error
