"""Draws the embedded set, and on request a contact sheet that shows what its classes look like.

    python -m common.fasteners --root data/fasteners --contact-sheet sheet.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.fasteners.canvas import SIZE
from common.fasteners.dataset import SEED, make_dataset
from common.fasteners.defects import CLASSES


def make_contact_sheet(root, file, columns=12):
    """Save an overview of a set: a row per class, random pictures of `train` and `test_shifted`.

    It shows at a glance what the classes look like on both lines, the first on the left.
    """
    rng = np.random.default_rng(SEED)
    left, gap = 100, 10  # px: room for the names of the classes; between the two lines
    width = left + 2 * columns * SIZE + gap
    sheet = Image.new("RGB", (width, len(CLASSES) * SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, class_name in enumerate(CLASSES):
        top = row * SIZE
        pen.text((4, top + SIZE // 2 - 6), class_name, fill="black")
        for block, split in enumerate(("train", "test_shifted")):
            files = sorted((Path(root) / split / class_name).glob("*.jpg"))
            start = left + block * (columns * SIZE + gap)
            for column, pick in enumerate(rng.permutation(len(files))[:columns]):
                with Image.open(files[pick]) as picture:
                    sheet.paste(picture, (start + column * SIZE, top))
    sheet.save(file)


def main():
    parser = argparse.ArgumentParser(description="Draw the synthetic fastener set.")
    parser.add_argument(
        "--root", type=Path, default=Path("data/fasteners"), help="folder of the set"
    )
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="also save an overview picture"
    )
    arguments = parser.parse_args()
    make_dataset(arguments.root)
    if arguments.contact_sheet:
        make_contact_sheet(arguments.root, arguments.contact_sheet)


if __name__ == "__main__":
    main()
