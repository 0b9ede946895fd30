"""Write the demo's images: the first four test images of every class, as one sheet, and a list of what is on it.

    python scripts/make_demo_assets.py

A column of the sheet is a class. timm_flashwin/assets/LICENSE-fashion-mnist.txt is the licence of what is written.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from fashion_mnist import CLASS_NAMES, FashionMNIST, add_data_dir_option
from PIL import Image

from timm_flashwin.demo import LABELS, SHEET

ASSETS = Path(__file__).parents[1] / "timm_flashwin" / "assets"
IMAGES_PER_CLASS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_dir_option(parser)
    test_set = FashionMNIST(parser.parse_args().data_dir, train=False)

    rows, columns = IMAGES_PER_CLASS, len(CLASS_NAMES)
    first = np.stack([np.flatnonzero(test_set.labels == label)[:rows] for label in range(columns)], axis=1)
    tiles = test_set.images[first]  # rows, columns, 28, 28
    tile_size = tiles.shape[-1]
    sheet = tiles.transpose(0, 2, 1, 3).reshape(rows * tile_size, columns * tile_size)

    ASSETS.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(ASSETS / SHEET, optimize=True)
    contents = {
        "tile_size": tile_size,
        "columns": columns,
        "labels": test_set.labels[first].ravel().tolist(),
        "test_indices": first.ravel().tolist(),
    }
    (ASSETS / LABELS).write_text(json.dumps(contents) + "\n")
    print(f"wrote {first.size} images to {ASSETS / SHEET} and {ASSETS / LABELS}")


if __name__ == "__main__":
    main()
