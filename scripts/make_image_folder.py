"""Write Fashion-MNIST as an image folder, train/<class>/*.png and validation/<class>/*.png, for timm's scripts.

python scripts/make_image_folder.py --output fashion_mnist [--limit 100]
"""

import argparse
from collections import Counter
from pathlib import Path

from fashion_mnist import CLASS_NAMES, FashionMNIST, add_data_dir_option
from tqdm import tqdm

# timm numbers the classes in the order of their folders' names: the label in front keeps the data set's numbers.
FOLDERS = tuple(f"{label}_{name.lower().replace('/', '_').replace(' ', '_')}" for label, name in enumerate(CLASS_NAMES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_dir_option(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of each class, in each split")
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output: {args.output} is there already; name a new folder")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: {args.limit} is not positive; leave it out for all images")
    counts = write_image_folder(args.data_dir, args.output, args.limit)
    print(f"{args.output}: " + ", ".join(f"{count} images in {split}" for split, count in counts.items()))


def write_image_folder(data_dir: Path, output: Path, limit: int | None = None) -> dict[str, int]:
    """Write the images of both splits, 28x28 greyscale PNG; `limit` counts the images of each class in each split.

    Returns:
        The number of images of each split.

    Raises:
        FileExistsError: `output` is there already: what it holds would be mixed with what is written.
        FileNotFoundError: A file of the data set is missing; nothing was made.
    """
    splits = {split: FashionMNIST(data_dir, train=split == "train") for split in ("train", "validation")}
    output.mkdir(parents=True)
    counts = {}
    for split, images in splits.items():
        written = Counter()
        for folder in FOLDERS:
            (output / split / folder).mkdir(parents=True)
        for index, (image, label) in enumerate(tqdm(images, desc=split)):
            if limit is None or written[label] < limit:
                image.save(output / split / FOLDERS[label] / f"{index:05d}.png")
                written[label] += 1
        counts[split] = written.total()
    return counts


if __name__ == "__main__":
    main()
