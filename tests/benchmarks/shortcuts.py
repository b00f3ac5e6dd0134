"""What a linear classifier gets from thumbnails of the embedded set: little, or it has a shortcut.

    python tests/benchmarks/shortcuts.py      # 10 s; draws the embedded set if need be

A class-balanced linear discriminant on 8x8 thumbnails and on mean colours, fitted on the labelled
training pictures and on five times as many that are drawn for this purpose, scored on both test
sets. Chance is 1 in 6 classes: 16.7 %.
"""

import numpy as np
from bench import print_table
from PIL import Image

from common import cli
from common.audit.shortcuts import discriminant
from common.fasteners import CLASSES
from common.fasteners.dataset import SEED
from common.fasteners.drawing import draw
from common.folders import EMBEDDED, data_folder

TESTS = ("test", "test_shifted")
SPLIT = 99  # of the pictures drawn here: none of the embedded set's


def thumbnails(pictures, side):
    """float [N, 3 side^2], values 0..255, of PIL images."""
    small = [picture.resize((side, side), Image.Resampling.BOX) for picture in pictures]
    return np.array([np.asarray(picture).ravel() for picture in small], float)


def open_split(folder):
    """(PIL images, labels int [N]) of a folder with a folder per class."""
    files = sorted(folder.glob("*/*.jpg"))
    labels = [CLASSES.index(file.parent.name) for file in files]
    return [Image.open(file).convert("RGB") for file in files], np.array(labels)


def draw_pictures(count):
    """The same of pictures that are drawn here, the classes in turn."""
    labels = np.arange(count) % len(CLASSES)
    names = [CLASSES[label] for label in labels]
    drawn = [draw(name, (SEED, SPLIT, number)) for number, name in enumerate(names)]
    return [Image.fromarray(picture) for picture in drawn], labels


def main():
    cli.parser(__doc__).parse_args()
    folder = data_folder(EMBEDDED)
    train = open_split(folder / "train")
    tests = [open_split(folder / name) for name in TESTS]
    drawn = draw_pictures(5 * len(train[0]))

    rows = []
    for side, name in ((8, "8x8 thumbnail"), (1, "mean colour")):
        others = [thumbnails(pictures, side) for pictures, _ in tests]
        for pictures, labels in (train, drawn):
            fitted, row = thumbnails(pictures, side), [name, f"{len(labels)}"]
            for other, (_, truth) in zip(others, tests):
                answer = discriminant(fitted, labels, other)
                row.append(f"{100 * (answer.argmax(1) == truth).mean():.1f}")
            rows.append(row)
    sizes = [f"{name} ({len(truth)})" for name, (_, truth) in zip(TESTS, tests)]
    print_table(["accuracy, %", "training pictures", *sizes], rows)


if __name__ == "__main__":
    cli.run(main)
